"""The first map, from nothing but correspondences (paper 3.1.2, map initialisation)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from .motion import motion_of, MOVING, Pair
from .observations import observations, pose_problem
from .options import BundleOptions
from .registration import register
from .solve import Grid, solve
from .window import Window
from ..geometry import lie, triangulation, two_view
from ..geometry.camera import Camera
from ..geometry.correspondences import Correspondences

_ANCHORS_TRIED = 4
_MIN_PARALLAX_PX = 2.0  #: of an anchor pair, below which no depth can be measured
_AT_ONCE = 200_000  #: tracks by pairs of keyframes whose parallax is computed at once


def initialise(
    messages: Sequence[Correspondences], camera: Camera, options: BundleOptions
) -> Window | None:
    """
    Return a first window from buffered keyframes.

    messages: of the keyframes, oldest first. Returns the solved window of all that could be posed,
    the oldest at the origin and the median landmark at distance 1, or None: too little parallax so
    far, or no consistent map.
    """
    if len(messages) < 3:
        return None
    stamps = torch.tensor([message.stamp for message in messages])
    observed = observations(messages, camera, options.adjust.backend)
    track = torch.unique(observed.track)
    zeros = torch.zeros(len(track), 3, dtype=torch.float64)
    _, posed = pose_problem(observed, stamps, lie.identity(len(stamps)), track, zeros, camera)
    grid = Grid.of(posed)
    best = None
    for i, j in _anchors(grid, camera.focal, options):
        motions = _motions(grid, i, j, camera.focal, options)
        grown = [
            one for T_j_i in motions if (one := _grow(grid, i, j, T_j_i, posed.focal, options))
        ]
        if not grown:
            continue
        # A plane's two motions agree on its two views: the others tell which it was.
        which, T, points = max(
            grown, key=lambda one: (len(one[0]), int(one[2].isfinite().all(-1).sum()))
        )
        solved = solve([messages[k] for k in which], T, track, points, camera, options)
        if solved is None:
            continue
        window = solved[0]
        if len(window.track) < 5 * options.min_landmarks:
            continue
        quality = (len(which), int(window.observations.sum()))
        if best is None or quality > best[0]:
            best = quality, window
        if len(which) == len(messages):
            break
    return best and _at_origin(best[1])


def _anchors(grid: Grid, focal: float, options: BundleOptions) -> list[tuple[int, int]]:
    """
    Return the pairs worth trying as anchor, most promising first.

    They have many correspondences with much parallax.
    """
    pairs = list(combinations(range(grid.mask.shape[1]), 2))
    count, parallax = _parallax(grid, torch.tensor(pairs))
    count, parallax = count.tolist(), (parallax * focal).tolist()
    scored = [
        (n * px, pair) for n, px, pair in zip(count, parallax, pairs, strict=True)
        if n >= 2 * options.min_landmarks and px >= _MIN_PARALLAX_PX
    ]
    return [pair for _, pair in sorted(scored, reverse=True)[:_ANCHORS_TRIED]]


def _parallax(grid: Grid, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """
    Return how many tracks pairs (P, 2) of keyframes share, and how far these moved.

    That is the median (plane z = 1) beyond what a turn of the camera explains; the turn is found
    by a few rounds of reweighted least squares (Kabsch 1976).
    """
    xy = grid.xy.transpose(0, 1)  # (K, N, 2)
    ray = torch.nn.functional.normalize(torch.cat((xy, torch.ones_like(xy[..., :1])), -1), dim=-1)
    counts, medians = [], []
    for i, j in (some.T for some in pairs.split(max(1, _AT_ONCE // len(grid.mask)))):
        common = (grid.mask[:, i] & grid.mask[:, j]).T  # (P, N)
        a, b = ray[i], ray[j]
        weight = common.double()
        for _ in range(4):
            U, _, Vt = torch.linalg.svd((weight[..., None] * b).mT @ a)
            last = torch.diag_embed(
                torch.stack((*[torch.ones(len(U)).to(U)] * 2, torch.det(U @ Vt).sign()), -1)
            )
            moved = a @ (U @ last @ Vt).mT
            distance = (moved[..., :2] / moved[..., 2:].clamp_min(1e-6) - xy[j]).norm(dim=-1)
            distance = torch.where(common, distance, torch.nan)
            median = distance.nanmedian(-1, keepdim=True).values
            weight = torch.where(
                common, (1 + (distance / median.clamp_min(1e-9)).square()).pow(-2), 0.0
            ).nan_to_num()
        counts.append(common.sum(-1))
        medians.append(median.squeeze(-1).nan_to_num())
    return torch.cat(counts), torch.cat(medians)


def _motions(grid: Grid, i: int, j: int, focal: float, options: BundleOptions) -> list[Tensor]:
    """
    Return what T_j_i (7,) of an anchor pair may be.

    The list is empty where it only turned, and else ends with the one by the essential matrix,
    before which stand a plane's two where that explains the points better: of rotation,
    homography and essential matrix the one with the least GRIC (Torr 1999) does.
    """
    common = grid.mask[:, i] & grid.mask[:, j]
    xy_i, xy_j = grid.xy[common, i], grid.xy[common, j]
    found = two_view.relative_pose(xy_i, xy_j, options.prune_px / 2, focal)
    if found is None or int(found[1].sum()) < 0.5 * int(common.sum()):
        return []
    variance = grid.variance[common, i] + grid.variance[common, j]
    pair = Pair(i, xy_i, xy_j, variance)
    if motion_of(pair, focal, found[0], options.prune_px, options.min_landmarks)[0] != MOVING:
        return []
    H = two_view.homography(xy_i, xy_j, options.prune_px, focal)
    if H is None:
        return [found[0]]
    error = two_view.transfer_error(H, xy_i, xy_j) * focal
    sampson = two_view.sampson_error(found[0], xy_i, xy_j) * focal
    # Here claimed variances, where too large, would turn every scene into a plane: the general
    # model's own residuals say how exact the points are (the median of chi-squared with one degree
    # of freedom is 0.455).
    variance = variance * (2 * sampson.square() / variance).median().div(0.455).clamp(1e-4, 1.0)
    plane = two_view.gric(error.square() / variance, dimension=2, parameters=8)
    general = two_view.gric(2 * sampson.square() / variance, dimension=3, parameters=5)
    if general <= plane:
        return [found[0]]
    agree = error < options.prune_px
    return [*two_view.homography_motions(H, xy_i[agree], xy_j[agree]), found[0]]


def _grow(
    grid: Grid, i: int, j: int, T_j_i: Tensor, focal: Tensor, options: BundleOptions
) -> tuple[list[int], Tensor, Tensor] | None:
    """
    Pose all keyframes that can be, beginning with the anchor pair.

    Returns which these are (ascending), their T_world_camera (len, 7), and points (N, 3), NaN
    where there is none; or None where there are too few.
    """
    mean_focal = float(focal.mean())
    poses = {i: lie.identity(), j: lie.inverse(T_j_i)}
    points = _triangulate(grid, poses, mean_focal, options)
    if int(points.isfinite().all(-1).sum()) < 2 * options.min_landmarks:
        return None
    cov = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    remaining = set(range(grid.mask.shape[1])) - {i, j}
    while remaining:
        landmark = points.isfinite().all(-1)
        seen = {k: int((landmark & grid.mask[:, k]).sum()) for k in remaining}
        k = max(remaining, key=lambda k: (seen[k], -k))
        remaining.remove(k)
        usable = landmark & grid.mask[:, k]
        result = register(
            points[usable], grid.xy[usable, k], cov.expand(int(usable.sum()), 3), focal, None,
            options.adjust, options.prune_px,
        )
        if result is None or int(result.inliers.sum()) < max(
            options.min_landmarks, 0.3 * int(usable.sum())
        ):
            continue
        poses[k] = result.T_world_camera
        points = _triangulate(grid, poses, mean_focal, options)
    # Two views agree on many a wrong motion (a plane's second solution, a small baseline): a third
    # must confirm.
    if len(poses) < 3:
        return None
    which = sorted(poses)
    return which, torch.stack([poses[k] for k in which]), points


def _triangulate(
    grid: Grid, poses: dict[int, Tensor], focal: float, options: BundleOptions
) -> Tensor:
    """Return points (N, 3) of tracks that posed keyframes see with parallax; NaN elsewhere."""
    which = sorted(poses)
    T = torch.stack([poses[k] for k in which])
    points, agree = triangulation.triangulate_robust(
        T, grid.xy[:, which], grid.mask[:, which], options.prune_px / focal
    )
    wide = triangulation.parallax(T, grid.xy[:, which], agree).rad2deg() > options.min_parallax_deg
    return torch.where(wide[:, None], points, torch.nan)


def _at_origin(window: Window) -> Window:
    """Return the window with its oldest keyframe at the origin and its median landmark 1 away."""
    window = window.moved(lie.inverse(window.T_world_camera[0]))
    scale = 1 / float(window.points.norm(dim=-1).median())
    return window.enlarged(scale, window.T_world_camera[0, :3])
