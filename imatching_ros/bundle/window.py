"""What a solved window is: T* and p* of the paper's equation (1b)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pypose
from torch import Tensor

if TYPE_CHECKING:
    from imatching_ros.bundle.prior import Prior


@dataclass(frozen=True)
class Window:
    """One solved keyframe window. With the keyframes' correspondences it is enough to rebuild every residual
    (``observations.surviving``)."""

    stamps: Tensor  #: (K,) int64 ns, keyframes, oldest first
    T_world_camera: Tensor  #: (K, 7) float64
    track: Tensor  #: (L,) int64, id of each landmark's track, ascending
    points: Tensor  #: (L, 3) float64, world
    observations: Tensor  #: (L,) int64, number of surviving observations
    error_px: Tensor  #: (L,) float64, RMS reprojection error over the surviving observations, undistorted px
    prior: Prior | None = None  #: what keyframes that left know of these poses; the window was solved with it

    @property
    def poses(self) -> pypose.LieTensor:
        """The poses as pypose.SE3 (K, 7)."""
        return pypose.SE3(self.T_world_camera)
