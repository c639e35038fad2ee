"""Another odometry's poses of the camera: at an image's stamp, and what they say of scale."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque

import torch
from torch import Tensor

from ..geometry import lie

_REMEMBERED = 4000  #: poses
_GAP_NS = 500_000_000  #: two poses farther apart than this are not interpolated
#: an image may be this much newer than the newest pose; motion then goes on as it was
_AHEAD_NS = 100_000_000
_BASELINE_M = 0.1  #: shorter ways than this say nothing of scale
_SPREAD = 0.2  #: half of the ways must agree on the scale within this share of it


class ExternalOdometry:
    """Poses of the camera in the frame of another odometry, in metres, ordered by stamp."""

    def __init__(self) -> None:
        self._stamps: deque[int] = deque(maxlen=_REMEMBERED)
        self._poses: deque[tuple[Tensor, Tensor | None]] = deque(maxlen=_REMEMBERED)

    def __len__(self) -> int:
        return len(self._stamps)

    def add(self, stamp: int, T_world_camera: Tensor, covariance: Tensor | None = None) -> None:
        """
        Take a pose (7,) at ``stamp`` ns, and its covariance (6, 6) if that is known.

        Raises ValueError, one sentence, where it is not one or does not follow the one before.
        """
        T = torch.as_tensor(T_world_camera, dtype=torch.float64)
        if T.shape != (7,) or not T.isfinite().all() or not abs(float(T[3:].norm()) - 1) < 1e-2:
            raise ValueError(
                f"the odometry's pose of {stamp} ns must be seven finite numbers with a unit "
                'quaternion'
            )
        if self._stamps and stamp <= self._stamps[-1]:
            raise ValueError(
                f'the odometry of {stamp} ns is not newer than the last one; reset the bundle '
                'when time goes back'
            )
        if covariance is not None:
            covariance = torch.as_tensor(covariance, dtype=torch.float64)
            if covariance.shape != (6, 6) or not covariance.isfinite().all():
                raise ValueError(
                    f"the odometry's covariance of {stamp} ns must be 6x6 finite numbers, or "
                    'left out'
                )
        self._stamps.append(stamp)
        self._poses.append((torch.cat((T[:3], T[3:] / T[3:].norm())), covariance))

    def at(self, stamp: int) -> tuple[Tensor, Tensor | None] | None:
        """
        Return T_world_camera (7,) at ``stamp``, and the covariance that came with its pose.

        It is interpolated between its neighbours, with the later one's covariance. Returns None
        where these are too far apart, or there are none.
        """
        after = bisect_left(self._stamps, stamp)
        if after < len(self) and self._stamps[after] == stamp:
            return self._poses[after]
        if after == len(self):  # newer than all: the last motion once more
            if len(self) < 2 or stamp - self._stamps[-1] > _AHEAD_NS:
                return None
            after -= 1
        if after == 0 or self._stamps[after] - self._stamps[after - 1] > _GAP_NS:
            return None
        (before, _), (T, covariance) = self._poses[after - 1], self._poses[after]
        start = self._stamps[after - 1]
        share = (stamp - start) / (self._stamps[after] - start)
        return lie.retract(before, share * lie.local(before, T)), covariance

    def scale_of(self, stamps: list[int], positions: Tensor) -> float | None:
        """
        Return the metres per unit of the map's ``positions`` (K, 3).

        The median, over the ways between any two keyframes that the odometry takes for a tenth of
        a metre or longer, of the lengths' ratios. None where there are fewer than three such ways,
        or they do not agree.
        """
        known = [(i, found[0][:3]) for i, stamp in enumerate(stamps) if (found := self.at(stamp))]
        if len(known) < 3:
            return None
        ours = positions[[i for i, _ in known]]
        theirs = torch.stack([c for _, c in known])
        i, j = torch.triu_indices(len(known), len(known), 1)
        metres, units = (theirs[i] - theirs[j]).norm(dim=-1), (ours[i] - ours[j]).norm(dim=-1)
        long = (metres >= _BASELINE_M) & (units > 0)
        if int(long.sum()) < 3:
            return None
        ratio = metres[long] / units[long]
        scale = ratio.median()
        if float((ratio / scale - 1).abs().median()) > _SPREAD:
            return None
        return float(scale)
