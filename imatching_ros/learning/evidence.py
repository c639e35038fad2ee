"""
What speaks for a model on images that no step has trained on.

The lower level is solved for the model anew. Then every corner, not only those that its tracks
kept, is matched from each keyframe into each other view, triangulated from all views but one, and
compared with the match in the view left out, and with the corner itself. It is the paper's own
objective (equation 1), on points that nobody selected and with residuals that no solve has seen: a
matcher that is right more often is consistent more often, nearly in proportion, and one that fails
has nowhere to hide it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .lesson import encode_image, Lesson, match, Pair, rematch, resolve
from .probe import Probe, probe_error
from ..bundle.observations import index_of, surviving
from ..bundle.options import BundleOptions
from ..bundle.registration import register
from ..geometry import triangulation
from ..matching.detector import detect
from ..matching.protocol import Matcher

CORNERS = 300  # per keyframe
BETWEEN = 3  # images at most that are looked at between two keyframes
AGREEING_PX = 2.0  # so closely views must agree with a point
AGREEING = 3  # so many other views must agree with a point before it tells where it is


@dataclass(frozen=True)
class Clip:
    """A held-out window with the images between its keyframes."""

    lesson: Lesson
    fresh: list[int]  #: keyframes that had not trained, ascending: only these are looked at
    between: list[tuple[int, Tensor]]  #: stamp and image (1, H, W) uint8, of times between these
    probes: list[Probe]  #: known warps of some of its images

    @cached_property
    def corners(self) -> dict[int, Tensor]:
        """The frozen detector's corners (N, 2) px of each fresh keyframe, by its index."""
        return {
            k: torch.from_numpy(detect(self.lesson.images[k][0].numpy(), CORNERS))
            for k in self.fresh
        }

    @property
    def keyframes(self) -> list[int]:
        """The stamps of the fresh keyframes, ns."""
        return self.lesson.window.stamps[self.fresh].tolist()

    @property
    def stamps(self) -> list[int]:
        """The stamps of all views that are looked at, ns: fresh keyframes, then the others."""
        return self.keyframes + [stamp for stamp, _ in self.between]


def some_between(
    images: Mapping[int, Tensor], stamps: Sequence[int], fresh: Sequence[int]
) -> list[tuple[int, Tensor]]:
    """
    Return images between neighbouring keyframes that are both fresh, spread evenly over each gap.

    images: by stamp; stamps: of the window's keyframes; fresh: indices of some of them.
    """
    known, chosen = sorted(images), []
    for k in fresh:
        if k + 1 not in fresh:
            continue
        inside = known[bisect_left(known, stamps[k] + 1):bisect_left(known, stamps[k + 1])]
        count = min(BETWEEN, len(inside))
        # Not at the gap's ends, where the keyframes are
        places = np.linspace(0, len(inside) - 1, count + 2)[1:-1].round().astype(int)
        chosen += [inside[place] for place in np.unique(places)] if count else []
    return [(stamp, images[stamp]) for stamp in chosen]


@dataclass(frozen=True)
class Evidence:
    """How a model does on one clip: the same points in the same order for every model."""

    #: (P,) px, of a corner's match in a view; infinite where other views do not say where it is
    error: Tensor
    view: Tensor  #: (P,) int64, stamp of the view, ns
    corner: Tensor  #: (P,) int64, which corner of the clip
    known: Tensor  #: (Q,) px, distance from the truth on the known warps
    track_length: float  #: mean number of observations of a landmark. Told, not judged by


@torch.no_grad()
def gather(matcher: Matcher, clip: Clip, options: BundleOptions) -> Evidence:
    """Return the evidence of a model on a clip, the lower level solved for this model."""
    lesson = clip.lesson
    features = {k: encode_image(matcher, image[None]) for k, image in enumerate(lesson.images)}
    solved = resolve(rematch(matcher, lesson, features), options)
    length = 0.0
    if solved is None:  # a model under which the window falls apart is wrong everywhere in it
        error = [
            torch.full((len(corners), len(clip.stamps)), torch.inf)
            for corners in clip.corners.values()
        ]
    else:
        length = float(solved.window.observations.double().mean())
        error = _errors(matcher, clip, solved, features, options)
    views, error = len(clip.stamps), torch.cat(error).float()
    corners = torch.arange(len(error))
    keyframe = torch.arange(len(clip.fresh)).repeat_interleave(
        torch.tensor([len(own) for own in clip.corners.values()])
    )
    # In the keyframe itself a corner is where it is
    other = torch.arange(views) != keyframe[:, None]
    return Evidence(
        error[other], torch.tensor(clip.stamps).expand_as(error)[other],
        corners[:, None].expand_as(error)[other],
        torch.cat([probe_error(matcher, probe) for probe in clip.probes]), length,
    )


def _errors(
    matcher: Matcher, clip: Clip, lesson: Lesson, features: dict[int, Any], options: BundleOptions
) -> list[Tensor]:
    """
    Return, for each fresh keyframe, the errors (N, V) px of its corners' matches in all views.

    A match is as wrong as it is far from the point that the other views give, or as the corner is:
    a matcher that takes one thing for another in all views alike contradicts the corner alone. The
    lesson is the clip's, solved for the model; ``features`` are its keyframes'.
    """
    camera, T_keyframes = lesson.camera, lesson.window.T_world_camera
    views = [features[k] for k in clip.fresh]
    poses = [T_keyframes[k] for k in clip.fresh]
    for stamp, image in clip.between:
        views.append(encode_image(matcher, image[None]))
        poses.append(_pose_between(matcher, lesson, features, stamp, views[-1], options))
    usable = torch.tensor([pose is not None for pose in poses])
    T = torch.stack([T_keyframes[0] if pose is None else pose for pose in poses])
    views, errors = dict(enumerate(views)), []
    for place, corners in enumerate(clip.corners.values()):
        pairs = [Pair(place, view, torch.zeros(0)) for view in views]
        found = match(matcher, lesson, pairs, {place: corners}, views)
        uv = torch.stack([matches.uv[0].cpu() for matches in found], 1)
        uv[:, place] = corners
        error = _left_out(T, camera.normalise(uv.double()), usable, lesson)
        errors.append(torch.maximum(error, error[:, place:place + 1]))
    return errors


def _pose_between(
    matcher: Matcher, lesson: Lesson, features: Mapping[int, Any], stamp: int, view: Any,
    options: BundleOptions,
) -> Tensor | None:
    """
    Return where an image between two keyframes was taken (7,), by the landmarks of the earlier.

    None where too few landmarks agree.
    """
    window, camera = lesson.window, lesson.camera
    k = int((window.stamps < stamp).sum()) - 1
    observed, _ = surviving(window, lesson.messages, camera, options.prune_px)
    seen = index_of(window.track, observed.track[observed.stamp == window.stamps[k]].unique())
    points, guess = window.points[seen], window.T_world_camera[k]
    if len(seen) < options.min_landmarks:
        return None
    xy, _ = triangulation.reproject(guess.expand(len(seen), 7), points)
    pair = Pair(0, 1, torch.zeros(0))
    queries = {0: camera.project(xy).float()}
    matches, = match(matcher, lesson, [pair], queries, {0: features[k], 1: view})
    xy, cov = camera.normalise(matches.uv[0].cpu().double()), matches.cov[0].cpu().double()
    cov = camera.undistorted_covariance(xy, cov.flatten(1)[:, [0, 1, 3]])
    found = register(
        points, xy, cov, xy.new_tensor([camera.fx, camera.fy]), guess, options.adjust,
        options.prune_px
    )
    if found is None or int(found.inliers.sum()) < options.min_landmarks:
        return None
    return found.T_world_camera


def _left_out(T: Tensor, xy: Tensor, usable: Tensor, lesson: Lesson) -> Tensor:
    """
    Return how far (N, V) px each match is from the point that all other views give.

    T: (V, 7), poses of the views. xy: (N, V, 2), matches on the plane z = 1. usable: (V,) bool,
    views whose pose is known. Infinite where fewer than ``AGREEING`` other views agree.
    """
    camera, count = lesson.camera, len(T)
    threshold = AGREEING_PX / camera.focal
    _, agree = triangulation.triangulate_robust(T, xy, usable.expand(len(xy), count), threshold)
    others = agree[:, None] & ~torch.eye(count, dtype=torch.bool)  # (N, left out, V)
    seen = xy[:, None].expand(-1, count, -1, -1)
    points = triangulation.triangulate(T, seen, others)
    agreeing = triangulation.inliers_of(points, T, seen, others, threshold)
    predicted, depth = triangulation.reproject(T, points)
    error = ((predicted - xy) * xy.new_tensor([camera.fx, camera.fy])).norm(dim=-1)
    told = usable & (agreeing.sum(-1) >= AGREEING) & (depth > 0)
    return torch.where(told & error.isfinite(), error, torch.inf)
