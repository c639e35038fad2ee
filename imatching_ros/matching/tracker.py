"""From a stream of images to tracks: each is matched with its past n keyframes (paper 3.1.1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .detector import detect
from .protocol import FAILED, Matcher, Matches
from ..geometry.camera import Camera
from ..geometry.correspondences import Correspondences

# px: a match that comes back this close to its query is right, and its miss is an error of both
# ways; beyond, one of them went astray
SYMMETRIC_PX = 2.0
AHEAD_S = 0.2  # for so long at most a point is taken to go on as it went
# a keyframe of which less than this share of the points was ever found again shows nothing
_BLIND = 0.2


@dataclass(frozen=True)
class TrackerOptions:
    """When a match is kept, and when an image becomes a keyframe."""

    queries: int = 600  #: points per keyframe
    references: int = 2  #: n, past keyframes that each image is matched with
    round_trip_px: float = 1.0  #: forward-backward check: a point must come back this close
    agreement_px: float = 3.0  #: the references of one track must agree this closely
    #: a keyframe is due when the median point moved this share of the image's width
    parallax: float = 0.03
    #: or when fewer than this share of the points found at first are still found
    survivors: float = 0.6


@dataclass(eq=False)
class _Keyframe:
    stamp: int
    image: np.ndarray  # (H, W) uint8: encoded again when the weights change
    features: Any
    uv: Tensor  # (N, 2) float32 px
    # (N, 3) float32 px^2, uu uv vv: of the point itself, zero for a corner that began its track
    # here
    cov: Tensor
    track: Tensor  # (N,) int64
    found: int = 0  # points found again in the image that followed


@dataclass(frozen=True)
class _Seen:
    """What an image showed."""

    stamp: int
    track: Tensor  # (T,) int64, ascending
    uv: Tensor  # (T, 2) px
    velocity: Tensor  # (T, 2) px/s

    def where(self, track: Tensor) -> tuple[Tensor, Tensor]:
        """Return the places of tracks (N,) in it, and which of them it showed (N,)."""
        if not len(self.track):
            return torch.zeros_like(track), torch.zeros_like(track, dtype=torch.bool)
        index = torch.searchsorted(self.track, track).clamp_max(len(self.track) - 1)
        return index, self.track[index] == track

    def then(self, stamp: int, track: Tensor, uv: Tensor) -> _Seen:
        """Return what the next image showed; what is new in it moves like the others."""
        index, known = self.where(track)
        velocity = torch.zeros_like(uv)
        if known.any() and stamp > self.stamp:
            velocity[known] = (uv[known] - self.uv[index[known]]) * (1e9 / (stamp - self.stamp))
            velocity[~known] = velocity[known].median(0).values
        return _Seen(stamp, track, uv, velocity)


def round_trip(
    matcher: Matcher, reference: Any, target: Any, queries: Tensor, around: Tensor | None = None
) -> tuple[Matches, Tensor]:
    """
    Return matches of queries (1, N, 2), and how far from its query each comes back (1, N) px.

    Where they are expected ``around`` some places (1, N, 2) px, their ways back are expected
    around the queries; else both ways search the whole image, for a match that went far astray
    must not find back because that was where it was looked for. A match below ``FAILED`` is not
    asked back, its distance is infinite: of those that would have come back, a fourth is off by
    more than 10 px. Where a match comes back close to its query, half of what it misses is taken
    from it: an error that depends on where a point lies between the cells of the maps is made once
    in each direction, so that it cancels.
    """
    forward = matcher.match(reference, target, queries, around)
    likely = (forward.score[0] >= FAILED).nonzero().squeeze(-1)
    start, found = queries[:, likely], forward.uv[:, likely]
    back = matcher.match(target, reference, found, None if around is None else start)
    miss = back.uv - start
    distance = miss.norm(dim=-1)
    close = (distance < SYMMETRIC_PX).unsqueeze(-1)
    uv = forward.uv.index_copy(1, likely, torch.where(close, found - miss / 2, found))
    never = torch.full_like(forward.score, torch.inf)
    return replace(forward, uv=uv), never.index_copy(1, likely, distance)


def keypoints(
    matcher: Matcher, image: np.ndarray, features: Any, count: int,
    occupied: np.ndarray | None = None,
) -> Tensor:
    """
    Return points (N, 2) float32 px to ask for, ``count`` at most, of an image (H, W) uint8.

    Of twice as many corners, away from the ``occupied`` points (M, 2) px, those that the matcher
    believes to find again: corners alone are placed best, but some lie on occlusion edges or in
    noise.
    """
    corners = torch.from_numpy(detect(image, 2 * count, occupied))
    if len(corners) <= count:
        return corners
    device = next(matcher.parameters()).device
    odds = matcher.reliability(features, corners[None].to(device))[0]
    return corners[odds.topk(count).indices.cpu()]


class Tracker:
    """Keeps the last n keyframes with their features, and gives tracks their ids."""

    def __init__(
        self, matcher: Matcher, version: int, camera: Camera, options: TrackerOptions | None = None
    ) -> None:
        self.camera = camera
        self.options = options or TrackerOptions()
        self._matcher, self._version = matcher, version
        self._keyframes: list[_Keyframe] = []  # oldest first
        self._next_track: int | None = None
        self._seen = _Seen(0, torch.empty(0, dtype=torch.int64), *torch.empty(2, 0, 2))

    @property
    def keyframes(self) -> list[int]:
        """The stamps of the keyframes that the next image is matched with, oldest first."""
        return [keyframe.stamp for keyframe in self._keyframes]

    def reset(self) -> None:
        """Forget all keyframes; the next image is the first. Ids go on, none is given twice."""
        self._keyframes.clear()

    def recalibrate(self, camera: Camera) -> None:
        """Go on with a camera focused anew; of another camera the next image is the first."""
        if not camera.goes_on_from(self.camera):
            self.reset()
        self.camera = camera

    @torch.no_grad()
    def swap(self, matcher: Matcher, version: int) -> None:
        """Go on with other weights: the tracks live on, the keyframes' features are made anew."""
        self._matcher, self._version = matcher, version
        for keyframe in self._keyframes:
            keyframe.features = self._encode(keyframe.image)

    @torch.no_grad()
    def track(self, stamp: int, image: np.ndarray) -> Correspondences:
        """
        Return the rows of an image (H, W) uint8 with the past n keyframes; the first one has none.

        Raises ValueError where the image's size is not the camera's.
        """
        if self._next_track is None:
            # Ten thousand ids a second, so that a tracker that was started anew gives none that
            # another one gave
            self._next_track = stamp // 100_000 % 2**32
        size = (self.camera.height, self.camera.width)
        if image.shape != size:
            raise ValueError(
                f'the image is {image.shape[1]}x{image.shape[0]}, camera_info says '
                f'{size[1]}x{size[0]}; '
                'publish the camera_info that belongs to the image'
            )
        features = self._encode(image)
        rows = [self._match(keyframe, features, stamp) for keyframe in self._keyframes]
        rows = [Correspondences(stamp, *columns, self._version) for columns in rows]
        correspondences = self._agreeing(rows, stamp)
        track, uv, cov, _ = _mean_of_tracks(
            correspondences.uv, correspondences.cov, correspondences.track
        )
        if self._is_keyframe_due(correspondences):
            self._add_keyframe(stamp, image, features, track, uv, cov)
            # All of them, those just born among them: their tracks ascend
            track, uv = self._keyframes[-1].track, self._keyframes[-1].uv
        self._seen = self._seen.then(stamp, track, uv)
        return correspondences

    def _encode(self, image: np.ndarray) -> Any:
        return self._matcher.encode(
            torch.tensor(image, dtype=torch.float32, device=self._device)[None, None] / 255
        )

    @property
    def _device(self) -> torch.device:
        return next(self._matcher.parameters()).device

    def _match(self, keyframe: _Keyframe, features: Any, stamp: int) -> tuple[Tensor, ...]:
        """Return the columns of the rows with a keyframe that come back to where they started."""
        queries, around = keyframe.uv, self._expected(keyframe, stamp)
        if around is not None:
            around = around.to(self._device).unsqueeze(0)
        matches, distance = round_trip(
            self._matcher, keyframe.features, features, queries.to(self._device).unsqueeze(0),
            around,
        )
        uv = matches.uv[0]
        inside = (
            (uv >= 0) & (uv <= uv.new_tensor([self.camera.width - 1, self.camera.height - 1]))
        ).all(-1)
        # Where the lens model makes no sense, as in the corners of a wide lens, a match is of no
        # use to anybody
        xy = self.camera.normalise(uv.cpu().double()).float()
        kept = ((distance[0] < self.options.round_trip_px) & inside).cpu() & xy.isfinite().all(-1)
        uv = uv.cpu()[kept]
        cov = matches.cov[0].cpu()[kept]
        return (
            uv,
            xy[kept],
            torch.full((len(uv),), keyframe.stamp, dtype=torch.int64),
            keyframe.uv[kept],
            keyframe.track[kept],
            matches.score[0].cpu()[kept],
            # Where the query itself is uncertain, so is what is found for it: chains of matches
            # add up
            keyframe.cov[kept] + torch.stack((cov[:, 0, 0], cov[:, 0, 1], cov[:, 1, 1]), -1),
        )

    def _expected(self, keyframe: _Keyframe, stamp: int) -> Tensor | None:
        """
        Return where the points of a keyframe are expected (N, 2) px.

        They go on as in the previous image, and those that it did not show have moved like the
        others. None where it showed none.
        """
        seen = self._seen
        index, known = seen.where(keyframe.track)
        if not known.any():
            return None
        seconds = min(max(stamp - seen.stamp, 0) / 1e9, AHEAD_S)
        motion = seen.uv[index] + seconds * seen.velocity[index] - keyframe.uv
        typical = motion[known].median(0).values
        return keyframe.uv + torch.where(known.unsqueeze(-1), motion, typical)

    def _agreeing(self, rows: list[Correspondences], stamp: int) -> Correspondences:
        """Return all rows but those of tracks whose references disagree on where the point is."""
        if not rows:
            empty = torch.empty(0, 2)
            none = torch.empty(0, dtype=torch.int64)
            return Correspondences(
                stamp, empty, empty, none, empty, none, torch.empty(0), torch.empty(0, 3),
                self._version,
            )
        names = ('uv', 'xy', 'ref_stamp', 'ref_uv', 'track', 'score', 'cov')
        columns = {name: torch.cat([getattr(row, name) for row in rows]) for name in names}
        _, mean, _, index = _mean_of_tracks(columns['uv'], columns['cov'], columns['track'])
        apart = (columns['uv'] - mean[index]).norm(dim=-1) > self.options.agreement_px / 2
        disagreeing = torch.zeros(len(mean), dtype=torch.bool).index_put_(
            (index[apart],), torch.tensor(True)
        )
        kept = ~disagreeing[index]
        return Correspondences(
            stamp, **{name: column[kept] for name, column in columns.items()}, model=self._version
        )

    def _is_keyframe_due(self, correspondences: Correspondences) -> bool:
        if not self._keyframes:
            return True
        newest = self._keyframes[-1]
        mine = correspondences.ref_stamp == newest.stamp
        found = int(mine.sum())
        newest.found = max(newest.found, found)
        if found < self.options.survivors * newest.found or found == 0:
            return True
        moved = (correspondences.uv[mine] - correspondences.ref_uv[mine]).norm(dim=-1).median()
        return bool(moved > self.options.parallax * self.camera.width)

    def _add_keyframe(
        self, stamp: int, image: np.ndarray, features: Any, track: Tensor, uv: Tensor, cov: Tensor
    ) -> None:
        """
        Make the image a keyframe.

        Its points are the tracks found in it (T,), at uv (T, 2) px with covariances (T, 3), and
        new corners between them.
        """
        corners = keypoints(
            self._matcher, image, features, max(self.options.queries - len(track), 1), uv.numpy()
        )
        born = torch.arange(self._next_track, self._next_track + len(corners)) % 2**32
        self._next_track = (self._next_track + len(corners)) % 2**32
        uv, cov = torch.cat((uv, corners)), torch.cat((cov, torch.zeros(len(corners), 3)))
        self._keyframes.append(
            _Keyframe(stamp, image, features, uv, cov, torch.cat((track, born)))
        )
        if len(self._keyframes) > self.options.references:
            # Images of a covered lens must not push out the keyframe that is seen again when the
            # cover goes.
            blind = (k for k in self._keyframes[:-1] if k.found <= _BLIND * len(k.track))
            self._keyframes.remove(next(blind, self._keyframes[0]))


def _mean_of_tracks(
    uv: Tensor, cov: Tensor, track: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    Return tracks (T,), their mean positions (T, 2) px and covariances (T, 3) px^2.

    Also returned is each row's index of its track (M,). Rows count by their certainty. They look
    at the same pixels of the newer image, so their errors are not taken as independent: the mean
    is no more certain than its rows.
    """
    ids, index = torch.unique(track, return_inverse=True)
    weight = 1 / (cov[:, 0] + cov[:, 2])
    total = torch.zeros(len(ids)).index_add_(0, index, weight)[:, None]
    mean = torch.zeros(len(ids), 2).index_add_(0, index, uv * weight[:, None]) / total
    spread = torch.zeros(len(ids), 3).index_add_(0, index, cov * weight[:, None]) / total
    return ids, mean, spread, index
