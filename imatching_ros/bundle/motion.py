"""
What an image's correspondences show of the camera's motion.

It may be enough for new landmarks, a turn, or nothing at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .compiled import ready
from .observations import index_of, QUERY_COV
from .solver.adjust import array
from ..geometry import lie, two_view
from ..geometry.camera import Camera
from ..geometry.correspondences import Correspondences

MOVING = 'moving'
STANDSTILL = 'standstill'
ROTATION = 'rotation only'  #: turning on the spot: nothing new can be triangulated
BLIND = 'blind'  #: too few correspondences: a covered lens, a blank wall, the dark
UNKNOWN = 'unknown'  #: nothing to compare with yet

_STILL_PX = 0.5  #: the picture as a whole moved less than this since the image some frames before


@dataclass(frozen=True)
class Pair:
    """Correspondences of two images."""

    stamp: int  #: of image i, ns
    xy_i: Tensor  #: (N, 2) on the plane z = 1
    xy_j: Tensor  #: (N, 2)
    variance: Tensor  #: (N,) of one coordinate of their difference, px^2

    def __len__(self) -> int:
        return len(self.xy_i)


def pair_with(message: Correspondences, stamp: int, camera: Camera) -> Pair:
    """Return a message's rows with one of its past keyframes, but those that are not finite."""
    rows = message.ref_stamp == stamp
    xy_i, xy_j = camera.normalise(message.ref_uv[rows].double()), message.xy[rows].double()
    variance = QUERY_COV[0] + 0.5 * (message.cov[rows, 0] + message.cov[rows, 2]).double()
    return _finite(Pair(stamp, xy_i, xy_j, variance))


def shared(before: Correspondences, after: Correspondences) -> Pair:
    """
    Return where the tracks that two messages share were, and where they are.

    Of several rows of a track the first one counts.
    """
    (track_i, row_i), (track_j, row_j) = _first_rows(before), _first_rows(after)
    place = index_of(track_i, track_j)
    row_i, row_j = row_i[place[place >= 0]], row_j[place >= 0]
    variance = 0.5 * (before.cov[row_i] + after.cov[row_j])[:, [0, 2]].sum(-1).double()
    return _finite(
        Pair(before.stamp, before.xy[row_i].double(), after.xy[row_j].double(), variance)
    )


def stands_still(pair: Pair, focal: float) -> bool:
    """
    Return whether the picture stands still.

    It does where it did not move as a whole, nor half of the tracks by more than twice their
    noise. Its shift is the median over the tracks, in which the noise of single ones averages out.
    """
    moved = (pair.xy_j - pair.xy_i) * focal
    # chi-squared with two degrees of freedom: the median is 1.39
    noise = moved.square().sum(-1) / pair.variance
    return float(moved.median(0).values.norm()) < _STILL_PX and float(noise.median()) < 2 * 1.39


def motion_of(
    pair: Pair, focal: float, T_j_i: Tensor | None = None, threshold_px: float = 3.0,
    minimum: int = 20, backend: str = 'auto',
) -> tuple[str, Tensor | None]:
    """
    Return MOVING, or ROTATION with the turn T_j_i (7,), without translation, or BLIND.

    A rotation (3 parameters) is chosen where its GRIC (Torr 1999) is no more than that
    of the epipolar geometry (5 parameters) of ``T_j_i``, or of the best essential matrix where
    that is None: where the parallax is less than noise. It is BLIND where neither explains half of
    the pair and ``minimum`` of it: what a covered lens or noise is matched to does not move like
    anything. backend: as in ``AdjustOptions``.
    """
    few = max(minimum, 0.5 * len(pair))
    turn, rotation = _turn(pair, threshold_px / focal, backend), float('inf')
    if turn is not None:
        error = two_view.transfer_error(lie.rotation(turn[3:]), pair.xy_i, pair.xy_j) * focal
        if int((error < threshold_px).sum()) >= few:
            rotation = two_view.gric(error.square() / pair.variance, dimension=2, parameters=3)
    if T_j_i is None:
        found = two_view.relative_pose(pair.xy_i, pair.xy_j, threshold_px / 2, focal)
        T_j_i = found[0] if found else None
    general = float('inf')
    if T_j_i is not None:
        sampson = two_view.sampson_error(T_j_i, pair.xy_i, pair.xy_j) * focal
        if int((sampson < threshold_px / 2).sum()) >= few:
            general = two_view.gric(
                2 * sampson.square() / pair.variance, dimension=3, parameters=5
            )
    if rotation <= general < float('inf') or rotation < general:
        return ROTATION, turn
    return (MOVING if general < float('inf') else BLIND), None


def _turn(pair: Pair, threshold: float, backend: str) -> Tensor | None:
    images = ready('images', backend)
    if not images or len(pair) < 2:
        return two_view.relative_rotation(pair.xy_i, pair.xy_j, threshold)
    q = torch.from_numpy(images.relative_rotation(array(pair.xy_i), array(pair.xy_j), threshold))
    return torch.cat((q.new_zeros(3), q))


def _first_rows(message: Correspondences) -> tuple[Tensor, Tensor]:
    """Return each track, ascending, and its first row."""
    order = torch.argsort(message.track, stable=True)
    track = message.track[order]
    first = torch.ones(len(track), dtype=torch.bool)
    first[1:] = track[1:] != track[:-1]
    return track[first], order[first]


def _finite(pair: Pair) -> Pair:
    good = pair.xy_i.isfinite().all(-1) & pair.xy_j.isfinite().all(-1) & (pair.variance > 0)
    return Pair(pair.stamp, pair.xy_i[good], pair.xy_j[good], pair.variance[good])
