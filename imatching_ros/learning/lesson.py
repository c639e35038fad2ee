"""A lesson: one solved window with the images that made it, ready to be learned from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..bundle.observations import index_of, Observations, select, surviving
from ..bundle.options import BundleOptions
from ..bundle.solve import solve
from ..bundle.solver.problem import Problem
from ..bundle.solver.robust import Kernel
from ..bundle.window import Window
from ..geometry.camera import Camera
from ..geometry.correspondences import Correspondences
from ..geometry.triangulation import reproject
from ..matching.protocol import Matcher, Matches


@dataclass(frozen=True)
class Pair:
    """The rows of one keyframe with one past keyframe."""

    reference: int  #: index of keyframe i in the window
    target: int  #: index of keyframe j
    rows: Tensor  #: (N,) int64, of the correspondences of keyframe j


@dataclass(frozen=True)
class Lesson:
    """
    What there is to learn from a window.

    That are its T*, p* (equation 1b), the correspondences that they explain, and the keyframes'
    images.
    """

    camera: Camera
    images: list[Tensor]  #: (K,) of (1, H, W) uint8, shared by the windows that overlap
    messages: list[Correspondences]  #: (K,) of the keyframes; only rows of the window's landmarks
    window: Window
    pairs: list[Pair]  #: of two keyframes of the window

    def error_px(self) -> Tensor:
        """
        Return the reprojection errors (M,), undistorted px, of the pairs' rows, pair by pair.

        They are infinite for rows without a landmark, and for landmarks behind the camera.
        """
        errors = []
        for pair in self.pairs:
            message = self.messages[pair.target]
            landmark = index_of(self.window.track, message.track[pair.rows])
            T = self.window.T_world_camera[pair.target].expand(len(pair.rows), 7)
            xy, depth = reproject(T, self.window.points[landmark])
            scale = xy.new_tensor([self.camera.fx, self.camera.fy])
            error = ((xy - message.xy[pair.rows]) * scale).norm(dim=-1)
            errors.append(torch.where((landmark >= 0) & (depth > 0), error, torch.inf))
        return torch.cat(errors)


def make_lesson(
    window: Window,
    messages: Mapping[int, Correspondences],
    images: Mapping[int, Tensor],
    camera: Camera,
) -> Lesson | None:
    """
    Join a window with the correspondences and the images of its keyframes, exactly by stamp.

    Images are (1, H, W) uint8. Returns None where one is missing, or no row lies between two of
    the keyframes.
    """
    stamps = window.stamps.tolist()
    if not all(stamp in images and stamp in messages for stamp in stamps):
        return None
    ours, pairs = [], []
    for target, stamp in enumerate(stamps):
        message = select(messages[stamp], index_of(window.track, messages[stamp].track) >= 0)
        reference = index_of(window.stamps, message.ref_stamp)
        for i in reference[reference >= 0].unique().tolist():
            pairs.append(Pair(i, target, (reference == i).nonzero().squeeze(-1)))
        ours.append(message)
    if not pairs:
        return None
    return Lesson(camera, [images[stamp] for stamp in stamps], ours, window, pairs)


def encode(matcher: Matcher, lesson: Lesson, pairs: list[Pair]) -> dict[int, Any]:
    """Return the features of the images of some pairs, each encoded once, differentiable."""
    used = sorted({index for pair in pairs for index in (pair.reference, pair.target)})
    return {k: encode_image(matcher, lesson.images[k][None]) for k in used}


def encode_image(matcher: Matcher, image: Tensor) -> Any:
    """Return the features of an image (1, 1, H, W) uint8, differentiable."""
    device = next(matcher.parameters()).device
    return matcher.encode(image.to(device, torch.float32) / 255)


def match(
    matcher: Matcher, lesson: Lesson, pairs: list[Pair],
    queries: Mapping[int, Tensor] | None = None,
    features: Mapping[int, Any] | None = None,
) -> list[Matches]:
    """
    Match some pairs again by f_theta, differentiable.

    They are asked at the pairs' rows, or at the points (N, 2) px that ``queries`` has for each
    reference; with the images' ``features``, or encoding them.
    """
    device = next(matcher.parameters()).device
    features = features or encode(matcher, lesson, pairs)
    matches = []
    for pair in pairs:
        asked = (
            queries[pair.reference] if queries else lesson.messages[pair.target].ref_uv[pair.rows]
        )
        matches.append(
            matcher.match(
                features[pair.reference], features[pair.target], asked.to(device).unsqueeze(0)
            )
        )
    return matches


@torch.no_grad()
def rematch(matcher: Matcher, lesson: Lesson, features: Mapping[int, Any] | None = None) -> Lesson:
    """
    Return the lesson as the matcher sees it now: new rows, the same T*, p*.

    The covariances stay: they are the weights of both levels, and a model must not look better by
    doubting itself.
    """
    messages = [replace(message, uv=message.uv.clone()) for message in lesson.messages]
    for pair, matches in zip(
        lesson.pairs, match(matcher, lesson, lesson.pairs, features=features), strict=True
    ):
        messages[pair.target].uv[pair.rows] = matches.uv[0].cpu()
    messages = [replace(m, xy=lesson.camera.normalise(m.uv.double()).float()) for m in messages]
    return replace(lesson, messages=messages)


def requery(lesson: Lesson, prune_px: float) -> Lesson:
    """
    Return the lesson with each query moved to where its landmark reprojects in the reference.

    A track that began in the reference is, by definition, at its corner. But a query that was
    itself found by matching carries that match's error, and f_theta, asked at the wrong place,
    would be charged for it: on rendered scenes two thirds of the landmark's distance from the true
    match were of this kind. Landmarks average such errors out. A query farther than ``prune_px``
    from its landmark stays. Queries are given in both levels: nothing of equation 7 changes.
    """
    window, camera = lesson.window, lesson.camera
    messages = [replace(message, ref_uv=message.ref_uv.clone()) for message in lesson.messages]
    for pair in lesson.pairs:
        message = messages[pair.target]
        landmark = index_of(window.track, message.track[pair.rows])
        xy, depth = reproject(
            window.T_world_camera[pair.reference].expand(len(landmark), 7), window.points[landmark]
        )
        uv = camera.project(xy).to(message.ref_uv.dtype)
        near = (uv - message.ref_uv[pair.rows]).norm(dim=-1) < prune_px
        found = torch.isin(message.track[pair.rows], lesson.messages[pair.reference].track)
        moved = found & near & (landmark >= 0) & (depth > 0)
        message.ref_uv[pair.rows[moved]] = uv[moved]
    return replace(lesson, messages=messages)


def resolve(lesson: Lesson, options: BundleOptions) -> Lesson | None:
    """
    Return the lesson with the lower level solved for its rows (equation 1b).

    It is solved under the prior that the bundle solved it with, from its T*, p* on. Returns None
    where the bundle finds no stationary point with enough landmarks.
    """
    window = lesson.window
    solved = solve(
        lesson.messages, window.T_world_camera, window.track, window.points, lesson.camera,
        options, window.prior
    )
    if solved is None or not solved[1].converged:
        return None
    return replace(lesson, window=solved[0])


@dataclass(frozen=True)
class Survivors:
    """The observations that T*, p* rest on, row by row the objective's (equation 3)."""

    observed: Observations
    problem: Problem

    def of(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """
        Return where a pair's rows stand among the survivors (S,).

        Beside it is returned which of the pair's rows these are (S,).
        """
        mine = self.observed.message == pair.target
        place = index_of(pair.rows, torch.where(mine, self.observed.row, -1))
        survivors = (place >= 0).nonzero().squeeze(-1)
        return survivors, place[survivors]


def survivors_of(lesson: Lesson, prune_px: float) -> Survivors:
    """Return the survivors of a lesson whose window is solved for its rows."""
    return Survivors(*surviving(lesson.window, lesson.messages, lesson.camera, prune_px))


def objective(
    lesson: Lesson, survivors: Survivors, pairs: list[Pair], matches: list[Matches], kernel: Kernel
) -> tuple[Tensor, Tensor, int]:
    """
    Return the upper level at the bundle's optimum, over the rows of some pairs (equations 1a, 7).

    It has the same kernel, covariances and survivors as the lower level, with T* and p* held
    fixed: at the stationary point this partial derivative with respect to f_theta is the total
    one. Returns the sum for the fine matches, the mean distance (px) of the coarse ones from the
    reprojected landmarks, which is their target (paper 3.2.3), and the number of rows.
    """
    # it has no part in the rows' sum, and theta none in it
    posed = replace(survivors.problem, prior=None)
    fine, coarse, rows = [], [], 0
    for pair, matched in zip(pairs, matches, strict=True):
        place, mine = survivors.of(pair)
        if len(place) == 0:
            continue
        uv, coarse_uv = matched.uv[0].cpu()[mine], matched.coarse_uv[0].cpu()[mine]
        rows += len(place)
        at_optimum = replace(
            posed, pose=posed.pose[place], landmark=posed.landmark[place], cov=posed.cov[place]
        )
        fine.append(replace(at_optimum, xy=lesson.camera.normalise(uv.double())).cost(kernel))
        # The residual of the coarse head is no part of the lower level: its target is a constant.
        # (With its total derivative, through `adjoint.optimum`, the same steps gave no better
        # matches.)
        found = replace(at_optimum, xy=lesson.camera.normalise(coarse_uv.double()))
        residual, _ = found.residual()
        coarse.append((residual.square().sum(-1) + 1).sqrt().sub(1).sum())
    if rows == 0:
        zero = torch.zeros((), dtype=torch.float64)
        return zero, zero, 0
    return torch.stack(fine).sum(), torch.stack(coarse).sum() / rows, rows
