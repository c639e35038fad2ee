"""
What leaves the window stays as a prior.

Against the batch solution, and what it says of its own certainty.
"""

from dataclasses import replace

from imatching_ros.bundle.prior import left_behind
from imatching_ros.bundle.registration import refine
from imatching_ros.bundle.solver.adjust import adjust, AdjustOptions, compiled
from imatching_ros.bundle.solver.covariance import covariance
from imatching_ros.bundle.solver.problem import problem
from imatching_ros.bundle.solver.robust import Kernel
from imatching_ros.bundle.solver.system import System
from imatching_ros.geometry import lie, triangulation
import numpy as np
import pytest
from scipy.stats import chi2
from test_adjust import EXACT, FOCAL, window
import torch

NONE = Kernel('none')
BACKENDS = [
    'eager',
    pytest.param('cpu', marks=pytest.mark.skipif(not compiled(), reason='numba is not installed')),
]


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solved(posed, kernel=NONE, fixed=None, backend='auto'):
    solution = adjust(posed, AdjustOptions(kernel, **EXACT, backend=backend), fixed)
    assert solution.converged
    return replace(posed, T_world_camera=solution.T_world_camera, points=solution.points)


def batch(seed=0):
    """
    Return a solved window of which one half of the landmarks is not seen by pose 0.

    And which half is.
    """
    posed, *_ = window(6, 60, seed, noise_px=0.5, missing=0.3)
    old = torch.arange(60) < 30
    return solved(posed.select(old[posed.landmark] | (posed.pose > 0))), old


def without_pose_0(posed, prior, keep):
    """Return what is left of the window, in its own numbering."""
    rest = posed.select(keep)
    stamps = torch.arange(1, len(posed.T_world_camera))
    return replace(
        rest, pose=rest.pose - 1, T_world_camera=rest.T_world_camera[1:],
        prior=prior and prior.on(stamps),
    )


def leave(posed, landmarks, kernel=NONE):
    poses = torch.arange(len(posed.T_world_camera)) == 0
    return left_behind(posed, kernel, torch.arange(len(poses)), poses, landmarks)


def hessian(posed):
    """Of the poses, landmarks eliminated."""
    system = System(posed, NONE, torch.arange(6 * len(posed.T_world_camera)), torch.float64)
    system.linearise(system.evaluate(*system.start()), False)
    return system.reduce(0.0)[0]


def similarities(T):
    """(6 P, 7): the world moved, turned and enlarged."""
    c, eye = T[:, :3], torch.eye(3, dtype=torch.float64)
    N = torch.zeros(len(T), 6, 7, dtype=torch.float64)
    N[:, :3, :3] = N[:, 3:, 3:6] = eye
    for axis in range(3):
        N[:, :3, 3 + axis] = torch.linalg.cross(eye[axis].expand_as(c), c)
    N[:, :3, 6] = c
    return N.view(-1, 7)


def held_like(T, T_held):
    """T (P, 7) with the first pose and the scale where ``adjust`` will hold them, as in T_held."""
    T = torch.cat((T_held[:1], T[1:]))
    offset = T[:, :3] - T[0, :3]
    farthest = int(offset.norm(dim=-1).argmax())
    component = int(offset[farthest].abs().argmax())
    T[farthest, component] = T_held[farthest, component]
    return T


@pytest.mark.parametrize('backend', BACKENDS)
def test_the_poses_that_stay_do_not_notice(backend):
    """
    The paper's batch problem and its sequel without pose 0.

    The same minimiser, the same Hessian.
    """
    posed, old = batch()
    prior = leave(posed, old)
    rest = without_pose_0(posed, prior, ~old[posed.landmark])
    best = rest.T_world_camera
    T = held_like(lie.retract(best, 0.02 * normal(1, 5, 6)), best)
    points = rest.points + 0.02 * normal(2, *rest.points.shape)
    start = replace(rest, T_world_camera=T, points=points)
    torch.testing.assert_close(
        solved(start, backend=backend).T_world_camera, best, rtol=0, atol=1e-8
    )
    without = solved(replace(start, prior=None), backend=backend)
    assert (without.T_world_camera - best).abs().max() > 1e-3

    # Pose 0 eliminated by hand.
    H = hessian(posed)
    want = H[6:, 6:] - H[6:, :6] @ torch.linalg.solve(H[:6, :6], H[:6, 6:])
    torch.testing.assert_close(hessian(rest), want, rtol=0, atol=1e-12 * float(want.max()))


def test_poses_of_an_earlier_prior_leave_like_others():
    """Two leave at once, or one after the other: nothing is different."""
    posed, _ = batch(1)
    pose = torch.arange(6)
    first = posed.landmark[posed.pose == 0].unique()
    second = posed.landmark[posed.pose == 1].unique()
    gone = [torch.isin(torch.arange(60), which) for which in (first, torch.cat((first, second)))]
    both = left_behind(posed, NONE, pose, pose < 2, gone[1])
    prior = left_behind(posed, NONE, pose, pose < 1, gone[0])
    rest = without_pose_0(posed, prior, ~gone[0][posed.landmark])
    again = left_behind(rest, NONE, pose[1:], pose[1:] < 2, gone[1])
    assert torch.equal(again.stamps, both.stamps) and len(both.stamps) == 4
    size = float(both.information.max())
    torch.testing.assert_close(again.information, both.information, rtol=0, atol=1e-11 * size)
    torch.testing.assert_close(again.gradient, both.gradient, rtol=0, atol=1e-7)


@pytest.mark.parametrize('kernel', [NONE, Kernel(), Kernel('geman_mcclure')])
def test_a_prior_knows_nothing_of_where_and_how_large_the_world_is(kernel):
    posed, *_ = window(6, 60, 2, outliers=0.2, disturb=0.005)
    shift = torch.tensor([3.0, -2, 5], dtype=torch.float64)
    c, q = posed.T_world_camera.split((3, 4), -1)
    posed = replace(
        posed, T_world_camera=torch.cat((c + shift, q), -1), points=posed.points + shift
    )
    posed = solved(posed, kernel)
    for _ in range(2):  # then with the prior, whose linearisation point is behind
        prior = leave(posed, torch.arange(60) % 3 == 0, kernel)
        H, N = prior.information, similarities(prior.T_world_camera)
        size = float(H.diagonal().max())
        assert (H @ N).abs().max() < 1e-12 * size and (prior.gradient @ N).abs().max() < 1e-7
        assert torch.equal(H, H.T) and torch.linalg.eigvalsh(H)[0] > -1e-14 * size
        assert (torch.linalg.eigvalsh(H) > 1e-9 * size).sum() >= 23  # 30 less 7
        posed = replace(posed, prior=prior.on(torch.arange(6)))
        posed = solved(posed.select(posed.landmark % 3 != 0), kernel)


def test_a_prior_moves_with_the_world():
    posed, old = batch(2)
    prior = leave(posed, old)
    T = torch.cat((prior.T_world_camera[:1], posed.T_world_camera[1:]))[torch.arange(5)]
    T = lie.retract(posed.T_world_camera[1:], 0.3 * normal(3, 5, 6))
    G = lie.retract(
        lie.identity(), torch.tensor([1.0, -2, 3, 0.4, -1.5, 0.7], dtype=torch.float64)
    )
    scale = 2.5
    centre = T[2, :3]
    enlarged = torch.cat((centre + scale * (T[:, :3] - centre), T[:, 3:]), -1)
    stamps = torch.arange(1, 6)
    for moved, poses in (
        (prior.moved(G), lie.compose(G, T)),
        (prior.enlarged(scale, centre), enlarged),
        (prior.enlarged(scale, centre).moved(G), lie.compose(G, enlarged)),
    ):
        torch.testing.assert_close(
            moved.on(stamps).cost(poses), prior.on(stamps).cost(T), rtol=1e-11, atol=0
        )


def test_gradient_is_that_of_the_cost():
    """Also far from where it was linearised, where Log is no longer its argument."""
    posed, old = batch()
    prior = leave(posed, old).on(torch.arange(6))
    T = lie.retract(posed.T_world_camera, 0.8 * normal(4, 6, 6))
    step = torch.zeros(6, 6, dtype=torch.float64, requires_grad=True)
    (want,) = torch.autograd.grad(prior.cost(lie.retract(T, step)), step)
    _, gradient = prior.linearise(T)
    torch.testing.assert_close(gradient, want[prior.pose].flatten(), rtol=1e-9, atol=1e-6)
    assert prior.cost(T) > 0 and not want[0].any()
    # The least a quadratic can cost is nothing.
    assert prior.constant >= 0 and 0 <= prior.cost(posed.T_world_camera) <= 2 * prior.constant


def test_local_undoes_retract():
    T, delta = lie.retract(lie.identity(200), normal(5, 200, 6)), normal(6, 200, 6)
    delta[:20, 3:] *= 1e-9
    delta[20] = 0
    delta[:, 3:] *= (3.1 / delta[:, 3:].norm(dim=-1, keepdim=True)).clamp_max(1.0)
    torch.testing.assert_close(lie.local(T, lie.retract(T, delta)), delta, rtol=0, atol=1e-14)


def test_back_ends_agree_under_a_prior():
    if not compiled():
        pytest.skip('numba is not installed')
    posed, *_ = window(9, 150, 1, outliers=0.2, missing=0.5)
    posed = solved(posed, Kernel())
    prior = leave(posed, torch.arange(150) < 60, Kernel())
    # three to five rows in each pose
    few = posed.select((posed.landmark >= 60) & (posed.landmark < 70))
    few = replace(few, T_world_camera=lie.retract(few.T_world_camera, 0.03 * normal(1, 9, 6)))
    few = without_pose_0(few, prior, few.pose > 0)
    for steps in (0, 1, 4, 100):
        one, two, same = (
            adjust(few, AdjustOptions(max_iterations=steps, backend=backend))
            for backend in ('eager', 'cpu', 'cpu')
        )
        assert torch.equal(two.T_world_camera, same.T_world_camera) and torch.equal(
            two.points, same.points
        )
        assert one.iterations == two.iterations and one.converged == two.converged == (
            steps == 100
        )
        assert two.cost == pytest.approx(one.cost, rel=1e-5 if steps else 1e-12)
        assert two.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-3, abs=1e-5)
        torch.testing.assert_close(two.T_world_camera, one.T_world_camera, rtol=0, atol=1e-5)
    after = replace(few, T_world_camera=two.T_world_camera, points=two.points)
    assert float(after.cost(Kernel())) == pytest.approx(two.cost, rel=1e-9)


def test_nothing_known_is_no_prior():
    posed, old = batch()
    assert leave(posed, torch.zeros(60, dtype=torch.bool)) is None
    once = posed.select((posed.landmark == 0).cumsum(0) == 1)  # one landmark, seen once
    assert leave(once, torch.ones(60, dtype=torch.bool)) is None
    # A pose that nothing saw leaves an earlier prior as it is.
    prior = leave(posed, old)
    blind = replace(
        posed, prior=prior.on(torch.arange(6)), pose=torch.where(posed.pose == 0, 1, posed.pose)
    )
    again = leave(blind, torch.zeros(60, dtype=torch.bool))
    size = float(prior.information.max())
    torch.testing.assert_close(again.information, prior.information, rtol=0, atol=1e-11 * size)
    with pytest.raises(ValueError, match='a keyframe that is not in the window'):
        prior.on(torch.arange(3))


@pytest.mark.parametrize('backend', BACKENDS)
def test_two_landmarks_leave_little_and_nothing_infinite(backend):
    posed, *_ = window(4, 40, 3, missing=0.0)
    posed = solved(posed)
    prior = leave(posed, torch.arange(40) < 2)
    assert prior.information.isfinite().all() and prior.gradient.isfinite().all()
    rest = without_pose_0(posed, prior, (posed.pose > 0) & (posed.landmark >= 2))
    assert adjust(rest, AdjustOptions(NONE, backend=backend)).converged


def path(keyframes=30, landmarks=900, seed=0, noise_px=0.5, view=0.2):
    """
    Return a long path whose landmarks come and go.

    True poses, true points, and observations of half a pixel's noise.
    """
    T = lie.identity(keyframes)
    T[:, 0] = 0.4 * torch.arange(keyframes)
    T = lie.retract(T, 0.03 * normal(seed, keyframes, 6))
    g = torch.Generator().manual_seed(seed)
    size = torch.tensor([0.4 * keyframes + 3, 3.0, 4.0], dtype=torch.float64)
    p = torch.rand(landmarks, 3, generator=g, dtype=torch.float64) * size + torch.tensor(
        [-1.5, -1.5, 3.0]
    )
    xy, _ = triangulation.reproject(T, p[:, None])
    seen = (xy.abs() < torch.tensor([view, 0.4])).all(-1)
    xy = xy + noise_px / FOCAL * normal(seed + 1, *xy.shape)
    landmark, pose = (seen & (seen.sum(-1, keepdim=True) > 2)).nonzero().unbind(-1)
    cov = (noise_px**2 * torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)).expand(len(pose), 3)
    return T, p, problem(T, p, pose, landmark, xy[landmark, pose], cov, FOCAL)


def slide(T_true, p_true, posed, size, with_prior):
    """Return the poses (K, 7) as they were when they left a window of ``size``."""
    K = len(T_true)
    T, points = T_true[:size], p_true
    known = torch.zeros(len(p_true), dtype=torch.bool)
    alive = torch.ones(len(posed.pose), dtype=torch.bool)
    prior, final = None, torch.empty(K, 7, dtype=torch.float64)
    for end in range(size, K + 1):
        begin = end - size
        rows = posed.select(alive & (posed.pose >= begin) & (posed.pose < end))
        stamps = torch.arange(begin, end)
        # Landmarks not yet known: where the newest camera would see them.
        newest = lie.act(T[-1], lie.act(lie.inverse(T_true[end - 1]), p_true))
        rows = replace(
            rows, pose=rows.pose - begin, T_world_camera=T,
            points=torch.where(known[:, None], points, newest),
            prior=prior and prior.on(stamps),
        )
        solution = adjust(rows, AdjustOptions(**EXACT))
        rows = replace(rows, T_world_camera=solution.T_world_camera, points=solution.points)
        points = solution.points
        known[rows.landmark] = True
        final[begin:end] = solution.T_world_camera
        if end < K:
            gone = torch.zeros_like(known).index_fill_(0, rows.landmark[rows.pose == 0], True)
            gone[rows.landmark[rows.pose == size - 1]] = False
            if with_prior:
                prior = left_behind(rows, Kernel(), stamps, stamps == begin, gone)
                alive &= ~gone[posed.landmark]
            T = solution.T_world_camera
            ahead = lie.compose(T[-1], lie.compose(lie.inverse(T_true[end - 1]), T_true[end]))
            # Its length must be that of the landmarks: the truth's scale must not come in through
            # the gauge.
            new = posed.select((posed.pose == end) & known[posed.landmark])
            ahead = refine(ahead, points[new.landmark], new.xy, new.cov, FOCAL, NONE)
            T = torch.cat((T[1:], ahead[None]))
    return final


def drift(T, T_true):
    """
    By how much the path's scale differs between its first and its last quarter.

    As a logarithm.
    """
    n = len(T) // 4

    def length(T, part):
        return (T[part, :3] - T[part, :3].mean(0)).norm()

    ends = [length(T, part) / length(T_true, part) for part in (slice(n), slice(-n, None))]
    return abs(float((ends[1] / ends[0]).log()))


def error(T, T_other):
    """RMS distance (m) of the camera centres after the best similarity transform."""
    a, b = T[:, :3] - T[:, :3].mean(0), T_other[:, :3] - T_other[:, :3].mean(0)
    U, S, Vh = torch.linalg.svd(b.T @ a)
    sign = torch.tensor(
        [1.0, 1.0, float(torch.sign(torch.linalg.det(U @ Vh)))], dtype=torch.float64
    )
    scale = (S * sign).sum() / a.square().sum()
    return float((scale * a @ (U * sign @ Vh).T - b).square().sum(-1).mean().sqrt())


@pytest.mark.skipif(not compiled(), reason='a few hundred windows take plain torch too long')
def test_a_sliding_window_knows_what_it_has_seen():
    """Thirty keyframes through a window of eight, and of six with few and noisy landmarks."""
    off, wander = torch.zeros(6, 2), torch.zeros(6, 2)
    for seed in range(6):
        T, p, posed = path(seed=seed)
        best = adjust(posed, AdjustOptions(**EXACT)).T_world_camera
        for which in (0, 1):
            off[seed, which] = error(slide(T, p, posed, 8, which == 1)[-8:], best[-8:])
        T, p, posed = path(seed=seed, landmarks=600, noise_px=1.0)
        for which in (0, 1):
            wander[seed, which] = drift(slide(T, p, posed, 6, which == 1), T)
    # RMS without prior and with it. The newest window's shape against the batch's: 2.0 mm and 0.2
    # mm.
    without, within = off.square().mean(0).sqrt()
    assert within < 0.2 * without and within < 5e-4
    # The scale's drift over the path: 18 % and 4 % (the batch's own, 6 %).
    without, within = wander.square().mean(0).sqrt()
    assert within < 0.5 * without


@pytest.mark.parametrize('kernel', [NONE, Kernel('huber', 2.0)])
def test_covariance_is_that_of_many_solves(kernel):
    """Normalised estimation error squared of 300 solves, noise as the observations state it."""
    trials = 300
    posed, T, p = window(5, 60, noise_px=0.0, disturb=0.0, missing=0.1)
    uu, uv, vv = (0.25 * posed.cov).unbind(-1)
    half = torch.linalg.cholesky(torch.stack((uu, uv, uv, vv), -1).unflatten(-1, (2, 2)))
    posed = replace(posed, T_world_camera=T, points=p, cov=0.25 * posed.cov)
    exact, _ = triangulation.reproject(T[posed.pose], p[posed.landmark])
    nees, off = torch.zeros(5, dtype=torch.float64), []
    for trial in range(trials):
        noise = (half @ normal(trial, len(exact), 2, 1)).squeeze(-1)
        one = solved(replace(posed, xy=exact + noise / FOCAL), kernel)
        C = covariance(one, kernel)
        delta = lie.local(T, one.T_world_camera)
        off.append(delta)
        nees += (
            delta
            * (torch.linalg.pinv(C, hermitian=True, rtol=1e-9) @ delta[..., None]).squeeze(-1)
        ).sum(-1)
    freedoms = np.array([0, 6, 6, 6, 5])  # pose 0 is held, and one component of the farthest
    low, high = chi2.ppf(np.array([[5e-4], [1 - 5e-4]]), np.maximum(1, freedoms * trials))
    assert nees[0] == 0 and not C[0].any()
    for k in range(1, 5):
        assert low[k] < float(nees[k]) < high[k], (
            f'pose {k}: {float(nees[k]) / trials:.3f} of {freedoms[k]}'
        )
    # And deviations, one by one.
    ratio = torch.stack(off).std(0)[1:] / C.diagonal(dim1=1, dim2=2).sqrt()[1:]
    assert ((ratio[ratio.isfinite()] - 1).abs() < 0.2).all()


@pytest.mark.parametrize('kernel', [NONE, Kernel('cauchy')])
def test_covariance_with_prior_and_held_poses(kernel):
    """Both back ends, and by hand: the inverse of the whole system."""
    posed, *_ = window(6, 60, 1, outliers=0.1)
    posed = solved(posed, kernel)
    prior = leave(posed, torch.arange(60) < 20, kernel)
    rest = without_pose_0(posed, prior, (posed.pose > 0) & (posed.landmark >= 20))
    fixed = torch.tensor([True, False, True, False, False])
    eager = covariance(rest, kernel, fixed, 'eager')
    assert not eager[fixed].any()
    if compiled():
        fast = covariance(rest, kernel, fixed)  # its Jacobian is rounded to single precision
        torch.testing.assert_close(fast, eager, rtol=0, atol=1e-4 * float(eager.max()))

    def whitened(x):
        at = replace(
            rest, T_world_camera=lie.retract(rest.T_world_camera, x[:30].view(5, 6)),
            points=rest.points + x[30:].view(-1, 3),
        )
        uu, uv, vv = rest.cov.unbind(-1)
        half = torch.linalg.cholesky(torch.stack((uu, uv, uv, vv), -1).unflatten(-1, (2, 2)))
        return torch.linalg.solve_triangular(
            half, at.residual()[0][..., None], upper=False
        ).squeeze(-1)

    J = torch.func.jacfwd(whitened)(torch.zeros(30 + 180, dtype=torch.float64))
    H = torch.einsum('oai,o,oaj->ij', J, kernel.weight(rest.squared()), J)
    H[:30, :30] += prior.information
    free = torch.cat((~fixed.repeat_interleave(6), (H.diagonal() > 0)[30:]))
    want = torch.zeros_like(H)
    want[free.nonzero(), free.nonzero().T] = torch.linalg.inv(H[free][:, free])
    for k in range(5):
        block = slice(6 * k, 6 * k + 6)
        torch.testing.assert_close(
            eager[k], want[block, block], rtol=1e-5, atol=1e-6 * float(want[:30, :30].max())
        )


@pytest.mark.parametrize('backend', BACKENDS)
def test_a_pose_that_nothing_sees_has_a_large_and_finite_covariance(backend):
    posed, *_ = window(5, 40)
    posed = solved(posed, Kernel())
    posed = posed.select(posed.pose != 3)
    C = covariance(posed, Kernel(), backend=backend)
    assert C.isfinite().all() and (C[3].diagonal() > 1e6).all() and C[1].diagonal().max() < 1
    assert torch.equal(C, covariance(posed, Kernel(), backend=backend))
    everything = torch.ones(5, dtype=torch.bool)
    assert not covariance(posed, Kernel(), everything, backend).any()
    # It stays where it is, and does not keep the others from their optimum.
    solution = adjust(posed, AdjustOptions(backend=backend))
    assert solution.converged
    torch.testing.assert_close(
        solution.T_world_camera[3], posed.T_world_camera[3], rtol=0, atol=1e-15
    )
