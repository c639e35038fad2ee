"""What is compiled for single images and tracks says what plain torch says."""

from dataclasses import replace
import math

from imatching_ros.bundle import motion
from imatching_ros.bundle.compiled import ready
from imatching_ros.bundle.observations import observations
from imatching_ros.bundle.options import BundleOptions
from imatching_ros.bundle.registration import refine, register
from imatching_ros.bundle.solve import _Solver
from imatching_ros.bundle.solver.adjust import (
    AdjustOptions,
    array,
    compiled,
)
from imatching_ros.bundle.solver.problem import problem
from imatching_ros.bundle.solver.robust import Kernel, KERNELS
from imatching_ros.geometry import lie, triangulation, two_view
from imatching_ros.geometry.camera import Camera
from imatching_ros.geometry.correspondences import Correspondences
import pytest
import torch

pytestmark = pytest.mark.skipif(not compiled(), reason='numba is not installed')
# far corners cannot be undistorted
CAMERA = Camera(300, 300, 200.0, 200.0, 20.0, 20.0, 'plumb_bob', (-0.3, 0.1, 0.0, 0.0, 0.0))
FOCAL = torch.tensor([500.0, 520.0], dtype=torch.float64)


def scene(seed, poses=9, landmarks=300, twice=True):
    """
    Noisy observations of random points, some far, a tenth of them wrong, some rows twice.

    In random order.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    T = lie.retract(
        lie.identity(poses), torch.cat((0.3 * normal(poses, 3), 0.1 * normal(poses, 3)), -1)
    )
    p = normal(landmarks, 3) * torch.tensor([1.5, 1.0, 0.5]) + torch.tensor([0, 0, 4.0])
    p[::5] *= 30  # without parallax
    xy, depth = triangulation.reproject(T, p[:, None])
    xy = xy + normal(*xy.shape) / 500
    wrong = torch.rand(landmarks, poses, generator=g) < 0.1
    xy[wrong] += 0.1 * normal(int(wrong.sum()), 2)
    seen = (torch.rand(landmarks, poses, generator=g) < 0.6) & (depth > 0)
    landmark, pose = seen.nonzero().unbind(-1)
    again = torch.arange(0, len(pose), 7)
    rows = torch.sort(torch.cat((torch.arange(len(pose)), again)), stable=True).values
    landmark, pose = landmark[rows], pose[rows]
    xy = xy[landmark, pose] + 0.3 * normal(len(rows), 2) / 500
    cov = torch.stack(
        (
            1 + normal(len(rows)).square(), 0.3 * normal(len(rows)).tanh(),
            1 + normal(len(rows)) ** 2,
        ),
        -1,
    )
    return T, p, problem(T, p, pose, landmark, xy, cov, FOCAL)


@pytest.mark.parametrize('name', KERNELS)
@pytest.mark.parametrize('seed', range(3))
def test_registration(name, seed):
    T, p, posed = scene(seed)
    rows = posed.select(posed.pose == 1)
    points = p[rows.landmark]
    guess = lie.retract(
        T[1], torch.tensor([0.02, -0.03, 0.01, 0.01, -0.01, 0.02], dtype=torch.float64)
    )
    same = points.clone()
    same[:3, 2] = -1.0  # behind
    both = [
        refine(guess, same, rows.xy, rows.cov, FOCAL, Kernel(name), backend=b)
        for b in ('eager', 'cpu')
    ]
    torch.testing.assert_close(*both, rtol=1e-7, atol=1e-9)
    for begin in (guess, None):
        both = [
            register(
                points, rows.xy, rows.cov, FOCAL, begin, AdjustOptions(Kernel(name), backend=b),
                3.0,
            )
            for b in ('eager', 'cpu')
        ]
        torch.testing.assert_close(
            both[0].T_world_camera, both[1].T_world_camera, rtol=1e-7, atol=1e-9
        )
        assert (
            torch.equal(both[0].inliers, both[1].inliers) and both[0].inliers.float().mean() > 0.5
        )


def solver(posed, T, start, backend):
    options = BundleOptions(adjust=AdjustOptions(backend=backend))
    return _Solver(replace(posed, T_world_camera=T), start, float(FOCAL.mean()), options, 6)


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('known', ['nothing', 'half', 'all'])
def test_triangulation_and_survivors(seed, known):
    T, p, posed = scene(seed)
    start = p.clone()
    if known != 'all':
        start[:: 1 if known == 'nothing' else 2] = torch.nan
    plain, tracks = solver(posed, T, start, 'eager'), ready('tracks', 'cpu')
    plain.dropped[:5] = True
    plain._triangulate(3.0)
    rows = [array(column) for column in (posed.pose, posed.landmark, posed.xy)]
    points = tracks.triangulate(array(T), array(start), *rows, 3.0 / float(FOCAL.mean()))
    torch.testing.assert_close(
        torch.from_numpy(points), plain.points, rtol=1e-6, atol=1e-9, equal_nan=True
    )
    plain.kept = plain._survivors(3.0)
    usable = (plain.points.isfinite().all(-1) & ~plain.dropped).numpy()
    bound = math.cos(math.radians(plain.options.min_parallax_deg))
    kept, alive = tracks.survivors(array(T), points, usable, *rows, *FOCAL.tolist(), 3.0, bound)
    assert torch.equal(torch.from_numpy(kept), plain.kept) and alive == plain.alive
    assert not kept[posed.landmark < 5].any() and 0.3 < kept.mean() < 0.95


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('held', [False, True])
def test_rounds_of_prune_and_adjust(seed, held):
    T, p, posed = scene(seed)
    g = torch.Generator().manual_seed(seed)
    T = lie.retract(T, 0.01 * torch.randn(len(T), 6, generator=g, dtype=torch.float64))
    p[::3] = torch.nan
    both = [solver(posed, T, p, backend) for backend in ('eager', 'cpu')]
    for one in both:
        one.held = torch.ones(len(T), dtype=torch.bool) if held else None
        assert one.adjust(9.0, once=True) and one.adjust(3.0)
    assert torch.equal(both[0].kept, both[1].kept)
    assert torch.equal(both[0].dropped, both[1].dropped)
    torch.testing.assert_close(both[0].T, both[1].T, rtol=0, atol=1e-5)
    assert both[0].solution.converged and both[1].solution.converged
    assert both[0].solution.cost == pytest.approx(both[1].solution.cost, rel=1e-6)
    assert bool((both[1].T - T).abs().max() < 1e-12) == held
    for one in both:
        one.options = replace(one.options, min_landmarks=1000)
        assert not one.adjust(3.0)


@pytest.mark.parametrize('seed', range(6))
def test_observations(seed):
    """Of messages in any order, with rows that say nothing, and tracks that are there twice."""
    g = torch.Generator().manual_seed(seed)
    messages = []
    for stamp in torch.randperm(9, generator=g).tolist():
        n = int(torch.randint(0, 80, (1,), generator=g))
        uv, ref_uv = (300 * torch.rand(n, 2, generator=g) for _ in range(2))
        cov = torch.tensor([1.0, 0.2, 1.0]).repeat(n, 1)
        uv[::11], ref_uv[::7], cov[::13, 0] = torch.nan, torch.inf, -1.0
        ref = torch.randint(-2, max(stamp, 1), (n,), generator=g)
        track = torch.randint(0, 40, (n,), generator=g)
        xy = CAMERA.normalise(uv)
        messages.append(Correspondences(stamp, uv, xy, ref, ref_uv, track, 0 * cov[:, 0], cov, 0))
    found, expected = (observations(messages, CAMERA, backend) for backend in ('cpu', 'eager'))
    for name, column in vars(expected).items():
        assert torch.equal(getattr(found, name), column), name
    assert (found.row < 0).any() and (found.row >= 0).any()
    assert len(observations([messages[0]] * 0, CAMERA, 'cpu')) == 0


@pytest.mark.parametrize('size', [0, 1, 2, 3, 10, 500])
@pytest.mark.parametrize('angle', [0.0, 0.01, 0.3])
def test_a_turn(size, angle):
    g = torch.Generator().manual_seed(size)
    axis = torch.tensor([0.0, 0, 0, 0.3, 1.0, -0.5], dtype=torch.float64)
    T = lie.retract(lie.identity(), angle * axis)
    p = torch.randn(size, 3, generator=g, dtype=torch.float64) + torch.tensor([0, 0, 5.0])
    xy_i, xy_j = triangulation.reproject(lie.identity(), p)[0], triangulation.reproject(T, p)[0]
    xy_j = xy_j + 1e-3 * torch.randn(size, 2, generator=g, dtype=torch.float64)
    xy_j[::4] += 0.05 * (size > 3)
    pair = motion.Pair(0, xy_i, xy_j, torch.ones(size, dtype=torch.float64))
    found, expected = (motion._turn(pair, 6e-3, backend) for backend in ('cpu', 'eager'))
    if size < 2:
        assert found is expected is None
    else:
        torch.testing.assert_close(
            lie.rotation(found[3:]), lie.rotation(expected[3:]), rtol=0, atol=1e-9
        )
        error = two_view.transfer_error(lie.rotation(found[3:]), xy_i, xy_j)
        assert size < 10 or (error < 6e-3).double().mean() > 0.6
