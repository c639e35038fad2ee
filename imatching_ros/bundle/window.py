"""A solved window holds T* and p*, the solution of the paper's equation 1b."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pypose
import torch
from torch import Tensor

from .prior import Prior
from ..geometry import lie


@dataclass(frozen=True)
class Window:
    """
    The keyframes and landmarks of a window are kept as the bundle solved them.

    With the keyframes' correspondences this is enough to rebuild every residual
    (``observations.surviving``).
    """

    stamps: Tensor  #: (K,) int64 ns, keyframes, oldest first
    T_world_camera: Tensor  #: (K, 7) float64
    track: Tensor  #: (L,) int64, id of each landmark's track, ascending
    points: Tensor  #: (L, 3) float64, world
    observations: Tensor  #: (L,) int64, number of surviving observations
    #: (L,) float64, RMS reprojection error over the surviving observations, undistorted px
    error_px: Tensor
    #: what keyframes that left know of these poses; the window was solved with it
    prior: Prior | None = None

    def moved(self, T: Tensor) -> Window:
        """Return the window moved by T (7,), ``T p`` for each of its points p."""
        return replace(
            self, T_world_camera=lie.compose(T, self.T_world_camera),
            points=lie.act(T, self.points), prior=self.prior and self.prior.moved(T),
        )

    def enlarged(self, scale: float, centre: Tensor) -> Window:
        """Return the window enlarged by the factor ``scale`` about ``centre`` (3,)."""
        positions = centre + scale * (self.T_world_camera[:, :3] - centre)
        return replace(
            self, T_world_camera=torch.cat((positions, self.T_world_camera[:, 3:]), -1),
            points=centre + scale * (self.points - centre),
            prior=self.prior and self.prior.enlarged(scale, centre),
        )

    @property
    def poses(self) -> pypose.LieTensor:
        """Return the keyframes' poses as ``pypose.SE3`` (K, 7)."""
        return pypose.SE3(self.T_world_camera)
