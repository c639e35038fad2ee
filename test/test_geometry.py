"""Rigid transforms against pypose; poses and triangulation on exact and on spoilt input."""

from hypothesis import given, settings
from hypothesis import strategies as st
from imatching_ros.geometry import lie, triangulation, two_view
import pypose
import pytest
import torch

FOCAL = 500.0


def random_poses(n, seed=0, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    return lie.retract(
        lie.identity(n), spread * torch.randn(n, 6, generator=g, dtype=torch.float64)
    )


def scene(views=5, points=200, seed=0, noise_px=0.0):
    """
    Return cameras along x that look at a box of points 3 to 8 away.

    They are T_world_camera, points, and xy (points, views, 2).
    """
    g = torch.Generator().manual_seed(seed)
    T = lie.identity(views)
    T[:, 0] = torch.linspace(0, 1.5, views)
    T = lie.retract(T, 0.05 * torch.randn(views, 6, generator=g, dtype=torch.float64))
    unit = torch.rand(points, 3, generator=g, dtype=torch.float64)
    p = unit * torch.tensor([5.0, 3, 5]) + torch.tensor([-2.0, -1.5, 3])
    xy, depth = triangulation.reproject(T, p[:, None])
    assert (depth > 0).all()
    return T, p, xy + noise_px / FOCAL * torch.randn(xy.shape, generator=g, dtype=torch.float64)


def angle_deg(T):
    return torch.rad2deg(2 * T[..., 3:6].norm(dim=-1).clamp_max(1).asin())


def test_transforms_are_pyposes():
    A, B = random_poses(20), random_poses(20, 1)
    p = torch.randn(20, 3, dtype=torch.float64)
    PA, PB = pypose.SE3(A), pypose.SE3(B)
    torch.testing.assert_close(lie.compose(A, B), (PA @ PB).tensor())
    torch.testing.assert_close(lie.inverse(A), PA.Inv().tensor())
    torch.testing.assert_close(lie.act(A, p), PA.Act(p))
    torch.testing.assert_close(lie.matrix(A), PA.matrix()[:, :3])


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.floats(0.0, 10.0))
def test_matrix_round_trip_and_inverse(seed, spread):
    T = random_poses(8, seed, spread)
    torch.testing.assert_close(lie.matrix(lie.from_matrix(lie.matrix(T))), lie.matrix(T))
    torch.testing.assert_close(
        lie.matrix(lie.compose(T, lie.inverse(T))), lie.matrix(lie.identity(8))
    )


def test_half_turns_survive_the_matrix():
    q = torch.cat((torch.eye(4), -torch.eye(4))).double()
    T = torch.cat((torch.zeros(8, 3).double(), q), -1)
    torch.testing.assert_close(lie.matrix(lie.from_matrix(lie.matrix(T))), lie.matrix(T))


def test_retract_acts_in_the_world():
    T = random_poses(1)[0]
    w = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    moved = lie.retract(T, torch.cat((torch.tensor([1.0, 2, 3]).double(), w)))
    torch.testing.assert_close(moved[:3], T[:3] + torch.tensor([1.0, 2, 3]).double())
    torch.testing.assert_close(
        lie.rotation(moved[3:]), pypose.so3(w).Exp().matrix() @ lie.rotation(T[3:])
    )


def test_relative_pose_with_outliers_noise_and_nan():
    T, _, xy = scene(2, 400, noise_px=0.5)
    wrong = torch.arange(400) % 3 == 0
    xy[wrong, 1] = torch.rand(int(wrong.sum()), 2, dtype=torch.float64) - 0.5
    xy[5] = torch.nan
    T_j_i, inliers = two_view.relative_pose(xy[:, 0], xy[:, 1], 2.0, FOCAL)
    want = lie.compose(lie.inverse(T[1]), T[0])
    assert angle_deg(lie.compose(T_j_i, lie.inverse(want))) < 0.3
    direction = want[:3] / want[:3].norm()
    assert torch.rad2deg((T_j_i[:3] @ direction).clamp(-1, 1).acos()) < 3
    assert (
        inliers[~wrong].float().mean() > 0.95
        and inliers[wrong].float().mean() < 0.15
        and not inliers[5]
    )


def test_absolute_pose_with_outliers_noise_and_nan():
    T, p, xy = scene(1, 300, noise_px=0.5)
    z = xy[:, 0].clone()
    wrong = torch.arange(300) % 2 == 0
    z[wrong] = torch.rand(150, 2, dtype=torch.float64) - 0.5
    z[1], p[3] = torch.nan, torch.inf
    T_camera_world, inliers = two_view.absolute_pose(p, z, 3.0, FOCAL)
    error = lie.compose(T_camera_world, T[0])
    assert angle_deg(error) < 0.2 and error[:3].norm() < 0.02
    assert inliers[~wrong].float().mean() > 0.95 and not inliers[1] and not inliers[3]


def test_too_few_points_give_none():
    _, p, xy = scene(2, 5)
    assert two_view.relative_pose(xy[:, 0], xy[:, 1], 2.0, FOCAL) is None
    assert two_view.absolute_pose(p, xy[:, 0], 2.0, FOCAL) is None
    assert (
        two_view.relative_pose(torch.full((50, 2), torch.nan), torch.zeros(50, 2), 2.0, FOCAL)
        is None
    )


def test_two_view_is_deterministic():
    _, p, xy = scene(2, 200, noise_px=1.0)
    xy[::2, 1] += 0.1
    one, two = (two_view.relative_pose(xy[:, 0], xy[:, 1], 2.0, FOCAL) for _ in range(2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    one, two = (two_view.absolute_pose(p, xy[:, 1], 2.0, FOCAL) for _ in range(2))
    assert torch.equal(one[0], two[0])


def test_triangulation_is_exact_on_exact_input():
    T, p, xy = scene()
    mask = torch.rand(xy.shape[:2]) < 0.7
    mask[:, :2] = True
    torch.testing.assert_close(triangulation.triangulate(T, xy, mask), p, rtol=1e-8, atol=1e-8)


def test_triangulation_without_two_views_or_with_parallel_rays_is_nan():
    T, _, xy = scene(3, 4)
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[0, 1:] = False
    mask[1] = False
    same = T[:1].expand(3, 7)
    assert triangulation.triangulate(T, xy, mask).isnan().all(-1).tolist() == [
        True, True, False, False,
    ]
    assert triangulation.triangulate(same, xy[:, :1].expand(4, 3, 2), mask).isnan().all()


def test_parallax_is_the_widest_angle():
    T = lie.identity(3)
    T[:, 0] = torch.tensor([0.0, 1.0, 2.0])
    xy, _ = triangulation.reproject(T, torch.tensor([[[1.0, 0, 1]]]).double())
    got = triangulation.parallax(T, xy, torch.tensor([[True, True, True]]))
    torch.testing.assert_close(torch.rad2deg(got), torch.tensor([90.0]).double())
    got = triangulation.parallax(T, xy, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(torch.rad2deg(got), torch.tensor([45.0]).double())


def test_cheirality_and_threshold_decide_the_inliers():
    T, p, xy = scene(4, 50)
    mask = torch.ones(50, 4, dtype=torch.bool)
    assert triangulation.inliers_of(p, T, xy, mask, 1e-6).all()
    behind = T[:, :3].mean(0) - (p - T[:, :3].mean(0))
    assert not triangulation.inliers_of(behind, T, xy, mask, 1e6).any()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(3, 10), st.floats(0.0, 0.35), st.floats(0.0, 0.6))
def test_robust_triangulation(seed, views, wrong, missing):
    T, p, xy = scene(views, 100, seed, noise_px=0.3)
    g = torch.Generator().manual_seed(seed + 1)
    mask = torch.rand(100, views, generator=g) >= missing
    bad = (torch.rand(100, views, generator=g) < wrong) & mask
    xy = torch.where(
        bad[..., None], xy + 0.3 * torch.randn(xy.shape, generator=g, dtype=torch.float64), xy
    )
    xy = torch.where(mask[..., None], xy, torch.nan)
    point, agree = triangulation.triangulate_robust(T, xy, mask, 2.0 / FOCAL)
    assert not (agree & ~mask).any()
    found = point.isfinite().all(-1)
    assert torch.equal(found, agree.sum(-1) >= 2)
    right = mask & ~bad
    # Three good views or more that outnumber the bad ones are found (a few of many may miss a
    # noisy one).
    sure = (right.sum(-1) >= 3) & (right.sum(-1) > bad.sum(-1))
    if sure.sum() >= 10:
        assert (agree[sure].sum(-1) >= 3).float().mean() > 0.95
        assert (agree & bad)[sure].float().sum() <= 0.1 * agree[sure].sum()
        assert (point - p).norm(dim=-1)[sure & found].median() < 0.2


@pytest.mark.parametrize('shape', [(0, 3), (4, 0)])
def test_robust_triangulation_of_nothing(shape):
    L, V = shape
    point, agree = triangulation.triangulate_robust(
        lie.identity(V), torch.zeros(L, V, 2).double(), torch.zeros(L, V, dtype=torch.bool), 0.01
    )
    assert point.shape == (L, 3) and agree.shape == (L, V) and point.isnan().all()
