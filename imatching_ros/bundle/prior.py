"""
What a keyframe leaves behind when it leaves the window (paper 3.1.2).

It is a Gaussian prior on the poses that stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .solver.prior import marginalise
from .solver.problem import PosePrior, Problem
from .solver.robust import Kernel
from ..geometry import lie


@dataclass(frozen=True)
class Prior:
    """
    The quadratic 1/2 d'H d + g'd of P keyframes' poses, float64, on the CPU.

    d (6P,) holds each pose's ``lie.local`` coordinates about its linearisation point: c - c0 and
    Log(R R0^T). It says how the poses lie to one another, but nothing of where, which way round
    and how large: H takes the seven directions of a similarity transform of the world to zero, and
    g has no part of them.
    """

    stamps: Tensor  #: (P,) int64 ns
    T_world_camera: Tensor  #: (P, 7), the linearisation point
    information: Tensor  #: H (6P, 6P), symmetric, positive semidefinite
    gradient: Tensor  #: g (6P,)

    def on(self, stamps: Tensor) -> PosePrior:
        """
        Return it as ``Problem.prior`` of a problem whose poses are those of ``stamps`` (K,).

        Raises ValueError where the prior speaks of a pose that is not among them.
        """
        found = self.stamps[:, None] == stamps
        if not bool(found.any(-1).all()):
            raise ValueError(
                'the prior speaks of a keyframe that is not in the window; marginalise it first'
            )
        return PosePrior.of(
            found.int().argmax(-1), self.T_world_camera, self.information, self.gradient
        )

    def enlarged(self, scale: float, centre: Tensor) -> Prior:
        """Return the same prior in a world enlarged by ``scale`` about ``centre`` (3,)."""
        positions = centre + scale * (self.T_world_camera[:, :3] - centre)
        undo = torch.ones(len(self.stamps), 6, dtype=torch.float64)
        undo[:, :3] = 1 / scale  # d = undo d_new
        undo = undo.flatten()
        return Prior(
            self.stamps, torch.cat((positions, self.T_world_camera[:, 3:]), -1),
            undo[:, None] * self.information * undo, undo * self.gradient,
        )

    def moved(self, T: Tensor) -> Prior:
        """Return the same prior in a world moved by T (7,)."""
        # d = undo' d_new
        undo = torch.block_diag(*[lie.rotation(T[3:])] * (2 * len(self.stamps)))
        information = undo @ self.information @ undo.T
        return Prior(
            self.stamps, lie.compose(T, self.T_world_camera), (information + information.T) / 2,
            undo @ self.gradient,
        )


def left_behind(
    problem: Problem, kernel: Kernel, stamps: Tensor, poses: Tensor, landmarks: Tensor
) -> Prior | None:
    """Return what ``marginalise`` leaves of a problem whose poses are those of ``stamps`` (K,)."""
    found = marginalise(problem, kernel, poses, landmarks)
    return found and Prior(stamps[found[0]], *found[1:])
