"""The expectation family, on made-up features and with the shipped weights."""

from dataclasses import replace
import os
import subprocess
import sys

import cv2
from features import corners, encoded, found
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from imatching_ros.matching import weights
from imatching_ros.matching.encoder import COARSE, Features, FINE, MULTIPLE, RELIABILITY
from imatching_ros.matching.families.expectation import (
    compiled,
    ExpectationMatcher,
    FINE_RADIUS,
    MEAN_RADIUS,
    SEARCH_RADIUS,
)
from imatching_ros.matching.tracker import round_trip, SYMMETRIC_PX
from imatching_ros.matching.warps import apply_homography, in_frame, random_homography
import numpy as np
import pytest
import torch

SIZES = [
    ((320, 240), 1), ((640, 368), 2), ((1241, 376), 1), ((101, 77), 3), ((49, 33), 1),
    ((20, 9), 2),
]


@pytest.fixture(scope='module')
def matcher(shipped):
    return shipped[0]


@pytest.mark.parametrize('size, batch', SIZES)
def test_any_image_size_and_any_batch_has_features_and_matches(matcher, day, size, batch):
    images = [cv2.resize(image, size, interpolation=cv2.INTER_AREA) for _, image in day[1][:batch]]
    features = encoded(matcher, *images)
    cells = [max(-(-edge // MULTIPLE) * MULTIPLE, 64) for edge in size[::-1]]
    assert features.coarse.shape == (batch, 64, cells[0] // COARSE, cells[1] // COARSE)
    assert features.fine.shape == (batch, cells[0] // FINE, cells[1] // FINE, 32)
    assert features.reliability.shape == (
        batch, 1, cells[0] // RELIABILITY, cells[1] // RELIABILITY
    )
    assert features.size == size[::-1]
    torch.testing.assert_close(
        features.coarse.norm(dim=1), torch.ones(batch, *features.coarse.shape[2:])
    )
    queries = torch.rand(batch, 7, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        size
    )
    matches = matcher.match(features, features, queries)
    assert matches.uv.shape == matches.coarse_uv.shape == (batch, 7, 2)
    assert matches.score.shape == (batch, 7) and matches.cov.shape == (batch, 7, 2, 2)
    assert all(
        getattr(matches, name).isfinite().all() for name in ('uv', 'coarse_uv', 'score', 'cov')
    )
    assert ((matches.score >= 0) & (matches.score <= 1)).all()
    assert matcher.match(features, features, queries[:, :0]).uv.shape == (batch, 0, 2)


@pytest.mark.parametrize('exact', [True, False])
def test_a_batch_gives_what_its_images_give_one_by_one(matcher, day, exact):
    images = [image for _, image in day[1][:9:3]]
    together = encoded(matcher, *images, exact=exact)
    queries = torch.stack([corners(image, 100)[:60] for image in images])
    rolled = (torch.roll(x, 1, 0) for x in (together.coarse, together.fine, together.reliability))
    with torch.no_grad():
        matches = matcher.match(together, Features(*rolled, together.size), queries)
    for k, image in enumerate(images):
        alone, before = (encoded(matcher, each, exact=exact) for each in (image, images[k - 1]))
        torch.testing.assert_close(together[k:k + 1].coarse, alone.coarse, atol=1e-4, rtol=0)
        # Numbers that differ in their last bit may be kept as neighbours of half precision.
        step = 0.0 if exact else torch.finfo(alone.fine.dtype).eps
        torch.testing.assert_close(together[k:k + 1].fine, alone.fine, atol=1e-4, rtol=step)
        with torch.no_grad():
            one = matcher.match(alone, before, queries[k:k + 1])
        close = (one.uv[0] - matches.uv[k]).norm(dim=-1) < 1e-2
        assert close.float().mean() > 0.95  # where two cells are as similar, rounding may choose


def test_half_precision_is_what_torch_uses_of_the_processor():
    ask = (
        'import torch; from imatching_ros.matching.encoder import half_precision;'
        "print(half_precision(torch.device('cpu'), False))"
    )
    for capability in ('avx2', 'default'):
        run = subprocess.run(
            [sys.executable, '-c', ask], env=os.environ | {'ATEN_CPU_CAPABILITY': capability},
            check=True, capture_output=True, text=True,
        )
        assert run.stdout.strip() == 'None', capability


def test_brightness_and_contrast_do_not_matter(matcher, day):
    image = day[1][0][1].astype(np.float32)
    queries = corners(day[1][0][1])
    with torch.no_grad():
        plain, dim = (
            matcher.encode(torch.tensor(x)[None, None] / 255) for x in (image, 0.5 * image + 20)
        )
        one, two = (
            matcher.match(plain, plain, queries[None]).uv,
            matcher.match(plain, dim, queries[None]).uv,
        )
    assert (one - two).norm(dim=-1).quantile(0.95) < 0.1


def random_features(seed=0, batch=1, height=12, width=14, dtype=torch.float32):
    """
    Return features of no image.

    Unit descriptors, each its own, in which only a cell itself is like the cell.
    """
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, 64, height, width, generator=g, dtype=dtype)
    fine = torch.randn(batch, 4 * height, 4 * width, 32, generator=g, dtype=dtype)
    normalise = torch.nn.functional.normalize
    reliability = torch.randn(batch, 1, 2 * height, 2 * width, generator=g, dtype=dtype)
    return Features(
        normalise(coarse, dim=1), normalise(fine, dim=-1), reliability, (8 * height, 8 * width)
    )


def test_each_head_gets_the_gradient_of_its_own_result():
    matcher = ExpectationMatcher()
    queries = torch.tensor([[[30.2, 41.7], [100.0, 7.0]]])
    for name, own in (('uv', 'fine'), ('coarse_uv', 'coarse')):
        features = [random_features(seed) for seed in (0, 1)]
        for each in features:
            each.coarse.requires_grad_()
            each.fine.requires_grad_()
        (
            getattr(matcher.match(*features, queries), name) * torch.tensor([1.0, 2.0])
        ).sum().backward()
        for each in features:
            for head in ('coarse', 'fine'):
                gradient = getattr(each, head).grad
                if head == own:
                    assert gradient.abs().sum() > 0
                else:
                    assert gradient is None or not gradient.any()


def test_no_gradient_leaves_the_windows():
    matcher = ExpectationMatcher()
    reference, target = random_features(0), random_features(1)
    target.coarse.requires_grad_()
    target.fine.requires_grad_()
    query = torch.tensor([[[30.2, 41.7]]])
    matches = matcher.match(reference, target, query)
    (matches.uv.sum() + matches.coarse_uv.sum()).backward()
    touched = target.fine.grad[0].abs().sum(-1).nonzero().flip(-1)  # x, y
    assert 0 < len(touched) <= (2 * MEAN_RADIUS + 1) ** 2
    centre = (matches.coarse_uv[0, 0] - (FINE - 1) / 2) / FINE
    assert ((touched - centre).abs() <= FINE_RADIUS + 0.5).all()
    touched = target.coarse.grad[0].abs().sum(0).nonzero()
    assert 0 < len(touched) <= 25 and (touched.amax(0) - touched.amin(0)).max() <= 4


def test_the_expectation_is_exact_up_to_the_corners():
    # With a sharp similarity the mean is the one cell that is alike: pixel centres, strides and
    # windows all show.
    matcher = ExpectationMatcher()
    with torch.no_grad():
        matcher.log_scale_coarse.fill_(6.0)
        matcher.log_scale_fine.fill_(7.0)
        features = random_features()
        v, u = torch.meshgrid(torch.arange(48), torch.arange(56), indexing='ij')
        queries = torch.stack((u, v), -1).flatten(0, 1)[None] * FINE + (FINE - 1) / 2
        matches = matcher.match(features, features, queries)
        assert (matches.uv - queries).abs().max() < 1e-3
        # A coarse query at a cell's centre is that cell.
        v, u = torch.meshgrid(torch.arange(12), torch.arange(14), indexing='ij')
        queries = torch.stack((u, v), -1).flatten(0, 1)[None] * COARSE + (COARSE - 1) / 2
        matches = matcher.match(features, features, queries)
        assert (matches.coarse_uv - queries).abs().max() < 1e-3


def test_equation_5_in_closed_form():
    # Two alike cells in one window: the mean lies between them, and the covariance along the line
    # that joins them.
    matcher = ExpectationMatcher()
    with torch.no_grad():
        matcher.log_scale_fine.fill_(7.0)
        target = random_features(1)
        target.fine[0, 20, 22] = target.fine[0, 22, 24]
        reference = random_features(2)
        reference.fine[0, 10, 12] = target.fine[0, 20, 22]
        query = torch.tensor([[[12, 10]]]) * FINE + (FINE - 1) / 2
        centre = torch.tensor([[[24, 21]]]) * FINE + (FINE - 1) / 2
        uv, spread, mass = matcher.fine_expectation(
            *matcher.fine_similarity(reference, target, query, centre)
        )
        torch.testing.assert_close(uv[0, 0], torch.tensor([23.0, 21.0]) * FINE + (FINE - 1) / 2)
        half = torch.tensor([1.0, 1.0]) * FINE
        torch.testing.assert_close(spread[0, 0], half[:, None] * half, atol=1e-3, rtol=0)
        assert mass > 0.999


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_what_is_compiled_says_what_plain_torch_says(data):
    if not compiled():
        pytest.skip('numba is not installed')
    matcher = ExpectationMatcher()
    with torch.no_grad():
        matcher.log_scale_coarse.fill_(3.5)
        matcher.log_scale_fine.fill_(data.draw(st.floats(1, 4)))
        matcher.log_odds.copy_(torch.tensor([0.3, 0.5, 2.0, 1.0, -2.0]))
    h, w = (data.draw(st.integers(2, 7)) * 4 for _ in range(2))
    batch, seed = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 1000))
    reference, target = (
        replace(each, fine=(each.fine * 3).bfloat16())
        for each in (random_features(seed + k, batch, h, w) for k in (0, 1))
    )
    g = torch.Generator().manual_seed(seed)
    size = torch.tensor([8.0 * w, 8.0 * h])
    queries, around = (torch.rand(batch, 30, 2, generator=g) * (size + 40) - 20 for _ in 'qa')
    queries[:, 0], queries[:, 1], around[:, 2] = 0, size - 1, -1000
    around = data.draw(st.sampled_from([around, queries, None]))
    with torch.no_grad():
        matches = matcher.match(reference, target, queries, around)
        # In float32 it is eager: the same numbers
        reference, target = (replace(f, fine=f.fine.float()) for f in (reference, target))
        expected = matcher.match(reference, target, queries, around)
    # Where two cells are as similar, rounding may choose
    same = (matches.coarse_uv - expected.coarse_uv).norm(dim=-1) < 2e-3
    same &= (matches.uv - expected.uv).norm(dim=-1) < 2e-3
    assert same.float().mean() > 0.9
    # And which window of the fine map is searched, where the coarse mean lies between two cells
    cell = (expected.coarse_uv - (FINE - 1) / 2) / FINE - 0.5
    same &= ((cell - cell.round()).abs() > 2e-3).all(-1)
    for name in ('score', 'cov'):
        one, two = getattr(matches, name), getattr(expected, name)
        torch.testing.assert_close(one[same], two[same], atol=1e-3, rtol=1e-3)


def test_what_is_no_number_is_answered_and_nothing_breaks():
    matcher = ExpectationMatcher()
    target = random_features()
    target = replace(target, fine=target.fine.bfloat16())
    broken = replace(target, coarse=torch.full_like(target.coarse, torch.nan))
    queries = torch.tensor([[[torch.nan, 3.0], [torch.inf, -torch.inf], [1e30, 20.0]]])
    with torch.no_grad():
        for features in (target, broken):
            for around in (None, queries):
                assert matcher.match(features, features, queries, around).uv.shape == (1, 3, 2)


def test_a_place_expected_makes_a_search_shorter_not_worse(matcher, day):
    reference, target = day[1][0][1], day[1][4][1]
    queries = corners(reference)[None]
    with torch.no_grad():
        one, two = encoded(matcher, reference), encoded(matcher, target)
        whole = matcher.match(one, two, queries)
        sure = whole.score[0] > 0.5
        right, far = queries + 10, (queries + torch.tensor([150.0, 0])) % 320
        for around in (right, far):
            matches = matcher.match(one, two, queries, around)
            same = (matches.uv - whole.uv).norm(dim=-1)[0] < 1e-2
            assert sure.sum() > 150 and same[sure].float().mean() > 0.95
            assert (matches.score >= whole.score - 1e-3).float().mean() > 0.95


def test_the_region_is_what_is_searched(matcher, day, monkeypatch):
    monkeypatch.setattr('imatching_ros.matching.families.expectation.FAILED', 0.0)
    features = encoded(matcher, day[1][0][1])
    queries = torch.tensor([[[100.0, 100.0]]]).expand(1, 5, 2)
    near, far = (100.0 + COARSE * (SEARCH_RADIUS + k) for k in (-1, 2))
    around = torch.tensor([[[100.0, 100.0], [near, 100], [far, 100], [100, 20], [319, 239]]])
    with torch.no_grad():
        matches = matcher.match(features, features, queries, around)
    reach = (SEARCH_RADIUS + 0.5) * COARSE
    assert ((matches.coarse_uv - around).abs() <= reach).all()
    found = (matches.uv - queries).norm(dim=-1)[0] < 1
    assert found.tolist() == [True, True, False, False, False]


def test_torch_compile_gives_the_same(matcher, day):
    images = torch.tensor(np.stack([image for _, image in day[1][:2]]))[:, None].float() / 255
    queries = corners(day[1][0][1], 50)[None]
    torch._dynamo.reset()
    try:
        encode, match = (
            torch.compile(function, backend='aot_eager')
            for function in (matcher.encode, matcher.match)
        )
        with torch.no_grad():
            features, expected = encode(images), matcher.encode(images)
            for name in ('coarse', 'fine', 'reliability'):
                one, two = getattr(features, name), getattr(expected, name)
                assert (one - two).abs().max() < 0.02 * two.abs().max()
            matches = match(expected[:1], expected[1:], queries)
            same = matcher.match(expected[:1], expected[1:], queries)
    finally:
        torch._dynamo.reset()
    assert ((matches.uv - same.uv).norm(dim=-1) < 1e-2).float().mean() > 0.95


@settings(deadline=None, max_examples=15)
@given(
    arrays(np.uint8, st.tuples(st.integers(2, 70), st.integers(2, 90))),
    st.lists(st.tuples(st.floats(-20, 120), st.floats(-20, 120)), min_size=1, max_size=5),
)
def test_whatever_is_asked_the_answer_is_finite_and_its_covariance_positive_definite(image, asked):
    matcher, _ = weights.load(weights.default_path())
    features = encoded(matcher, image)
    with torch.no_grad():
        matches = matcher.match(features, features, torch.tensor([asked]))
    assert matches.uv.isfinite().all() and matches.score.isfinite().all()
    assert (torch.linalg.eigvalsh(matches.cov.double()) > 1e-3).all()
    torch.testing.assert_close(matches.cov, matches.cov.mT)


def test_folding_away_batch_norm_changes_nothing(day):
    torch.manual_seed(0)
    trained = ExpectationMatcher(batch_norm=True)
    with torch.no_grad():
        for module in trained.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.3, 3)
                module.weight.uniform_(0.5, 2)
                module.bias.normal_(0, 0.3)
        trained.log_cov.normal_()
    trained.eval()
    folded = trained.folded().double()
    trained.double()  # float32 would be multiplied in half precision
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    images = [image for _, image in day[1][:2]]
    images = torch.tensor(np.stack(images))[:, None].double() / 255
    one, two = trained.encode(images), folded.encode(images)
    for name in ('coarse', 'fine', 'reliability'):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), atol=1e-4, rtol=1e-4)
    assert torch.equal(trained.log_cov, folded.log_cov)


def test_a_point_is_found_where_it_is_in_the_same_image(matcher, day):
    for _, image in day[1][::13]:
        queries = corners(image)
        error = (found(matcher, image, image, queries) - queries).norm(dim=-1)
        assert error.median() < 0.45 and (error < 1).float().mean() > 0.97


@pytest.mark.parametrize('size', [(333, 211), (101, 77)])
def test_padding_does_not_show_at_the_border(matcher, day, size):
    def border_errors(image):
        size = image.shape[::-1]
        grid = np.stack(np.meshgrid(*(np.arange(0, edge, 5.0) for edge in size)), -1)
        queries = torch.from_numpy(grid).float().reshape(-1, 2)
        far = torch.tensor(size) - 1
        queries = queries[(queries < 6).any(-1) | (queries > far - 6).any(-1)]
        return (found(matcher, image, image, queries) - queries).norm(dim=-1)

    # The mean of cells does not reach the outermost half pixel: a border errs more than the middle
    # does, whether there is padding behind it or not
    images = [cv2.resize(image, size, interpolation=cv2.INTER_AREA) for _, image in day[1][::15]]
    height, width = (edge // MULTIPLE * MULTIPLE for edge in images[0].shape)
    padded = torch.cat([border_errors(image) for image in images])
    without = torch.cat([border_errors(image[:height, :width].copy()) for image in images])
    assert padded.median() < without.median() + 0.1
    assert (padded > 5).float().mean() < (without > 5).float().mean() + 0.05  # lost altogether


def test_a_known_homography_is_found(matcher, day):
    shares = []
    for seed, (_, image) in enumerate(day[1][:30:5]):
        H = random_homography(np.random.default_rng(seed), image.shape[::-1], 0.25)
        warped = cv2.warpPerspective(image, H, image.shape[::-1])
        queries = corners(image)
        truth = apply_homography(H, queries.numpy())
        seen = torch.from_numpy(in_frame(truth, image.shape[::-1]))
        error = (found(matcher, image, warped, queries) - torch.from_numpy(truth).float()).norm(
            dim=-1
        )[seen]
        shares.append((error < 1).float().mean().item())
    assert min(shares) > 0.75 and np.mean(shares) > 0.9


def test_there_and_back_errs_less_than_there(matcher, day):
    there, both = [], []
    for seed, (_, image) in enumerate(day[1][:30:5]):
        H = random_homography(np.random.default_rng(seed), image.shape[::-1], 0.25)
        warped = cv2.warpPerspective(image, H, image.shape[::-1])
        queries = corners(image)
        truth = torch.from_numpy(apply_homography(H, queries.numpy())).float()
        with torch.no_grad():
            one, two = encoded(matcher, image), encoded(matcher, warped)
            matches, distance = round_trip(matcher, one, two, queries[None])
            forward = matcher.match(one, two, queries[None])
        close = distance[0] < SYMMETRIC_PX
        # What goes astray on one of the ways is left as it is
        assert torch.equal(matches.uv[0, ~close], forward.uv[0, ~close])
        there.append((forward.uv[0] - truth).norm(dim=-1)[close])
        both.append((matches.uv[0] - truth).norm(dim=-1)[close])
    assert torch.cat(both).median() < 0.9 * torch.cat(there).median()


def test_the_covariance_knows_which_matches_are_less_certain(matcher, day):
    reference, target = day[1][0][1], day[1][4][1]
    queries = corners(reference)
    H = random_homography(np.random.default_rng(1), reference.shape[::-1], 0.5)
    target = cv2.warpPerspective(reference, H, reference.shape[::-1])
    half = target.shape[1] // 2  # of which one is out of focus
    target[:, half:] = cv2.GaussianBlur(target, (0, 0), 3.0)[:, half:]
    truth = apply_homography(H, queries.numpy())
    seen = torch.from_numpy(in_frame(truth, reference.shape[::-1]))
    with torch.no_grad():
        matches = matcher.match(
            encoded(matcher, reference), encoded(matcher, target), queries[None]
        )
    error = (matches.uv[0] - torch.from_numpy(truth).float()).norm(dim=-1)[seen]
    certain = matches.cov[0].diagonal(dim1=-2, dim2=-1).sum(-1)[seen].argsort()
    half = len(certain) // 2
    assert error[certain[:half]].mean() < error[certain[half:]].mean()
