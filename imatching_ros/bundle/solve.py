"""One window solved: triangulate, adjust, prune, re-triangulate, and adjust last (paper 3.1.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
import math

import torch
from torch import Tensor

from .compiled import ready
from .observations import index_of, observations, survives
from .options import BundleOptions
from .prior import Prior
from .solver.adjust import adjust, array, Solution
from .solver.problem import Problem
from .window import Window
from ..geometry import triangulation
from ..geometry.camera import Camera
from ..geometry.correspondences import Correspondences

#: before the first adjustment the newest pose is only predicted: prune at this many times the
#: bound
_LOOSE = 3.0
#: cells of landmarks by pairs of keyframes whose parallax is computed at once
_AT_ONCE = 8_000_000
#: of prune and adjust, before landmarks whose observations come and go are dropped altogether
_ROUNDS = 6
#: the same over all keyframes of a recording: the more observations, the more come and go
_ROUNDS_BATCH = 25


@dataclass(frozen=True)
class Grid:
    """One observation of each track in each keyframe (the latest row's), for triangulation."""

    xy: Tensor  #: (N, K, 2)
    mask: Tensor  #: (N, K) bool
    variance: Tensor  #: (N, K) of one coordinate, px^2

    @classmethod
    def of(cls, posed: Problem) -> Grid:
        N, K = len(posed.points), len(posed.T_world_camera)
        xy, mask = torch.zeros(N, K, 2, dtype=torch.float64), torch.zeros(N, K, dtype=torch.bool)
        cell = posed.landmark * K + posed.pose
        last = torch.full((N * K,), -1, dtype=torch.int64)
        last.scatter_reduce_(0, cell, torch.arange(len(cell)), 'amax')
        filled = last >= 0
        xy.view(-1, 2)[filled] = posed.xy[last[filled]]
        mask.view(-1)[filled] = True
        variance = torch.zeros(N, K, dtype=torch.float64)
        variance.view(-1)[filled] = posed.cov[last[filled]][:, [0, 2]].mean(-1)
        return cls(xy, mask, variance)


def solve(
    messages: Sequence[Correspondences],
    T_world_camera: Tensor,
    track: Tensor,
    points: Tensor,
    camera: Camera,
    options: BundleOptions,
    prior: Prior | None = None,
    gone: Tensor | None = None,
    rounds: int = _ROUNDS,
) -> tuple[Window, Solution, Problem] | None:
    """
    Return the window of these keyframes, how it was solved, and the problem that it solves.

    It is at a stationary point of the objective over the observations that survive; the problem is
    what these pose there, as ``observations.surviving`` puts it together from the window.

    messages: of the K keyframes, oldest first. T_world_camera: (K, 7), where they are thought to
    be; they are held where ``options.poses`` is "external". track, points: (L,) ascending and (L,
    3), the landmarks known so far; all other tracks are triangulated. prior: what keyframes that
    left know of these. gone: (G,) tracks that are used up in it. rounds: of prune and adjust,
    before landmarks whose observations come and go are dropped; at most twice as many. Returns
    None where fewer landmarks than ``options.min_landmarks`` survive.
    """
    stamps = torch.tensor([message.stamp for message in messages])
    observed = observations(messages, camera, options.adjust.backend)
    if gone is not None and len(gone):
        observed = observed.select(index_of(gone.sort().values, observed.track) < 0)
    candidates, landmark = torch.unique_consecutive(observed.track, return_inverse=True)
    known = index_of(track, candidates)
    start = (
        torch.where((known >= 0)[:, None], points[known], torch.nan)
        if len(track)
        else points.new_full((len(candidates), 3), torch.nan)
    )
    pose = index_of(stamps, observed.stamp)
    posed = Problem(
        T_world_camera.double(), start, pose, landmark, observed.xy, observed.cov,
        torch.tensor([camera.fx, camera.fy], dtype=torch.float64), prior and prior.on(stamps),
    ).select(pose >= 0)
    window = _Solver(posed, start, camera.focal, options, rounds)
    if not window.adjust(_LOOSE * options.prune_px, once=True):
        return None
    if not window.adjust(options.prune_px):
        return None
    return window.result(stamps, candidates, known >= 0, prior)


def refine(
    messages: Sequence[Correspondences], T_world_camera: Tensor, camera: Camera,
    options: BundleOptions,
) -> Window | None:
    """
    Adjust all keyframes of a recording together, offline, and return one window over all of them.

    messages: of the K keyframes, oldest first. T_world_camera: (K, 7), as the bundle left them
    (``Bundle.trajectory``). The first pose stays; the scale is the one that the poses came with.
    """
    nothing = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.float64)
    solved = solve(messages, T_world_camera, *nothing, camera, options, rounds=_ROUNDS_BATCH)
    return solved and rescaled_to(solved[0], T_world_camera)


def rescaled_to(window: Window, T_world_camera: Tensor) -> Window:
    """
    Return the window, about its first pose, as large as poses (K, 7) of its keyframes.

    Their size is the median distance from the first pose.
    """
    ours, theirs = (
        (T[1:, :3] - T[0, :3]).norm(dim=-1) for T in (window.T_world_camera, T_world_camera)
    )
    ratio = (theirs / ours)[ours > 0]
    scale = float(ratio.median()) if len(ratio) else 1.0
    return window.enlarged(scale, window.T_world_camera[0, :3])


class _Solver:
    """
    The poses, points and observations of a window between its rounds.

    A point is NaN where a track has none.
    """

    def __init__(
        self, posed: Problem, points: Tensor, focal: float, options: BundleOptions, rounds: int
    ) -> None:
        self.posed, self.points, self.focal, self.options, self.rounds = (
            posed, points, focal, options, rounds,
        )
        self.T = posed.T_world_camera
        self.held = (
            torch.ones(len(self.T), dtype=torch.bool) if options.poses == 'external' else None
        )
        self.tracks = ready('tracks', options.adjust.backend)
        self.grid = None if self.tracks else Grid.of(posed)
        self.rows = [array(column) for column in (posed.pose, posed.landmark, posed.xy)]
        self.start = points
        self.kept = torch.zeros(len(posed.pose), dtype=torch.bool)
        self.dropped = torch.zeros(len(points), dtype=torch.bool)

    def adjust(self, prune_px: float, once: bool = False) -> bool:
        """
        Triangulate what has no sound landmark, then prune and adjust until that changes nothing.

        It adjusts roughly while the survivors still change, exactly at the end. Returns False
        where too few landmarks survive.
        """
        self._triangulate(prune_px)
        keep = self._survivors(prune_px)
        exact = self.options.adjust
        rough = replace(exact, relative_decrease=max(1e-3, exact.relative_decrease), gradient=1.0)
        tight = False
        for turn in range(2 * self.rounds):
            if self.alive < self.options.min_landmarks:
                return False
            self.kept = keep
            self.solution = adjust(self._kept(), exact if tight else rough, self.held)
            self.T, self.points = self.solution.T_world_camera, self.solution.points
            keep = self._survivors(prune_px)
            settled = torch.equal(keep, self.kept)
            if once or (tight and settled):
                return True
            if turn >= self.rounds:
                # An observation that is in when left out and out when taken in: do without its
                # landmark.
                self.dropped[self.posed.landmark[keep != self.kept]] = True
                keep = self._survivors(prune_px)
            tight = tight or settled or turn >= 2
        return False

    def _problem(self) -> Problem:
        return replace(self.posed, T_world_camera=self.T, points=self.points)

    def _kept(self) -> Problem:
        """Return the problem of the observations that are kept."""
        return self._problem().select(self.kept)

    def _survivors(self, prune_px: float) -> Tensor:
        """
        Return (O,) bool, which observations survive, and keep in ``alive`` of how many landmarks.

        They reproject well, and are of landmarks that two keyframes or more see with parallax.
        """
        finite = self.points.isfinite().all(-1) & ~self.dropped
        if self.tracks:
            keep, self.alive = self.tracks.survivors(
                *map(array, (self.T, self.points, finite)), *self.rows,
                *self.posed.focal.tolist(), prune_px,
                math.cos(math.radians(self.options.min_parallax_deg)),
            )
            return torch.from_numpy(keep)
        keep = survives(self._problem(), prune_px) & finite[self.posed.landmark]
        keep &= self._wide(keep.nonzero().squeeze(-1))[self.posed.landmark]
        self.alive = len(torch.unique_consecutive(self.posed.landmark[keep]))
        return keep

    def _wide(self, rows: Tensor) -> Tensor:
        """
        Return (N,) bool, of which landmarks two rays are ``min_parallax_deg`` apart.

        Rays are those of the observations ``rows``. The ray farthest from the mean direction, by
        an angle a, has another one at least a away, and no two are more than 2 a apart: most
        landmarks are decided by a alone, without looking at every pair.
        """
        N, bound = len(self.points), math.radians(self.options.min_parallax_deg)
        pose, landmark = self.posed.pose[rows], self.posed.landmark[rows]
        ray = self.points[landmark] - self.T[pose, :3]
        ray = ray / ray.norm(dim=-1, keepdim=True)
        mean = torch.zeros(N, 3, dtype=ray.dtype).index_add_(0, landmark, ray)
        mean = mean / mean.norm(dim=-1, keepdim=True).clamp_min(1e-300)
        cosine = (ray * mean[landmark]).sum(-1)
        farthest = torch.ones(N, dtype=ray.dtype).scatter_reduce_(0, landmark, cosine, 'amin')
        wide = farthest < math.cos(bound)
        unsure = ~wide & (farthest < math.cos(0.5 * bound))
        some = unsure.nonzero().squeeze(-1)
        seen = torch.zeros(N, len(self.T), dtype=torch.bool)
        seen[landmark, pose] = True
        for part in some.split(max(1, _AT_ONCE // len(self.T) ** 2)):
            toward = self.points[part, None] - self.T[:, :3]  # (n, K, 3)
            toward = toward / toward.norm(dim=-1, keepdim=True)
            both = seen[part, :, None] & seen[part, None]
            wide[part] = torch.where(both, toward @ toward.mT, 1.0).flatten(1).amin(1) < math.cos(
                bound
            )
        return wide

    def _triangulate(self, prune_px: float) -> None:
        """Triangulate robustly what has no landmark, or one that fails in some keyframe."""
        threshold = prune_px / self.focal
        if self.tracks:
            self.points = torch.from_numpy(
                self.tracks.triangulate(array(self.T), array(self.points), *self.rows, threshold)
            )
            return
        agree = torch.zeros_like(self.grid.mask)
        finite = self.points.isfinite().all(-1)
        agree[finite] = triangulation.inliers_of(
            self.points[finite], self.T, self.grid.xy[finite], self.grid.mask[finite], threshold
        )
        views = self.grid.mask.sum(-1)
        again = ((agree.sum(-1) < views) & (views >= 2)).nonzero().squeeze(-1)
        found, agreeing = triangulation.triangulate_robust(
            self.T, self.grid.xy[again], self.grid.mask[again], threshold
        )
        better = agreeing.sum(-1) > agree[again].sum(-1)
        self.points = self.points.clone()
        self.points[again[better]] = found[better]

    @staticmethod
    def _errors(posed: Problem) -> tuple[Tensor, Tensor]:
        """Return how many observations each landmark has, and the sum of their squares, px^2."""
        squared = posed.residual()[0].square().sum(-1)
        total = torch.zeros(len(posed.points), dtype=torch.float64)
        return (
            torch.bincount(posed.landmark, minlength=len(total)),
            total.index_add_(0, posed.landmark, squared),
        )

    def result(
        self, stamps: Tensor, track: Tensor, carried: Tensor, prior: Prior | None
    ) -> tuple[Window, Solution, Problem]:
        """
        Return what ``solve`` does, in the scale of the landmarks that were known before.

        A scale that one pose fixes wanders. The prior knows nothing of scale, and is enlarged with
        the window.
        """
        posed = self._kept()
        landmark = posed.landmark
        count, total = self._errors(posed)
        alive = count > 0
        window = Window(
            stamps, self.T, track[alive], self.points[alive], count[alive],
            (total / count)[alive].sqrt(), prior,
        )
        same = carried & alive & self.start.isfinite().all(-1)
        if self.held is None and same.any():
            origin = self.T[0, :3]
            ratio = (self.start[same] - origin).norm(dim=-1) / (self.points[same] - origin).norm(
                dim=-1
            )
            window = window.enlarged(float(ratio.median()), origin)
        # its least value is the same in every world
        prior = prior and replace(
            posed.prior, T_world_camera=window.prior.T_world_camera,
            information=window.prior.information, gradient=window.prior.gradient,
        )
        posed = replace(
            posed, T_world_camera=window.T_world_camera, points=window.points,
            landmark=(alive.cumsum(0) - 1)[landmark], prior=prior,
        )
        return window, self.solution, posed
