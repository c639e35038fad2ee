"""The gradient of the upper level, equation 7, against differences of solved problems."""

import copy
from dataclasses import replace
import random

from imatching_ros.bundle.options import BundleOptions
from imatching_ros.bundle.solver.adjust import adjust, AdjustOptions
from imatching_ros.bundle.solver.robust import Kernel
from imatching_ros.learning.corners import with_corners
from imatching_ros.learning.lesson import (
    encode,
    make_lesson,
    match,
    objective,
    rematch,
    resolve,
    survivors_of,
)
from imatching_ros.matching.families.expectation import ExpectationMatcher
from imatching_ros.matching.tracker import TrackerOptions
from lessons import recorded
import pytest
import torch

TIGHT = AdjustOptions(max_iterations=200, relative_decrease=1e-12, gradient=1e-7)


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
        ])
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
        """
        Return the central difference of the cost along a direction.

        ``moved(x)`` are the matches x along it.
        """
        with torch.no_grad():
            return (self.cost(moved(step), **how) - self.cost(moved(-step), **how)) / (2 * step)

    def along(self, direction):
        """
        Return the matches of the network with its parameters moved along a direction.

        The direction has one tensor for each parameter.
        """

        def moved(x):
            matcher = copy.deepcopy(self.matcher)
            for parameter, d in zip(matcher.parameters(), direction, strict=True):
                parameter.add_(x * d)
            return [m.uv[0] for m in self.matches(matcher)]

        return moved

    def gradient(self, kernel=None):
        """Return the gradient of equation 7 with respect to the parameters."""
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
    """Return a direction in which each parameter moves about as much as it is large."""
    g = torch.Generator().manual_seed(seed)
    return unit([
        p.detach().abs().mean() * torch.randn(p.shape, generator=g, dtype=p.dtype)
        for p in matcher.parameters()
    ])


def inner(a, b):
    return sum((x * y).sum() for x, y in zip(a, b, strict=True)).item()


@pytest.fixture(scope='module')
def small_lesson(shipped, night):
    """Return a window of few tracks and new corners, in which noise makes the kernel matter."""
    camera, images = night
    events = recorded(shipped[0], camera, images[:40], TrackerOptions(queries=150))
    window = [e[3] for e in events if e[3]][-1]
    lesson = make_lesson(
        window, {e[0]: e[2] for e in events}, {e[0]: torch.tensor(e[1])[None] for e in events},
        camera,
    )
    assert len(window.stamps) > 4 and len(lesson.pairs) > 5
    with torch.no_grad():
        features = encode(shipped[0], lesson, lesson.pairs)
    more = with_corners(shipped[0], lesson, lesson.pairs, features, random.Random(0), count=50)
    assert len(more.pairs) > len(lesson.pairs) + len(window.stamps)
    return more


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
