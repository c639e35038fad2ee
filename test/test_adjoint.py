"""The gradients of both levels (equations 4, 7) against differences of solved problems."""

from dataclasses import replace
import importlib.util
from pathlib import Path
import sys

from imatching_ros.bundle.solver.adjust import adjust, AdjustOptions
from imatching_ros.bundle.solver.problem import PosePrior, Problem, problem
from imatching_ros.bundle.solver.robust import Kernel
from imatching_ros.geometry import lie, triangulation
from imatching_ros.learning.adjoint import optimum
import pytest
import torch

KERNELS = (
    Kernel('none', 1.0), Kernel('huber', 1.5), Kernel('cauchy', 2.0), Kernel('geman_mcclure', 3.0),
)
FOCAL = 400.0


def benchmark():
    path = Path(__file__).resolve().parents[1] / 'benchmarks' / 'gradient.py'
    spec = importlib.util.spec_from_file_location('gradient', path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def window(kernel: Kernel) -> Problem:
    """
    Return four cameras and forty points at the optimum, for 0.7 px of noise.

    A tenth of the noise is three times as large.
    """
    g = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    T = lie.identity(4)
    T[:, 0] = 0.5 * torch.arange(4)
    T = lie.retract(T, 0.05 * normal(4, 6))
    p = torch.rand(40, 3, generator=g, dtype=torch.float64) * torch.tensor([3.0, 2.0, 4.0])
    p = p + torch.tensor([-0.8, -1.0, 3.0])
    landmark, pose = (
        x.reshape(-1) for x in torch.meshgrid(torch.arange(40), torch.arange(4), indexing='ij')
    )
    xy, _ = triangulation.reproject(T[pose], p[landmark])
    spread = torch.where(torch.rand(len(xy), 1, generator=g) < 0.1, 2.1, 0.7)
    xy = xy + spread / FOCAL * normal(len(xy), 2)
    cov = torch.stack(
        (0.5 + torch.rand(len(xy), generator=g), 0.1 * normal(len(xy)), torch.ones(len(xy))), -1
    )
    posed = problem(T, p, pose, landmark, xy, cov, torch.tensor([FOCAL, 1.1 * FOCAL]))
    return solved(posed, kernel)


def solved(posed: Problem, kernel: Kernel) -> Problem:
    options = AdjustOptions(
        kernel, max_iterations=300, relative_decrease=1e-14, gradient=1e-9, backend='eager'
    )
    found = adjust(posed, options)
    assert found.gradient_norm < 1e-7
    return replace(posed, T_world_camera=found.T_world_camera, points=found.points)


def other(posed: Problem) -> torch.Tensor:
    """Return a loss that the bundle does not minimise: of poses, points and residuals."""
    g = torch.Generator().manual_seed(5)
    said = torch.randn(4, 3, generator=g, dtype=torch.float64)
    poses = (posed.T_world_camera[:, :3] - said).square().sum() + posed.T_world_camera[2, 4]
    return (
        poses
        + posed.points[::3].sin().sum()
        + 1e-2 * (posed.residual()[0].square() + 1).sqrt().sum()
    )


def direction(posed: Problem, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(posed.xy.shape, generator=g, dtype=torch.float64) / FOCAL


def difference(
    posed: Problem, kernel: Kernel, loss, along: torch.Tensor, step: float = 1e-3
) -> float:
    """Return the central difference of the loss, with T* and p* solved again."""
    values = [
        loss(solved(replace(posed, xy=posed.xy + x * along), kernel)).item() for x in (step, -step)
    ]
    return (values[0] - values[1]) / (2 * step)


@pytest.fixture(scope='module', params=KERNELS, ids=lambda kernel: kernel.name)
def case(request):
    return request.param, window(request.param)


def by_matches(loss, posed: Problem, state) -> torch.Tensor:
    xy = posed.xy.clone().requires_grad_()
    posed = replace(posed, xy=xy)
    T, points = state(posed)
    (gradient,) = torch.autograd.grad(loss(replace(posed, T_world_camera=T, points=points)), xy)
    return gradient


def test_one_step_is_the_total_gradient_of_the_bundles_own_objective(case):
    kernel, posed = case
    gradient = by_matches(lambda p: p.cost(kernel), posed, lambda p: (p.T_world_camera, p.points))
    for seed in range(2):
        along = direction(posed, seed)
        expected = difference(posed, kernel, lambda p: p.cost(kernel), along)
        assert (gradient * along).sum().item() == pytest.approx(expected, rel=1e-5)


def test_the_adjoint_gives_the_total_gradient_of_any_objective(case):
    kernel, posed = case
    total = by_matches(other, posed, lambda p: optimum(p, kernel))
    partial = by_matches(other, posed, lambda p: (p.T_world_camera, p.points))
    for seed in range(2):
        along = direction(posed, seed)
        expected = difference(posed, kernel, other, along)
        assert (total * along).sum().item() == pytest.approx(expected, rel=1e-3)
        # what is left out without it
        assert abs((partial * along).sum().item() / expected - 1) > 0.1
    # and where both levels have one objective it adds nothing
    own = [by_matches(lambda p: p.cost(kernel), posed, state) for state in
           (lambda p: optimum(p, kernel), lambda p: (p.T_world_camera, p.points))]
    assert (own[0] - own[1]).norm() < 1e-6 * own[1].norm()


def test_unrolling_comes_to_the_same(case):
    kernel, posed = case
    unrolled = benchmark().unrolled
    start = replace(posed, points=posed.points + 1e-3)
    for loss in (other, lambda p: p.cost(kernel)):
        total = by_matches(loss, posed, lambda p: optimum(p, kernel))
        twenty = by_matches(loss, start, lambda p: unrolled(p, kernel, 20))
        few = by_matches(loss, start, lambda p: unrolled(p, kernel, 2))
        assert (twenty - total).norm() < 0.02 * total.norm()
        assert (twenty - total).norm() < 0.5 * (few - total).norm()


def test_the_gauss_newton_system_repairs_most_of_it(case):
    kernel, posed = case
    exact = by_matches(other, posed, lambda p: optimum(p, kernel))
    partial = by_matches(other, posed, lambda p: (p.T_world_camera, p.points))
    close = by_matches(other, posed, lambda p: optimum(p, kernel, exact=False))
    assert (close - exact).norm() < 0.5 * (partial - exact).norm()


def test_a_degenerate_bundle_has_no_gradient(case):
    kernel, posed = case
    unseen = posed.select(posed.pose != 3)
    with pytest.raises(ValueError, match='singular at its optimum'):
        by_matches(other, unseen, lambda p: optimum(p, kernel))


def test_a_pose_prior_belongs_to_both_levels_or_needs_the_adjoint(case):
    # The bundle minimises matches and prior together. Together they need nothing more; the matches
    # alone do.
    kernel, posed = case
    g = torch.Generator().manual_seed(2)
    root = 300 * torch.randn(12, 12, generator=g, dtype=torch.float64)
    T = lie.retract(
        posed.T_world_camera[[1, 3]], 0.01 * torch.randn(2, 6, generator=g, dtype=torch.float64)
    )
    prior = PosePrior(
        torch.tensor([1, 3]), T, root @ root.T, torch.zeros(12).double(), torch.zeros(()).double()
    )
    posed = solved(replace(posed, prior=prior), kernel)
    along = direction(posed, 0)

    def both(p):
        return p.cost(kernel)

    def matches(p):
        return replace(p, prior=None).cost(kernel)

    held = [
        by_matches(loss, posed, lambda p: (p.T_world_camera, p.points)) for loss in (both, matches)
    ]
    moved = by_matches(matches, posed, lambda p: optimum(p, kernel))
    exact = difference(posed, kernel, matches, along)
    assert (held[0] * along).sum().item() == pytest.approx(
        difference(posed, kernel, both, along), rel=1e-4
    )
    assert (moved * along).sum().item() == pytest.approx(exact, rel=2e-3)
    assert abs((held[1] * along).sum().item() / exact - 1) > 0.02


def test_landmarks_without_observations_and_poses_that_are_held_do_not_move(case):
    kernel, posed = case
    keep = posed.landmark != 7
    less = solved(posed.select(keep), kernel)
    total = by_matches(other, less, lambda p: optimum(p, kernel))
    assert total.isfinite().all()
    fixed = torch.tensor([True, True, False, False])

    def held(p):
        return (p.T_world_camera[:2, :3] * 3).sum()

    assert by_matches(held, less, lambda p: optimum(p, kernel, fixed)).abs().max() == 0
