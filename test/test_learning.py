"""
The upper level on rendered recordings.

Its gradient, what it learns from, and what the gate lets through.
"""

import copy
from dataclasses import replace
import itertools

import cv2
from imatching_ros.bundle.bundle import Bundle
from imatching_ros.bundle.options import BundleOptions
from imatching_ros.bundle.solver.adjust import adjust, AdjustOptions
from imatching_ros.bundle.solver.robust import Kernel
from imatching_ros.data.recording import open_recording
from imatching_ros.evaluation.matching import evaluate_matching, evaluation_pairs
from imatching_ros.geometry import lie
from imatching_ros.geometry.camera import Camera
from imatching_ros.learning import gate, sgp
from imatching_ros.learning import learner as learner_module
from imatching_ros.learning import lesson as lesson_module
from imatching_ros.learning.learner import Learner, LearnerOptions
from imatching_ros.learning.lesson import (
    encode,
    Lesson,
    make_lesson,
    match,
    objective,
    Pair,
    rematch,
    resolve,
    select,
    survivors_of,
)
from imatching_ros.learning.memory import Memory
from imatching_ros.learning.probe import known_warp_loss, make_probe, probe_error
from imatching_ros.learning.tune import tune
from imatching_ros.matching import weights
from imatching_ros.matching.expectation import ExpectationMatcher
from imatching_ros.matching.protocol import Matches
from imatching_ros.matching.tracker import Tracker, TrackerOptions
from imatching_ros.matching.warps import apply_homography
import numpy as np
import pytest
import torch

# of the recording in dim light: images that train, and the first that is measured
TRAINED, MEASURED = 56, 60
TIGHT = AdjustOptions(max_iterations=200, relative_decrease=1e-12, gradient=1e-7)


def recorded(matcher, camera, images, options=None):
    """(stamp, image, correspondences, window or None) of each image."""
    tracker, bundle = Tracker(matcher, 0, camera, options), Bundle(camera)
    events = []
    for stamp, image in images:
        correspondences = tracker.track(stamp, image)
        events.append((stamp, image, correspondences, bundle.add(correspondences).window))
    return events


@pytest.fixture(scope='module')
def events(shipped, night):
    """Return what the nodes would say of the first part of the recording in dim light."""
    return recorded(shipped[0], night[0], night[1][:TRAINED])


def teach(learner, events):
    for stamp, image, correspondences, window in events:
        learner.add_image(stamp, image)
        learner.add_correspondences(correspondences)
        if window is not None:
            learner.add_window(window)
    return learner


def taught(shipped, night, events, **options):
    return teach(Learner(*shipped, night[0], LearnerOptions(**options)), events)


def state(data):
    return weights.loads(data)[0].state_dict()


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# The gradient: equation 7 ------------------------------------------------------------------------


class InDouble(ExpectationMatcher):
    """The same network in float64, so that differences of costs are not rounding."""

    def __init__(self, matcher):
        super().__init__()
        self.load_state_dict(matcher.state_dict())
        self.double()

    def encode(self, images):
        return super().encode(images.double())


class Upper:
    """
    A window solved tightly for what the network says, and both levels over its fixed survivors.

    Queries, covariances and survivors are held: they are constants of equation 3 on both levels.
    """

    def __init__(self, matcher, lesson, kernel):
        self.matcher, self.kernel = InDouble(matcher), kernel
        self.options = BundleOptions(prune_px=2.0, adjust=replace(TIGHT, kernel=kernel))
        lesson = replace(lesson, messages=[
            replace(m, uv=m.uv.double(), cov=m.cov.double(), score=m.score.double())
            for m in lesson.messages
        ])  # fmt: skip
        lesson = rematch(self.matcher, lesson)
        camera = lesson.camera
        lesson = replace(
            lesson, messages=[replace(m, xy=camera.normalise(m.uv)) for m in lesson.messages]
        )
        self.lesson = resolve(lesson, self.options)
        self.survivors = survivors_of(self.lesson, self.options.prune_px)

    def matches(self, matcher=None):
        return match(matcher or self.matcher, self.lesson, self.lesson.pairs)

    def cost(self, uv, kernel=None, resolved=True):
        """
        Return the objective of all survivors, at T*, p* of these matches.

        The pairs' rows are at the matches ``uv``.
        """
        posed = self.survivors.problem
        xy = posed.xy.clone()
        for pair, found in zip(self.lesson.pairs, uv, strict=True):
            place, mine = self.survivors.of(pair)
            xy[place] = self.lesson.camera.normalise(found[mine])
        posed = replace(posed, xy=xy)
        if resolved:
            solution = adjust(posed, self.options.adjust)
            assert solution.converged
            posed = replace(posed, T_world_camera=solution.T_world_camera, points=solution.points)
        return posed.cost(kernel or self.kernel).item()

    def difference(self, moved, step, **how):
        """Central difference of the cost; ``moved(x)`` are the matches x along some direction."""
        with torch.no_grad():
            return (self.cost(moved(step), **how) - self.cost(moved(-step), **how)) / (2 * step)

    def along(self, direction):
        """
        Return matches of the network whose parameters are moved along a direction.

        One tensor per parameter.
        """

        def moved(x):
            matcher = copy.deepcopy(self.matcher)
            for parameter, d in zip(matcher.parameters(), direction, strict=True):
                parameter.add_(x * d)
            return [m.uv[0] for m in self.matches(matcher)]

        return moved

    def gradient(self, kernel=None):
        """Equation 7 with respect to the parameters."""
        fine, _, _ = objective(
            self.lesson, self.survivors, self.lesson.pairs, self.matches(), kernel or self.kernel
        )
        gradients = torch.autograd.grad(
            fine, list(self.matcher.parameters()), materialize_grads=True
        )
        return [gradient.detach() for gradient in gradients]


def unit(direction):
    norm = torch.sqrt(sum(d.square().sum() for d in direction))
    return [d / norm for d in direction]


def random_direction(matcher, seed):
    """Each parameter moves about as much as it is large."""
    g = torch.Generator().manual_seed(seed)
    return unit([
        p.detach().abs().mean() * torch.randn(p.shape, generator=g, dtype=p.dtype)
        for p in matcher.parameters()
    ])  # fmt: skip


def inner(a, b):
    return sum((x * y).sum() for x, y in zip(a, b, strict=True)).item()


@pytest.fixture(scope='module')
def small_lesson(shipped, night):
    """Return a window of few tracks, in which noise makes the kernel matter."""
    camera, images = night
    events = recorded(shipped[0], camera, images[:40], TrackerOptions(queries=150))
    window = [e[3] for e in events if e[3]][-1]
    lesson = make_lesson(
        window, {e[0]: e[2] for e in events}, {e[0]: torch.tensor(e[1])[None] for e in events},
        camera,
    )
    assert len(window.stamps) > 4 and len(lesson.pairs) > 5
    return lesson


@pytest.fixture(
    scope='module', params=[Kernel(), Kernel('cauchy', 1.5)], ids=lambda kernel: kernel.name
)
def upper(request, shipped, small_lesson):
    return Upper(shipped[0], small_lesson, request.param)


def test_the_objective_is_the_bundles_own(upper):
    # At the matches that the bundle solved for, the learner's sum is the part of the bundle's cost
    # that rows make.
    fine, _, rows = objective(
        upper.lesson, upper.survivors, upper.lesson.pairs, upper.matches(), upper.kernel
    )
    places = torch.cat([upper.survivors.of(pair)[0] for pair in upper.lesson.pairs])
    mask = torch.zeros(len(upper.survivors.observed), dtype=torch.bool)
    mask[places] = True
    part = upper.survivors.problem.select(mask).cost(upper.kernel)
    assert rows == len(places) > 500 and len(torch.unique(places)) == rows
    assert fine.item() == pytest.approx(part.item(), rel=1e-9)
    s = upper.survivors.problem.squared()
    assert 0.02 < (s > upper.kernel.scale**2).double().mean() < 0.5  # the kernel is at work


@pytest.mark.parametrize('seed', range(3))
def test_gradient_by_the_matches_is_the_total_one(upper, seed):
    uv = [m.uv[0].detach().requires_grad_() for m in upper.matches()]
    matches = [replace(m, uv=x[None]) for m, x in zip(upper.matches(), uv, strict=True)]
    fine, _, _ = objective(
        upper.lesson, upper.survivors, upper.lesson.pairs, matches, upper.kernel
    )
    gradient = torch.autograd.grad(fine, uv)
    g = torch.Generator().manual_seed(seed)
    direction = [torch.randn(x.shape, generator=g, dtype=x.dtype) for x in uv]
    difference = upper.difference(
        lambda x: [u + x * d for u, d in zip(uv, direction, strict=True)], 1e-6
    )
    assert difference == pytest.approx(inner(gradient, direction), rel=1e-4)


def test_gradient_by_the_parameters_is_the_total_one(upper):
    # Central differences of the solved lower level: matched again, T* and p* solved again. By so
    # small steps because a match whose mode changes within one jumps.
    gradient = upper.gradient()
    for direction in (
        unit(gradient), random_direction(upper.matcher, 0), random_direction(upper.matcher, 1),
    ):
        difference = upper.difference(upper.along(direction), 1e-7)
        assert difference == pytest.approx(inner(gradient, direction), rel=1e-4)


def test_another_upper_objective_would_need_the_bundles_own_gradient(upper):
    # What shows that the tests above can fail: T* and p* do move, by enough to be seen in any
    # other objective.
    other = Kernel('geman_mcclure', 2.0)
    gradient = upper.gradient(other)
    direction = unit(gradient)
    exact = inner(gradient, direction)
    moved = upper.along(direction)
    assert upper.difference(moved, 1e-7, kernel=other, resolved=False) == pytest.approx(
        exact, rel=1e-4
    )
    assert abs(upper.difference(moved, 1e-7, kernel=other) / exact - 1) > 1e-2


def test_where_the_window_is_not_solved_the_gradient_is_not_the_total_one(upper):
    # The bundle's window as it was, and other matches since: not a stationary point, hence
    # `resolve` before a step.
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        uv = [
            m.uv[0] + 0.5 * torch.randn(m.uv[0].shape, generator=g, dtype=torch.float64)
            for m in upper.matches()
        ]
    leaves = [x.clone().requires_grad_() for x in uv]
    matches = [replace(m, uv=x[None]) for m, x in zip(upper.matches(), leaves, strict=True)]
    fine, _, _ = objective(
        upper.lesson, upper.survivors, upper.lesson.pairs, matches, upper.kernel
    )
    gradient = torch.autograd.grad(fine, leaves)
    direction = unit(gradient)
    difference = upper.difference(
        lambda x: [u + x * d for u, d in zip(uv, direction, strict=True)], 1e-5
    )
    assert abs(difference / inner(gradient, direction) - 1) > 1e-2


def test_the_covariance_gets_no_gradient_and_the_coarse_head_its_own(upper):
    fine, coarse, _ = objective(
        upper.lesson, upper.survivors, upper.lesson.pairs, upper.matches(), upper.kernel
    )
    matcher = upper.matcher
    of_fine = torch.autograd.grad(
        fine,
        [matcher.log_cov, matcher.log_scale_coarse, matcher.log_scale_fine],
        retain_graph=True,
        allow_unused=True,
    )
    assert of_fine[0] is None and of_fine[1] is None and of_fine[2].abs() > 0
    of_coarse = torch.autograd.grad(
        coarse, [matcher.log_scale_coarse, matcher.log_scale_fine], allow_unused=True
    )
    assert of_coarse[0].abs() > 0 and of_coarse[1] is None


# Lessons -----------------------------------------------------------------------------------------


def test_only_survivors_count(upper):
    lesson, survivors = upper.lesson, upper.survivors
    matches = upper.matches()
    fine, coarse, rows = objective(lesson, survivors, lesson.pairs, matches, upper.kernel)
    spoilt, pruned = [], 0
    for pair, found in zip(lesson.pairs, matches, strict=True):
        out = torch.ones(len(pair.rows), dtype=torch.bool)
        out[survivors.of(pair)[1]] = False
        pruned += int(out.sum())
        uv, coarse_uv = found.uv.clone(), found.coarse_uv.clone()
        uv[0, out], coarse_uv[0, out] = 1e4, torch.nan
        spoilt.append(replace(found, uv=uv, coarse_uv=coarse_uv))
    assert pruned > 10 and rows + pruned == sum(len(pair.rows) for pair in lesson.pairs)
    again = objective(lesson, survivors, lesson.pairs, spoilt, upper.kernel)
    assert again == (fine, coarse, rows)
    # and every survivor does count
    moved = [replace(found, uv=found.uv + 1.0) for found in matches]
    assert objective(lesson, survivors, lesson.pairs, moved, upper.kernel)[0] > fine
    # Survivors are what their name says: close to their landmark.
    residual, _ = survivors.problem.residual()
    assert residual.norm(dim=-1).max() < upper.options.prune_px


def test_a_sum_over_pairs_is_the_sum_of_pairs(upper):
    lesson, matches = upper.lesson, upper.matches()
    whole, _, rows = objective(lesson, upper.survivors, lesson.pairs, matches, upper.kernel)
    parts = [
        objective(lesson, upper.survivors, [pair], [found], upper.kernel)
        for pair, found in zip(lesson.pairs, matches, strict=True)
    ]
    assert sum(part[0] for part in parts).item() == pytest.approx(whole.item())
    assert sum(part[2] for part in parts) == rows
    assert objective(lesson, upper.survivors, [], [], upper.kernel)[2] == 0


def test_a_lesson_is_joined_by_stamp_and_complete_or_not_at_all(night, events):
    camera = night[0]
    window = [e[3] for e in events if e[3]][3]
    messages, images = (
        {e[0]: e[2] for e in events},
        {e[0]: torch.tensor(e[1])[None] for e in events},
    )
    lesson = make_lesson(window, messages, images, camera)
    for pair in lesson.pairs:
        message = lesson.messages[pair.target]
        assert pair.reference < pair.target
        assert (message.ref_stamp[pair.rows] == window.stamps[pair.reference]).all()
        assert torch.isin(message.track, window.track).all()
    assert torch.equal(lesson.images[2], images[int(window.stamps[2])])
    assert lesson.error_px().isfinite().all()
    for without in (messages, images):
        less = {stamp: value for stamp, value in without.items() if stamp != int(window.stamps[1])}
        joined = (less, images) if without is messages else (messages, less)
        assert make_lesson(window, *joined, camera) is None
    empty = {
        stamp: select(message, torch.zeros(len(message), dtype=torch.bool))
        for stamp, message in messages.items()
    }
    assert make_lesson(window, empty, images, camera) is None


def test_rematching_asks_the_same_and_resolving_settles(shipped, night, events):
    camera = night[0]
    window = [e[3] for e in events if e[3]][3]
    messages, images = (
        {e[0]: e[2] for e in events},
        {e[0]: torch.tensor(e[1])[None] for e in events},
    )
    lesson = make_lesson(window, messages, images, camera)
    again = rematch(shipped[0], lesson)
    for one, two in zip(lesson.messages, again.messages, strict=True):
        assert torch.equal(one.ref_uv, two.ref_uv) and torch.equal(one.track, two.track)
    with torch.no_grad():
        features = encode(shipped[0], lesson, lesson.pairs)
    for pair in lesson.pairs:
        # Same weights, same answer: as a match there and not back
        one, two = lesson.messages[pair.target], again.messages[pair.target]
        with torch.no_grad():
            there = shipped[0].match(
                features[pair.reference], features[pair.target], one.ref_uv[pair.rows][None]
            ).uv[0]
        close = (there - two.uv[pair.rows]).norm(dim=-1) < 1e-2
        assert close.float().mean() > 0.95
        assert (one.uv - two.uv)[pair.rows].norm(dim=-1).median() < 0.5
    solved = resolve(again, BundleOptions())
    posed = survivors_of(solved, BundleOptions().prune_px).problem
    assert adjust(posed).cost == pytest.approx(posed.cost(AdjustOptions().kernel).item(), rel=1e-5)
    # A matcher that finds nothing leaves no window.
    broken = [
        replace(m, xy=torch.rand(m.xy.shape, generator=torch.Generator().manual_seed(0)))
        for m in again.messages
    ]
    assert resolve(replace(again, messages=broken), BundleOptions(min_landmarks=100)) is None


def test_sparing_memory_changes_no_gradient(shipped, night, events, monkeypatch):
    learner = taught(shipped, night, events)
    lesson, probe, bundle = learner._train[0], learner._anchors[0], learner.bundle
    lesson = resolve(rematch(shipped[0], lesson), bundle)
    survivors = survivors_of(lesson, bundle.prune_px)

    def gradient():
        matcher, kept = copy.deepcopy(shipped[0]), []

        def keep(tensor):
            kept.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            matches = match(matcher, lesson, lesson.pairs)
            fine, coarse, rows = objective(
                lesson, survivors, lesson.pairs, matches, bundle.adjust.kernel
            )
            loss = fine / rows + coarse + known_warp_loss(matcher, probe)
        loss.backward()
        return [parameter.grad for parameter in matcher.parameters()], sum(kept)

    spared, little = gradient()
    monkeypatch.setattr(lesson_module, 'checkpoint', lambda f, *inputs, **_: f(*inputs))
    plain, much = gradient()
    for one, two in zip(spared, plain, strict=True):
        assert (one is None and two is None) or torch.equal(one, two)
    assert any(grad is not None and bool(grad.any()) for grad in plain)
    assert little < much / 10, (little, much)


# The probe ---------------------------------------------------------------------------------------


def test_the_truth_of_a_probe_is_where_the_scene_went(day):
    images = [image for _, image in day[1][::6]]
    probe = make_probe(images[1], images, 3)
    assert probe.images.shape == (2, 1, 240, 320) and len(probe.queries) == len(probe.truth) > 100
    assert torch.equal(probe.images[0, 0], torch.tensor(images[1]))
    assert (probe.truth - probe.queries).norm(dim=-1).median() > 3
    queries, truth = probe.queries.numpy(), probe.truth.numpy()
    H = cv2.findHomography(queries, truth)[0]
    assert np.abs(apply_homography(H, queries) - truth).max() < 1e-3
    # Carried back by the truth, the second image lies on the first: KLT, begun there, stays but
    # for the noise.
    one, two = probe.images[:, 0].numpy()

    def offset(H):
        back = cv2.warpPerspective(two, np.linalg.inv(H), (320, 240))
        flags = cv2.OPTFLOW_USE_INITIAL_FLOW
        found, ok, _ = cv2.calcOpticalFlowPyrLK(one, back, queries, queries.copy(),
                                                winSize=(15, 15), maxLevel=0,
                                                flags=flags)  # fmt: skip
        return np.median((found - queries)[ok.ravel() == 1], 0)

    assert np.abs(offset(H)).max() < 0.1
    assert offset(H + 0.5 * np.outer([1, 0, 0], H[2]))[0] < -0.2  # half a pixel would show
    again, other = make_probe(images[1], images, 3), make_probe(images[1], images, 4)
    assert torch.equal(probe.images, again.images) and not torch.equal(probe.images, other.images)


def test_a_probe_tells_a_good_matcher_from_a_bad_one(shipped, day):
    probe = make_probe(day[1][0][1], [image for _, image in day[1][::6]], 0)
    error = probe_error(shipped[0], probe)
    torch.manual_seed(0)
    assert error.median() < 1.0 and probe_error(ExpectationMatcher().eval(), probe).median() > 5


def test_the_noise_of_a_probe_stays_with_the_pixels():
    # A smooth scene seen by a sensor with a fixed pattern: in the warped image the pattern is
    # where it was.
    rng = np.random.default_rng(0)
    scene = cv2.GaussianBlur(rng.uniform(0, 1, (240, 320)).astype(np.float32), (0, 0), 12)
    scene = 60 + 130 * (scene - scene.min()) / np.ptp(scene)
    pattern = rng.normal(0, 8, (240, 320)).astype(np.float32)
    images = [np.clip(np.roll(scene, 20 * k, 1) + pattern + rng.normal(0, 3, scene.shape), 0,
                      255).astype(np.uint8)
              for k in range(6)]  # fmt: skip
    probe = make_probe(images[0], images, 1)
    first, second = (image[0].float().numpy() for image in probe.images)
    high = second - cv2.GaussianBlur(second, (0, 0), 5.0)
    middle = np.s_[60:180, 80:240]  # the warp leaves the corners empty
    assert np.corrcoef(high[middle].ravel(), pattern[middle].ravel())[0, 1] > 0.7
    # Carried along with the scene it would be found here:
    H = cv2.findHomography(probe.queries.numpy(), probe.truth.numpy())[0]
    carried = cv2.warpPerspective(pattern, H, (320, 240))
    inside = cv2.warpPerspective(np.ones_like(pattern), H, (320, 240)) > 0.99
    assert abs(np.corrcoef(high[inside], carried[inside])[0, 1]) < 0.1


# The learner -------------------------------------------------------------------------------------


def test_windows_become_lessons_and_one_is_held_out(shipped, night, events):
    learner = taught(shipped, night, events)
    assert learner.windows == sum_of_lessons(learner) >= 3 and learner.ready
    assert learner.version == 0 and learner.weights() == Learner(*shipped, night[0]).weights()
    windows = [e[3] for e in events if e[3]]
    assert not learner.add_window(windows[-1])  # nothing new in it
    assert learner.verdict(now=True) is None  # nothing was learned yet


def sum_of_lessons(learner):
    return len(learner._train) + len(learner._held_out)


def test_a_window_without_its_images_is_not_remembered(shipped, night, events):
    windows = [e[3] for e in events if e[3]]
    learner = Learner(*shipped, night[0])
    assert (
        not learner.add_window(windows[0])
        and learner.step() is None
        and learner.verdict(now=True) is None
    )
    for _, _, correspondences, _ in events:
        learner.add_correspondences(correspondences)
    assert not learner.add_window(windows[0]) and learner.windows == 0
    for stamp, image, _, _ in events:
        learner.add_image(stamp, image)
    assert learner.add_window(windows[0]) and learner.windows == 1


def test_what_is_disabled_takes_nothing_in(shipped, night, events):
    learner = Learner(*shipped, night[0])
    learner.enabled = False
    assert teach(learner, events).windows == 0 and learner.step() is None


def test_buffers_are_bounded(shipped, night, events):
    learner = taught(shipped, night, events, images=9, new_keyframes=1)
    assert len(learner._images) == len(learner._messages) == 9
    assert list(learner._images) == [e[0] for e in events[-9:]]  # the newest
    # Windows whose oldest image is gone are not lessons, the rest are few.
    assert learner.windows < sum(e[3] is not None for e in events)
    learner = taught(shipped, night, events, lessons=2, held_out=2, judged=3, new_keyframes=1)
    assert learner.windows > 5 and len(learner._train) == 2 and 1 <= len(learner._held_out) <= 3


def test_the_callers_image_may_change_afterwards(shipped, night, events):
    one, two = Learner(*shipped, night[0]), Learner(*shipped, night[0])
    for stamp, image, correspondences, window in events:
        buffer = image.copy()
        for learner, given in ((one, buffer), (two, image)):
            learner.add_image(stamp, given)
            learner.add_correspondences(correspondences)
            if window is not None:
                learner.add_window(window)
        buffer[:] = 0
    assert one.step().loss == two.step().loss


@pytest.fixture
def seen(monkeypatch):
    """
    Return the stamps of the images that steps train on and that the gate measures on.

    They come as they happen.
    """
    used = {'trained': set(), 'measured': set()}

    def watched(module, name):
        real = module.match

        def match(matcher, lesson, pairs, *more):
            stamps = lesson.window.stamps.tolist()
            used[name] |= {
                stamps[index] for pair in pairs for index in (pair.reference, pair.target)
            }
            return real(matcher, lesson, pairs, *more)

        monkeypatch.setattr(module, 'match', match)

    watched(learner_module, 'trained')
    watched(gate, 'measured')
    return used


def test_what_is_measured_never_trains(shipped, night, events, seen):
    # As online: windows that overlap come while the learner trains.
    learner = Learner(
        *shipped, night[0], LearnerOptions(held_out=4, new_keyframes=1, verdict_every=4)
    )
    verdicts = 0
    for event in events:
        teach(learner, [event])
        if event[3] is not None:
            for _ in range(3):
                learner.step()
                verdicts += learner.verdict() is not None
    assert verdicts >= 2 and len(seen['trained']) > 3 and len(seen['measured']) > 3
    assert not seen['trained'] & seen['measured']
    # nor do the probes' images
    trained = [
        torch.tensor(image) for stamp, image, *_ in events if stamp in seen['trained']
    ]
    probes = [probe for held in learner._held_out for probe in held.probes]
    assert probes
    for probe, image in itertools.product(probes, trained):
        assert not torch.equal(probe.images[0, 0], image)


def test_a_gradient_that_is_not_finite_is_skipped(shipped, night, events):
    learner = taught(shipped, night, events)
    assert learner.step().step == 1
    skipped = learner.skipped
    parameter = learner._candidate.log_scale_fine
    before = copy.deepcopy(learner._candidate.state_dict())
    hook = parameter.register_hook(lambda gradient: gradient * torch.nan)
    assert learner.step() is None and learner.skipped == skipped + 1 and learner.step_count == 1
    assert same(learner._candidate.state_dict(), before)
    hook.remove()
    assert learner.step().step == 2
    after = learner._candidate.state_dict()
    assert not same(after, before) and all(value.isfinite().all() for value in after.values())


@pytest.fixture(scope='module')
def promoted(worn, night, events):
    """Return a learner whose first candidate was promoted, and the verdict."""
    learner = taught(worn, night, events, verdict_every=12)
    steps = [learner.step() for _ in range(12)]
    return learner, learner.verdict(), steps


def test_what_is_learned_is_promoted_and_explains_unseen_windows_better(worn, promoted):
    learner, verdict, steps = promoted
    assert verdict.promoted and not verdict.rolled_back and verdict.step == 12
    assert verdict.version == learner.version == 1 and learner.promotions == 1
    assert verdict.figures['epipolar_px'] < 0.9 * verdict.figures['epipolar_px_before']
    assert 'better' in verdict.reason and '\n' not in verdict.reason
    matcher, info = weights.loads(learner.weights())
    assert (info.version, info.parent) == (1, 0) and not same(
        matcher.state_dict(), worn[0].state_dict()
    )
    assert [step.step for step in steps] == list(range(1, 13))
    assert all(np.isfinite(step.loss) and step.loss > 0 and step.rows > 100 for step in steps)


def test_what_is_learned_makes_matches_of_later_images_truer(worn, dusk, promoted):
    # Against depth and poses, which neither the learner nor its gate ever saw.
    recording = open_recording(dusk)
    pairs = evaluation_pairs(recording, MEASURED, len(recording) - 1, steps=(5, 10))
    before = evaluate_matching(worn[0], recording, pairs)
    after = evaluate_matching(weights.loads(promoted[0].weights())[0], recording, pairs)
    assert before.points > 1000
    assert after.mma_1px > 1.07 * before.mma_1px and after.mma_2px > 1.05 * before.mma_2px


def test_a_spoilt_candidate_is_refused_and_goes_back(shipped, night, events):
    # A learning rate a hundred times too large spoils any network.
    learner = taught(shipped, night, events, rate=0.03, verdict_every=1, patience=3)
    verdicts = []
    for _ in range(3):
        assert learner.step() is not None
        verdicts.append(learner.verdict())
        if len(verdicts) == 2:
            assert not same(learner._candidate.state_dict(), shipped[0].state_dict())
    assert [v.promoted for v in verdicts] == [False] * 3
    assert [v.rolled_back for v in verdicts] == [False, False, True]
    assert 'worse' in verdicts[0].reason and 'goes back' in verdicts[2].reason
    assert verdicts[-1].figures['probe_1px'] < verdicts[-1].figures['probe_1px_before'] - 10
    assert (learner.version, learner.rollbacks, learner.promotions) == (0, 1, 0)
    assert same(learner._candidate.state_dict(), shipped[0].state_dict())
    assert same(state(learner.weights()), shipped[0].state_dict())


def test_a_candidate_under_which_every_window_falls_apart_starts_again(shipped, night, events):
    learner = taught(
        shipped, night, events, rate=1.0, steps_per_solve=1, verdict_every=1000, lessons=1
    )
    learner.bundle = BundleOptions(min_landmarks=300)
    for _ in range(40):
        learner.step()
        if learner.rollbacks:
            break
    assert learner.rollbacks == 1 and learner.ready
    assert same(learner._candidate.state_dict(), shipped[0].state_dict())
    result = learner.step()
    assert result is not None and result.loss < 2


def test_rollback_and_reset_restore_bit_by_bit_and_the_version_grows(worn, night, events):
    learner = taught(worn, night, events, verdict_every=4, max_age=100)
    versions, kept = [learner.version], [learner.weights()]
    for _ in range(60):
        learner.step()
        verdict = learner.verdict()
        if verdict is not None and verdict.promoted:
            versions.append(learner.version)
            kept.append(learner.weights())
        if len(kept) == 3:
            break
    assert len(kept) == 3 and versions == sorted(set(versions))
    version = learner.rollback()
    assert version == versions[-1] + 1 == learner.version
    assert same(state(learner.weights()), state(kept[-2])) and not same(
        state(kept[-1]), state(kept[-2])
    )
    assert weights.loads(learner.weights())[1].version == version
    # Judged from now on against what is in use now: no better than itself.
    learner.step()
    verdict = learner.verdict(now=True)
    assert verdict.figures['epipolar_px_before'] == pytest.approx(
        measured(learner, kept[-2]), abs=1e-4
    )
    version = learner.reset()
    assert version > versions[-1] + 1 and learner.version == version
    assert same(state(learner.weights()), worn[0].state_dict())
    assert not learner.ready and learner.step() is None
    assert teach(learner, events).ready and learner.step().rows > 0


def measured(learner, data):
    """Mean epipolar error of some weights on the learner's held-out windows."""
    return float(learner._gather(weights.loads(data)[0]).epipolar.mean())


def test_rollback_without_a_past_is_the_beginning(shipped, night):
    learner = Learner(*shipped, night[0])
    assert learner.rollback() == 1 and learner.rollback() == 2
    assert same(state(learner.weights()), shipped[0].state_dict())
    assert learner.reset() == 3 and same(state(learner.weights()), shipped[0].state_dict())


def test_the_gate_decides_by_certainty():
    g = torch.Generator().manual_seed(0)

    def noise(seed, n=600):
        return torch.rand(n, generator=torch.Generator().manual_seed(seed))

    def evidence(epipolar, probe, n=600, images=600):
        errors = (
            noise(1, n) + torch.randn(n, generator=g) * 0.3 + shift for shift in (epipolar, probe)
        )
        return gate.Evidence(
            noise(1, n), *errors, *2 * [torch.arange(n) % images], torch.full((n,), 3)
        )

    assert gate.judge(evidence(-0.1, 0), evidence(0, 0.0))[0] == 1
    assert gate.judge(evidence(0.1, 0), evidence(0, 0.0))[0] == -1
    # better in the windows, worse at matching
    assert gate.judge(evidence(-0.1, 0.2), evidence(0, 0.0))[0] == -1
    assert gate.judge(evidence(0.0, 0), evidence(0, 0.0))[0] == 0
    assert gate.judge(evidence(-0.1, 0, n=3), evidence(0, 0.0, n=3))[0] == 0  # too little to tell
    # A little worse at every known warp, though as many are matched within a pixel
    better, worse = evidence(-0.1, 0), evidence(0, 0.0)
    assert (
        gate.judge(
            replace(better, probe=0.3 * noise(2) + 0.05), replace(worse, probe=0.3 * noise(2))
        )[0]
        == -1
    )
    # Points of one image err together: four images that all say so by chance are not six hundred
    # witnesses.
    shared = torch.tensor([-1.0, 1.0, -1.0, 0.6]).repeat(150)
    noisy, four = (
        replace(worse, epipolar=worse.epipolar - 0.06 + 0.1 * shared),
        torch.arange(600) % 4,
    )
    assert gate.judge(noisy, worse)[0] == 1
    assert gate.judge(replace(noisy, target=four), replace(worse, target=four))[0] == 0
    # Better in the windows with certainty, fewer known warps within a pixel, though not with
    # certainty: not yet
    probe = torch.where(torch.arange(600) < 300, 0.9, 1.3)
    fewer = probe.clone()
    fewer[:25], fewer[300:315] = 1.05, 0.95
    mark, reason, _ = gate.judge(replace(better, probe=fewer), replace(worse, probe=probe))
    assert mark == 0 and reason.startswith('1.7 points fewer of the known warps are within 1 px')
    # Better by less than a margin that matters, however certain; or better at known warps alone:
    # not a reason
    assert gate.judge(replace(worse, epipolar=worse.epipolar - 0.005), worse)[0] == 0
    assert gate.judge(replace(worse, probe=worse.probe - 0.1), worse)[0] == 0
    # Both a little better: two witnesses that agree
    little = worse.epipolar - torch.where(worse.epipolar > 0.9, 0.06, 0.01)
    assert gate.judge(replace(worse, epipolar=little), worse)[0] == 0
    agreed = replace(worse, epipolar=little, probe=worse.probe - 0.1)
    mark, reason, _ = gate.judge(agreed, worse)
    assert mark == 1 and 'known warps better by' in reason
    mark, reason, figures = gate.judge(evidence(0, 0), evidence(0, 0))
    assert mark < 1 and set(figures) >= {
        'epipolar_px', 'epipolar_px_before', 'probe_1px', 'probe_1px_before',
        'reprojection_1px', 'track_length', 'track_length_before',
    }
    assert figures['track_length'] == 3


class Identity(torch.nn.Module):
    """
    Find everything where it was.

    Between two images of one window it has no error to be learned from.
    """

    def __init__(self):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def encode(self, images):
        return images

    def match(self, reference, target, queries):
        return Matches(
            queries, queries, torch.ones(queries.shape[:2]), torch.eye(2).expand(*queries.shape, 2)
        )


def test_what_matches_everything_to_itself_is_refused(shipped, night, events):
    learner = taught(shipped, night, events)
    mark, reason, figures = gate.judge(learner._gather(Identity()), learner._gather(shipped[0]))
    assert mark == -1 and 'known warps are matched worse' in reason
    assert figures['probe_1px'] < 5 and figures['epipolar_1px'] < figures['epipolar_1px_before']


# Without bundle adjustment, to compare with: SGP -------------------------------------------------


@pytest.fixture
def sgp_learner(shipped, night, events):
    return taught(shipped, night, events, objective='sgp')


def test_epipolar_distance_is_in_pixels():
    camera = Camera(640, 480, 500.0, 500.0, 320.0, 240.0)
    T = torch.tensor([1.0, 0.2, 0.1, 0.05, -0.1, 0.02, 1.0], dtype=torch.float64)
    T = torch.cat((T[:3] / T[:3].norm(), T[3:] / T[3:].norm()))
    g = torch.Generator().manual_seed(0)
    uv_i = torch.rand(50, 2, generator=g, dtype=torch.float64) * torch.tensor([640, 480])
    rays = torch.cat((camera.normalise(uv_i), torch.ones(50, 1)), -1)
    points = lie.act(T, rays * (2 + 8 * torch.rand(50, 1, generator=g, dtype=torch.float64)))
    uv_j = camera.project(points[:, :2] / points[:, 2:])
    assert sgp.epipolar_distance(camera, T, uv_i, uv_j).max() < 1e-9
    # Along its line a point may lie anywhere, off it every pixel counts.
    further = lie.act(T, rays * 12.0)
    along = camera.project(further[:, :2] / further[:, 2:]) - uv_j
    along = along / along.norm(dim=-1, keepdim=True)
    across = torch.stack((-along[:, 1], along[:, 0]), -1)
    assert sgp.epipolar_distance(camera, T, uv_i, uv_j + 3 * along).max() < 1e-6
    assert sgp.epipolar_distance(camera, T, uv_i, uv_j + 3 * across).sub(3).abs().max() < 1e-6


def test_the_teacher_finds_the_true_poses_and_believes_no_noise(shipped, dusk, sgp_learner):
    recording = open_recording(dusk)
    stamps, poses = recording.ground_truth
    lesson = sgp_learner._train[0]
    labels = sgp.teach(shipped[0], lesson, lesson.pairs)
    assert len(labels.T) >= len(lesson.pairs) / 2
    rotation, direction = [], []
    for (i, j), T in labels.T.items():
        true_i, true_j = (
            poses[(stamps == lesson.window.stamps[k]).nonzero().item()] for k in (i, j)
        )
        truth = lie.compose(lie.inverse(true_j), true_i)
        rotation.append(
            2 * torch.acos((T[3:] * truth[3:]).sum().abs().clamp(max=1)).rad2deg().item()
        )
        direction.append(
            torch.acos((T[:3] @ truth[:3] / truth[:3].norm()).clamp(-1, 1)).rad2deg().item()
        )
    assert np.median(rotation) < 1.0 and np.median(direction) < 20.0
    noise = torch.randint(0, 255, (2, 1, 240, 320), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    pair = Pair(0, 1, torch.arange(5))
    empty = Lesson(lesson.camera, list(noise), lesson.messages, lesson.window, [pair])
    assert sgp.teach(shipped[0], empty, [pair]).T == {}
    assert sgp.student_loss(shipped[0], empty, sgp.Labels({}, {}), [pair])[1] == 0


def test_the_student_comes_closer_to_the_teacher(sgp_learner):
    lesson = sgp_learner._train[0]
    labels = sgp.teach(sgp_learner._candidate, lesson, lesson.pairs)
    pairs = labels.labelled(lesson.pairs)[:2]
    optimiser = torch.optim.Adam(sgp_learner._candidate.parameters(), lr=2e-4)
    losses = []
    for _ in range(6):
        loss, rows = sgp.student_loss(sgp_learner._candidate, lesson, labels, pairs)
        losses.append(loss.item() / rows)
        optimiser.zero_grad()
        (loss / rows).backward()
        optimiser.step()
    assert rows > 100 and losses[-1] < 0.95 * losses[0]


def test_it_is_an_objective_of_the_same_trainer(shipped, night, events, sgp_learner):
    other = taught(shipped, night, events)
    assert sgp_learner.windows == other.windows and sgp_learner.weights() == other.weights()
    for one, two in zip(sgp_learner._train, other._train, strict=True):
        assert all(map(torch.equal, one.images, two.images))
    before = sgp_learner._candidate.log_scale_fine.item()
    step = sgp_learner.step()
    assert step.step == 1 and step.rows > 100 and np.isfinite(step.loss)
    assert sgp_learner._candidate.log_scale_fine.item() != before
    verdict = sgp_learner.verdict(now=True)
    assert {'epipolar_px', 'probe_px'} <= verdict.figures.keys()


# Limits and memory -------------------------------------------------------------------------------


def test_memory_is_of_all_times():
    memory = Memory(8)
    for item in range(100):
        memory.add(item)
        assert item in memory and len(memory) == min(item + 1, 8)
    kept = list(memory)
    assert kept[0] == 0 and kept[-4:] == [96, 97, 98, 99]
    assert max(b - a for a, b in zip(kept, kept[1:], strict=False)) < 60
    for most in (1, 2, 3):
        few = Memory(most)
        for item in range(10):
            few.add(item)
        assert len(few) == most and few[most - 1] == 9


def test_windows_of_old_weights_are_dropped_and_counted(shipped, night, events):
    learner = Learner(*shipped, night[0], LearnerOptions(max_age=1))
    learner._use(shipped[0], parent=0)
    assert teach(learner, events).windows > 0 and learner.stale == 0  # one version old
    learner = Learner(*shipped, night[0], LearnerOptions(max_age=1))
    for version in range(2):
        learner._use(shipped[0], parent=version)
    windows = sum(e[3] is not None for e in events)
    assert teach(learner, events).windows == 0 and 3 <= learner.stale <= windows


def test_duty_is_the_share_of_time_that_steps_take(shipped, night, events, monkeypatch):
    learner = taught(shipped, night, events, duty=0.25)
    assert learner.rest() == 0
    now = [100.0]
    monkeypatch.setattr(learner_module.time, 'monotonic', lambda: now[0])
    real = learner_module.match

    def slow(*arguments):
        now[0] += 2.0
        return real(*arguments)

    monkeypatch.setattr(learner_module, 'match', slow)
    assert learner.step().seconds == pytest.approx(2.0)
    assert learner.rest() == pytest.approx(6.0)  # two of eight seconds are a quarter
    now[0] += 5.0
    assert learner.rest() == pytest.approx(1.0)
    now[0] += 5.0
    assert learner.rest() == 0
    for wrong in ({'duty': 0.0}, {'duty': 1.5}, {'objective': 'luck'}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LearnerOptions(**wrong)


# Tuning a recording ------------------------------------------------------------------------------


def test_a_tune_that_was_interrupted_goes_on_to_the_same_bits(
    shipped, night, tmp_path, monkeypatch
):
    monkeypatch.setattr('imatching_ros.learning.tune.VALIDATION', 0.0)
    camera, images = night
    options = LearnerOptions(verdict_every=6, steps_per_solve=2, seed=3)

    told = []

    def run(folder, on_step=lambda *_: None):
        recordings = [(camera, images[:TRAINED])]
        return tune(
            *shipped, recordings, 8, epochs=2, options=options, folder=folder, on_step=on_step,
            on_frame=lambda done, total: told.append((done, total)),
        )

    whole, all_of_it = run(tmp_path / 'whole')
    assert told[-1] == (2 * TRAINED, 2 * TRAINED) and len(told) == 2 * TRAINED

    def interrupt(at):
        def on_step(learner, step, verdict):
            if learner.step_count == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / 'parts', on_step)

    interrupt(7)  # in the second epoch, after a checkpoint at 6
    resumed, parts = run(tmp_path / 'parts')
    assert parts.resumed == 6 and all_of_it.resumed == 0 and parts.refused == []
    assert resumed.weights() == whole.weights() and resumed.step_count == whole.step_count == 8
    for one, two in zip(resumed.state()[0].values(), whole.state()[0].values(), strict=True):
        assert torch.equal(one, two)
    assert [(s.step, s.loss) for s in parts.steps] == [(s.step, s.loss) for s in all_of_it.steps]
    assert [v.figures for v in parts.verdicts] == [v.figures for v in all_of_it.verdicts]
    # What another call has left is not mixed with this one.
    with pytest.raises(ValueError, match='parts was left by a run with other images or options'):
        tune(*shipped, [(camera, images[:TRAINED])], 9, options=options, folder=tmp_path / 'parts')


def test_the_last_images_judge_and_the_gate_may_end_it(shipped, night, seen, monkeypatch):
    monkeypatch.setattr('imatching_ros.learning.tune.PATIENCE', 2)
    monkeypatch.setattr('imatching_ros.learning.tune.VALIDATION', 0.4)
    camera, images = night
    options = LearnerOptions(rate=1e-8, verdict_every=1)  # it learns nothing
    told = []
    learner, history = tune(
        *shipped, [(camera, images)], 50, epochs=1, options=options,
        on_frame=lambda done, total: told.append((done, total)),
    )
    assert told[0] == (1, 75) and told[-1] == (75, 75)  # 80 less the gap
    assert (
        learner.step_count == 2
        and len(history.verdicts) == 2
        and '2 verdicts in a row' in history.stopped
    )
    stamps = [stamp for stamp, _ in images]
    assert (
        max(map(stamps.index, seen['trained'])) < 48 - 5
        and min(map(stamps.index, seen['measured'])) >= 48
    )


def test_tuning_twice_gives_the_same_bits(shipped, night):
    camera, images = night
    options = LearnerOptions(verdict_every=3, seed=3)
    (one, first), (two, second) = (
        tune(*shipped, [(camera, images[:TRAINED])], 3, epochs=1, options=options)
        for _ in range(2)
    )
    assert one.weights() == two.weights() and one.step_count == 3 and len(first.verdicts) == 1
    assert same(one._candidate.state_dict(), two._candidate.state_dict())
    assert [(s.step, s.loss, s.rows) for s in first.steps] == [
        (s.step, s.loss, s.rows) for s in second.steps
    ]
    assert [v.figures for v in first.verdicts] == [v.figures for v in second.verdicts]


def test_a_recording_that_teaches_nothing_is_named(shipped, night):
    camera, images = night
    still = [(stamp, images[0][1]) for stamp, _ in images[:12]]
    for frames, count in ((images[:12], r'\d'), (still, '0'), ([], '0')):
        with pytest.raises(
            ValueError, match=rf'^the recordings gave {count} solved windows, too few .*$'
        ):
            tune(*shipped, [(camera, frames)], 5)
