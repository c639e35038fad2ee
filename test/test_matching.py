"""The matcher, the detector, the tracker and the weights file, on rendered images."""

import copy
from dataclasses import replace
import json
import os
import struct
import subprocess
import sys
import threading

import cv2
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from imatching_ros.geometry.camera import Camera
from imatching_ros.matching import weights
from imatching_ros.matching.detector import BORDER, detect, SPACING
from imatching_ros.matching.encoder import COARSE, Features, FINE, MULTIPLE, RELIABILITY
from imatching_ros.matching.families.expectation import (
    compiled,
    ExpectationMatcher,
    FINE_RADIUS,
    MEAN_RADIUS,
    SEARCH_RADIUS,
)
from imatching_ros.matching.protocol import FAILED
from imatching_ros.matching.tracker import round_trip, SYMMETRIC_PX, Tracker, TrackerOptions
from imatching_ros.matching.warps import apply_homography, in_frame, random_homography
import numpy as np
import pytest
import safetensors.torch
import torch

SIZES = [
    ((320, 240), 1), ((640, 368), 2), ((1241, 376), 1), ((101, 77), 3), ((49, 33), 1),
    ((20, 9), 2),
]


@pytest.fixture(scope='module')
def matcher(shipped):
    return shipped[0]


def encoded(matcher, *images, exact=False):
    with torch.no_grad():
        return matcher.encode(torch.tensor(np.stack(images))[:, None].float() / 255, exact)


def corners(image, count=300):
    return torch.from_numpy(detect(image, count))


def found(matcher, reference, target, queries):
    """Return uv (N, 2) of queries (N, 2)."""
    with torch.no_grad():
        return matcher.match(
            encoded(matcher, reference), encoded(matcher, target), queries[None]
        ).uv[0]


# The network -------------------------------------------------------------------------------------


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


# The shipped weights -----------------------------------------------------------------------------


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


# Warps -------------------------------------------------------------------------------------------


def test_a_warp_of_no_strength_is_the_identity():
    H = random_homography(np.random.default_rng(0), (320, 240), 0.0)
    np.testing.assert_allclose(H / H[2, 2], np.eye(3), atol=1e-9)


# The detector ------------------------------------------------------------------------------------


def test_corners_keep_away_from_one_another_and_from_the_border(day):
    image = day[1][0][1]
    points = detect(image, 300)
    assert points.shape == (300, 2) and points.dtype == np.float32
    assert np.array_equal(points, detect(image, 300))
    distance = np.linalg.norm(points[:, None] - points, axis=-1) + 1e6 * np.eye(300)
    assert distance.min() >= SPACING
    assert (points >= BORDER).all() and (points <= np.array(image.shape[::-1]) - 1 - BORDER).all()


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.tuples(st.floats(-10, 330), st.floats(-10, 250)), max_size=40), st.integers(1, 200)
)
def test_corners_keep_away_from_what_is_occupied(day, occupied, count):
    occupied = np.array(occupied, np.float32).reshape(-1, 2)
    points = detect(day[1][7][1], count, occupied)
    assert len(points) <= count
    if len(points) and len(occupied):
        distance = np.linalg.norm(points[:, None] - occupied, axis=-1)
        assert distance.min() > SPACING - 1  # occupied points stand on whole pixels


def test_dim_and_empty_images(day):
    dim = (day[1][0][1] // 16 + 3).astype(np.uint8)
    assert len(detect(dim, 300)) > 200
    for value in (0, 128, 255):
        points = detect(np.full((240, 320), value, np.uint8), 300)
        assert points.shape == (0, 2) and points.dtype == np.float32


# The tracker -------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def tracked(shipped, day):
    """Return correspondences of the daylight recording, and each image's keyframes."""
    return track(shipped[0], *day)


def track(matcher, camera, images, options=None):
    tracker = Tracker(matcher, 0, camera, options)
    messages, keyframes = [], []
    for stamp, image in images:
        keyframes.append(tracker.keyframes)
        messages.append(tracker.track(stamp, image))
    return messages, keyframes


def test_the_first_image_is_a_keyframe_without_rows(tracked, day):
    messages, keyframes = tracked
    assert len(messages[0]) == 0 and messages[0].stamp == day[1][0][0]
    assert keyframes[:2] == [[], [day[1][0][0]]]
    assert [message.stamp for message in messages] == [stamp for stamp, _ in day[1]]


@pytest.mark.parametrize('references', [1, 2, 3])
def test_every_image_is_matched_with_its_past_keyframes(shipped, day, references):
    messages, keyframes = track(
        shipped[0], day[0], day[1][:24], TrackerOptions(references=references)
    )
    seen = []
    for message, past in zip(messages[1:], keyframes[1:], strict=True):
        seen += [stamp for stamp in past if stamp not in seen]
        assert past == seen[-references:] and all(stamp < message.stamp for stamp in past)
        assert set(message.ref_stamp.tolist()) == set(past)
    assert len(seen) > 3


def test_rows_are_in_frame_and_undistorted_by_the_camera(tracked, day):
    camera = day[0]
    for message in tracked[0][1:]:
        assert len(message) > 100
        for uv in (message.uv, message.ref_uv):
            assert ((uv >= 0) & (uv <= torch.tensor([camera.width - 1, camera.height - 1]))).all()
        torch.testing.assert_close(message.xy, camera.normalise(message.uv.double()).float())
        assert ((message.score >= 0) & (message.score <= 1)).all()
        uu, uv, vv = message.cov.unbind(-1)
        assert (uu > 0).all() and (uu * vv > uv * uv).all()
        dtypes = [getattr(message, name).dtype for name in ('uv', 'xy', 'ref_uv', 'score', 'cov')]
        assert (
            dtypes == [torch.float32] * 5
            and message.track.dtype == message.ref_stamp.dtype == torch.int64
        )


def test_a_track_is_one_point_of_each_keyframe_and_lives_on(tracked):
    where, keyframes_of = {}, {}
    for message in tracked[0]:
        rows = list(zip(message.ref_stamp.tolist(), message.track.tolist(), strict=True))
        assert len(set(rows)) == len(rows)  # one row for each keyframe that saw the track
        for row, uv in zip(rows, message.ref_uv.tolist(), strict=True):
            assert where.setdefault(row, uv) == uv
            keyframes_of.setdefault(row[1], set()).add(row[0])
    lives = [len(keyframes) for keyframes in keyframes_of.values()]
    assert sum(life >= 4 for life in lives) > 100
    born = min(keyframes_of), max(keyframes_of)
    assert born[0] >= 0 and born[1] < 2**32


def test_new_points_are_born_between_the_old_ones(tracked, day):
    at = {}  # keyframe: its points
    for message in tracked[0]:
        for stamp, uv, name in zip(
            message.ref_stamp.tolist(), message.ref_uv, message.track.tolist(), strict=True
        ):
            at.setdefault(stamp, {})[name] = uv
    first = sorted(at)[0]
    for stamp in sorted(at)[1:]:
        new = [
            name
            for name in at[stamp]
            if all(name not in at[other] for other in at if other < stamp)
        ]
        old = [name for name in at[stamp] if name in at[first]]
        if new and old:
            distance = torch.cdist(
                torch.stack([at[stamp][k] for k in new]), torch.stack([at[stamp][k] for k in old])
            )
            assert distance.min() > SPACING - 1
        assert len(at[stamp]) <= TrackerOptions.queries


def test_rows_come_back_to_where_they_started_and_references_agree(matcher, tracked, day):
    images = dict(day[1])
    options = TrackerOptions()
    disagreeing = 0
    for message in tracked[0][3::9]:
        features = encoded(matcher, images[message.stamp])
        for stamp in message.ref_stamp.unique().tolist():
            mine = message.ref_stamp == stamp
            queries = message.ref_uv[mine][None]
            with torch.no_grad():
                matches, distance = round_trip(
                    matcher, encoded(matcher, images[stamp]), features, queries
                )
            assert distance.max() < options.round_trip_px + 1e-2
            close = (matches.uv[0] - message.uv[mine]).norm(dim=-1) < 1e-2
            assert close.float().mean() > 0.95
        for name in message.track.unique():
            rows = message.uv[message.track == name]
            disagreeing += int((rows[:1] - rows).norm(dim=-1).max() > options.agreement_px)
    assert disagreeing == 0


def test_bounds_of_the_options_are_kept(shipped, day):
    loose, _ = track(shipped[0], day[0], day[1][:8])
    strict, _ = track(
        shipped[0], day[0], day[1][:8], TrackerOptions(round_trip_px=0.2, queries=150)
    )
    assert 0 < len(strict[-1]) < 0.5 * len(loose[-1])
    agreeing, _ = track(shipped[0], day[0], day[1][:12], TrackerOptions(agreement_px=0.2))
    apart = [
        (message.uv[message.track == name][:1] - message.uv[message.track == name])
        .norm(dim=-1)
        .max()
        for message in agreeing[-2:]
        for name in message.track.unique()
    ]
    assert 0.05 < max(apart) <= 0.2
    _, rare = track(shipped[0], day[0], day[1][:20], TrackerOptions(parallax=0.2))
    _, often = track(shipped[0], day[0], day[1][:20], TrackerOptions(parallax=0.01))
    assert len({s for past in rare for s in past}) < len({s for past in often for s in past})


def test_twice_the_same_gives_the_same_bits(shipped, day, tracked):
    again, _ = track(shipped[0], day[0], day[1][:15])
    for one, two in zip(again, tracked[0], strict=False):
        assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(two), strict=True))


def tensors(message):
    return [value for value in vars(message).values() if isinstance(value, torch.Tensor)]


def test_other_weights_go_on_with_the_same_tracks(shipped, day):
    other = copy.deepcopy(shipped[0])
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.02 * parameter.abs().mean() * torch.randn_like(parameter)
    images = dict(day[1])
    tracker = Tracker(shipped[0], 3, day[0])
    for stamp, image in day[1][:6]:
        before = tracker.track(stamp, image)
    keyframes = tracker.keyframes
    tracker.swap(other, 4)
    assert tracker.keyframes == keyframes
    stamp, image = day[1][6]
    after = tracker.track(stamp, image)
    assert (before.model, after.model) == (3, 4)
    common = set(before.track.tolist()) & set(after.track.tolist())
    assert len(common) > 0.8 * len(before.track.unique())
    # The new weights are used at once, on both images.
    for reference in keyframes:
        mine = after.ref_stamp == reference
        with torch.no_grad():
            expected, old = (
                round_trip(
                    m, encoded(m, images[reference]), encoded(m, image), after.ref_uv[mine][None]
                )[0].uv[0]
                for m in (other, shipped[0])
            )
        assert (after.uv[mine] - expected).norm(dim=-1).quantile(0.95) < 1e-2
        assert (after.uv[mine] - old).norm(dim=-1).median() > 2e-2


def test_a_turn_farther_than_a_region_loses_no_track(shipped, day):
    # A window of 200 px over one large picture, which jumps by 90 px: the truth is exact
    picture = cv2.resize(day[1][0][1], (640, 480), interpolation=cv2.INTER_CUBIC)
    camera = Camera(200, 200, 200.0, 200.0, 99.5, 99.5)
    tracker = Tracker(shipped[0], 0, camera, TrackerOptions(queries=200))
    at = [np.array(corner) for corner in ((100, 100), (104, 102), (190, 130), (194, 134))]
    for stamp, (x, y) in enumerate(at):
        rows = tracker.track(stamp, np.ascontiguousarray(picture[y:y + 200, x:x + 200]))
        for reference in rows.ref_stamp.unique().tolist():
            mine = rows.ref_stamp == reference
            truth = rows.ref_uv[mine] - torch.from_numpy(at[stamp] - at[reference])
            seen = ((truth > 4) & (truth < 195)).all(-1)
            assert ((rows.uv[mine] - truth).norm(dim=-1) < 2)[seen].float().mean() > 0.9
            assert seen.sum() > (40 if reference < 2 <= stamp else 120)


def test_points_are_expected_where_their_pace_takes_them(shipped, day):
    picture = cv2.resize(day[1][0][1], (640, 480), interpolation=cv2.INTER_CUBIC)
    camera = Camera(200, 200, 200.0, 200.0, 99.5, 99.5)
    tracker = Tracker(shipped[0], 0, camera, TrackerOptions(queries=200, parallax=0.5))
    # 160 px/s, from images that do not come at one rate
    times = [0.0, 0.05, 0.1, 0.2, 0.25]
    for time in times[:-1]:
        x = 100 + round(160 * time)
        tracker.track(round(1e9 * time), np.ascontiguousarray(picture[100:300, x:x + 200]))
    [keyframe] = tracker._keyframes
    expected = tracker._expected(keyframe, round(1e9 * times[-1]))
    truth = keyframe.uv - torch.tensor([160 * times[-1], 0.0])
    assert (expected - truth).norm(dim=-1).quantile(0.9) < 2


def test_what_is_probably_wrong_is_not_asked_back(matcher, day, monkeypatch):
    one, two = (encoded(matcher, day[1][k][1]) for k in (0, 3))
    queries = corners(day[1][0][1], 100)[None]
    with torch.no_grad():
        matches, distance = round_trip(matcher, one, two, queries)
        failed = matches.score < FAILED
        assert torch.equal(distance.isinf(), failed) and not failed.all()
        monkeypatch.setattr('imatching_ros.matching.tracker.FAILED', 2.0)
        forward = matcher.match(one, two, queries)
        matches, distance = round_trip(matcher, one, two, queries)
    assert distance.isinf().all() and torch.equal(matches.uv, forward.uv)


def test_after_a_reset_no_id_is_given_twice(shipped, day):
    tracker = Tracker(shipped[0], 0, day[0])
    first = [tracker.track(stamp, image) for stamp, image in day[1][:3]]
    tracker.reset()
    assert tracker.keyframes == []
    second = [tracker.track(stamp, image) for stamp, image in day[1][:3]]
    assert len(second[0]) == 0 and len(second[1]) > 100
    assert max(int(m.track.max()) for m in first[1:]) < min(int(m.track.min()) for m in second[1:])


@pytest.mark.parametrize('shape', [(240, 319), (480, 640), (320, 240), (240, 320, 3)])
def test_an_image_that_is_not_the_cameras_is_named(shipped, day, shape):
    tracker = Tracker(shipped[0], 0, day[0])
    with pytest.raises(
        ValueError, match=r'^the image is \d+x\d+.*, camera_info says 320x240; publish .*$'
    ):
        tracker.track(0, np.zeros(shape, np.uint8))
    assert len(tracker.track(1, day[1][0][1])) == 0 and tracker.keyframes == [1]


def test_dark_and_empty_images_give_no_false_rows_and_the_tracker_goes_on(shipped, day):
    camera, images = day
    black, grey = np.zeros((240, 320), np.uint8), np.full((240, 320), 128, np.uint8)
    stream = [
        black, images[0][1], images[1][1], black, grey, black, images[2][1], images[3][1],
        images[4][1],
    ]
    tracker = Tracker(shipped[0], 0, camera)
    messages = [tracker.track(k, image) for k, image in enumerate(stream)]
    for message in messages:
        assert all(value.isfinite().all() for value in tensors(message))
    assert len(messages[2]) > 300 and len(messages[-1]) > 300
    assert max(len(messages[k]) for k in (0, 1, 3, 4, 5)) < 30


def test_noise_is_not_taken_for_a_match(shipped):
    g = np.random.default_rng(0)
    tracker = Tracker(shipped[0], 0, Camera(320, 240, 256.0, 256.0, 159.5, 119.5))
    messages = [tracker.track(k, g.integers(0, 256, (240, 320), np.uint8)) for k in range(4)]
    assert max(map(len, messages)) < 0.15 * TrackerOptions.queries * TrackerOptions.references


# Weights -----------------------------------------------------------------------------------------


def same_weights(one, two):
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_weights_come_back_as_they_were_written(tmp_path, shipped, day):
    info = weights.save(tmp_path / 'new' / 'w.safetensors', shipped[0], 7, 6)
    assert (info.version, info.parent, info.family) == (7, 6, 'expectation')
    matcher, read = weights.load(tmp_path / 'new' / 'w.safetensors')
    assert read == info and same_weights(matcher, shipped[0])
    assert not matcher.training and all(p.requires_grad for p in matcher.parameters())
    assert info.sha256 == shipped[1].sha256  # of the tensors, whatever the version
    assert [p.name for p in (tmp_path / 'new').iterdir()] == ['w.safetensors']
    data, info = weights.dumps(matcher, 8, 7)
    assert weights.loads(data)[1] == info
    image = day[1][0][1]
    one, two = (encoded(m, image) for m in (matcher, shipped[0]))
    assert torch.equal(one.fine, two.fine)


def test_shipped_weights_say_what_they_are(shipped):
    assert shipped[1].version == 0 and shipped[1].family == 'expectation'
    assert weights.default_path().stat().st_size < 10e6
    # Without a configuration, as all files were once written: the family's defaults build it
    assert weights.dumps(*shipped[:1], 0, 0)[0] == weights.default_path().read_bytes()


def test_weights_say_how_their_family_builds_them():
    training = ExpectationMatcher(batch_norm=True).eval()
    data, info = weights.dumps(training, 1, 0)
    matcher, read = weights.loads(data)
    assert read == info and matcher.configuration == {'batch_norm': True}
    assert same_weights(matcher, training) and not same_weights(matcher, training.folded())
    assert training.folded().configuration == {}


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r'^.*none\.safetensors: there is no such weights file$'
    ):
        weights.load(tmp_path / 'none.safetensors')
    with pytest.raises(FileNotFoundError, match='models/roma.safetensors were not found'):
        weights.default_path('roma')


def rewritten(data, **changes):
    """Return a weights file with other metadata; None takes an entry away."""
    tensors = safetensors.torch.load(data)
    (length,) = struct.unpack('<Q', data[:8])
    metadata = {**json.loads(data[8:8 + length])['__metadata__'], **changes}
    return safetensors.torch.save(
        tensors, {name: value for name, value in metadata.items() if value is not None}
    )


def not_finite(matcher):
    broken = copy.deepcopy(matcher)
    with torch.no_grad():
        broken.log_cov[1] = torch.nan
    return weights.dumps(broken, 1, 0)[0]


def smaller(matcher):
    """Return a network of this family by name only."""
    stranger = torch.nn.Linear(3, 3)
    stranger.family, stranger.configuration = 'expectation', {}
    return weights.dumps(stranger, 1, 0)[0]


def flipped(data):
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


BAD = {
    'empty': (lambda m, data: b'', 'not a safetensors file, or cut short'),
    'foreign': (
        lambda m, data: b'PK\x03\x04 a pickle of something' * 100,
        'not a safetensors file',
    ),
    'text': (lambda m, data: b'{}', 'not a safetensors file'),
    'truncated': (lambda m, data: data[:-1000], 'cut short'),
    'half a header': (lambda m, data: data[:100], 'cut short'),
    "another project's": (
        lambda m, data: safetensors.torch.save({'a': torch.zeros(3)}),
        "family 'None'",
    ),
    'another family': (
        lambda m, data: rewritten(data, family='roma'),
        "family 'roma', this package knows expectation",
    ),
    'no version': (
        lambda m, data: rewritten(data, version=None),
        'lack version, parent or sha256',
    ),
    'version in words': (
        lambda m, data: rewritten(data, version='two'),
        'lack version, parent or sha256',
    ),
    'no configuration': (
        lambda m, data: rewritten(data, configuration='{'),
        'configuration { is none of the expectation family',
    ),
    "another's configuration": (
        lambda m, data: rewritten(data, configuration='{"layers": 9}'),
        'configuration {"layers": 9} is none of the expectation family',
    ),
    "another network's configuration": (
        lambda m, data: rewritten(data, configuration='{"batch_norm": true}'),
        'do not fit the expectation network',
    ),
    'wrong sha': (lambda m, data: rewritten(data, sha256='0' * 64), 'do not have the sha256'),
    'one bit': (lambda m, data: flipped(data), 'do not have the sha256'),
    'not finite': (lambda m, data: not_finite(m), 'some weights are not finite'),
    'another network': (lambda m, data: smaller(m), 'do not fit the expectation network'),
}


@pytest.mark.parametrize('kind', BAD)
def test_bad_weights_are_one_sentence(tmp_path, shipped, kind):
    make, says = BAD[kind]
    path = tmp_path / 'w.safetensors'
    path.write_bytes(make(shipped[0], weights.dumps(shipped[0], 1, 0)[0]))
    with pytest.raises(ValueError, match=says) as error:
        weights.load(path)
    assert str(error.value).startswith(f'{path}: ') and '\n' not in str(error.value)


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_whatever_is_damaged_the_weights_are_whole_or_refused(shipped, data):
    whole, _ = weights.dumps(shipped[0], 1, 0)
    kind = data.draw(st.sampled_from(['cut', 'flip', 'grow']))
    at = data.draw(st.one_of(st.integers(0, 3000), st.integers(0, len(whole) - 1)))
    if kind == 'cut':
        damaged = whole[:at]
    elif kind == 'flip':
        damaged = (
            whole[:at] + bytes([whole[at] ^ (1 << data.draw(st.integers(0, 7)))]) + whole[at + 1:]
        )
    else:
        damaged = whole + b'\0'
    try:
        matcher, _ = weights.loads(damaged)
    except ValueError as error:
        assert '\n' not in str(error)
    else:  # a flip within the header's blanks, or in the version's digits
        assert same_weights(matcher, shipped[0])


def test_a_write_that_is_broken_off_leaves_the_old_file(tmp_path, shipped, monkeypatch):
    path = tmp_path / 'w.safetensors'
    weights.save(path, shipped[0], 1, 0)
    before = path.read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    for step in ('fsync', 'replace'):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, killed)
            with pytest.raises(KeyboardInterrupt):
                weights.save(path, shipped[0], 2, 1)
        assert path.read_bytes() == before and weights.load(path)[1].version == 1
        assert list(tmp_path.iterdir()) == [path]


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / 'w'
    files = [bytes([k]) * size for k, size in ((1, 3_000_000), (2, 10), (3, 1_000_000))]
    weights.write(path, files[0])
    done = threading.Event()

    def keep_writing():
        for k in range(60):
            weights.write(path, files[k % 3])
        done.set()

    writer = threading.Thread(target=keep_writing)
    writer.start()
    seen = set()
    while not done.is_set():
        data = path.read_bytes()
        assert data in files
        seen.add(len(data))
    writer.join()
    assert len(seen) > 1


def test_fault_tracker_of_a_wide_lens_gives_no_row_that_its_model_cannot_place(shipped, day):
    matcher, _ = shipped
    camera, images = day
    wide = replace(camera, distortion_model='plumb_bob', distortion=(-0.9, 0.0, 0.0, 0.0, 0.0))
    corners = torch.tensor([[0.0, 0.0], [camera.width - 1.0, camera.height - 1.0]])
    assert wide.normalise(corners.double()).isnan().all(), 'the lens is meant to be wide'
    tracker = Tracker(matcher, 0, wide)
    rows = [tracker.track(stamp, image) for stamp, image in images[:3]][-1]
    assert len(rows) > 20 and rows.xy.isfinite().all()


def test_kill_tracker_that_starts_anew_gives_no_id_that_was_given_before(shipped, day):
    matcher, _ = shipped
    camera, images = day
    before, after = (
        torch.cat([tracker.track(stamp, image).track for stamp, image in part])
        for tracker, part in (
            (Tracker(matcher, 0, camera), images[:6]),
            (Tracker(matcher, 0, camera), images[6:12]),
        )
    )
    assert len(before) and len(after) and int(before.max()) < int(after.min())
