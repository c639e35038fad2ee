"""
What a keyframe leaves behind when it leaves the window.

A Gaussian prior on the poses that stay (paper 3.1.2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from imatching_ros.bundle.problem import PosePrior, Problem
from imatching_ros.bundle.robust import Kernel
from imatching_ros.bundle.system import System
from imatching_ros.geometry import lie
import torch
from torch import Tensor


@dataclass(frozen=True)
class Prior:
    """
    The quadratic 1/2 d'H d + g'd of P poses.

    There, d (6P,) holds each pose's ``lie.local`` coordinates about its linearisation point: c -
    c0 and Log(R R0^T). Float64, on the CPU.

    It says how the poses lie to one another, but nothing of where, which way round and how large:
    H takes the seven directions of a similarity transform of the world to zero, and g has no part
    of them.
    """

    stamps: Tensor  #: (P,) int64 ns
    T_world_camera: Tensor  #: (P, 7), the linearisation point
    information: Tensor  #: H (6P, 6P), symmetric, positive semidefinite
    gradient: Tensor  #: g (6P,)

    def on(self, stamps: Tensor) -> PosePrior:
        """
        For ``Problem.prior``, where the problem's poses are those of ``stamps`` (K,).

        Raises ValueError where the prior speaks of a pose that is not among them.
        """
        found = self.stamps[:, None] == stamps
        if not bool(found.any(-1).all()):
            raise ValueError(
                'the prior speaks of a keyframe that is not in the window; marginalise it first'
            )
        # A quadratic may be negative, a cost that is compared relatively must not be: its least
        # value becomes zero.
        values, vectors = torch.linalg.eigh(self.information)
        along = vectors.T @ self.gradient
        sound = values > 1e-12 * values.max()
        least = torch.where(sound, along.square() / torch.where(sound, values, 1.0), 0.0).sum() / 2
        return PosePrior(
            found.int().argmax(-1), self.T_world_camera, self.information, self.gradient, least
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


def marginalise(
    problem: Problem, kernel: Kernel, stamps: Tensor, poses: Tensor, landmarks: Tensor
) -> Prior | None:
    """
    Return what the leaving poses and landmarks know of the poses that stay.

    By the Schur complement.

    problem: at its solution, with any earlier prior. stamps: (K,) of its poses. poses: (K,) bool
    and landmarks: (L,) bool, those that leave. Used are all observations of the leaving landmarks,
    with the kernel's weights at the solution, and the earlier prior, linearised anew. What a
    leaving pose sees of landmarks that stay is dropped: it would tie them together. Returns None
    where nothing is known of the poses that stay.
    """
    with torch.inference_mode(False), torch.no_grad():
        leaving = problem.select(landmarks[problem.landmark])
        touched = torch.zeros_like(poses).index_fill_(0, leaving.pose, True)
        if problem.prior is not None:
            touched[problem.prior.pose] = True
        which = touched.nonzero().squeeze(-1)
        T = problem.T_world_camera[which]
        H, g = _reduced(leaving, kernel, which)
        if problem.prior is not None:
            known = torch.searchsorted(which, problem.prior.pose)
            at = (6 * known[:, None] + torch.arange(6)).flatten()
            H_prior, g_prior = _invariant(
                *problem.prior.linearise(problem.T_world_camera), T[known]
            )
            H[at[:, None], at] += H_prior
            g[at] += g_prior
        stays = ~poses[which]
        if not bool(stays.any()):
            return None
        H, g = _eliminate(H, g, stays.repeat_interleave(6))
        # Rounding must neither make information up, nor tell where the world is.
        H, g = _invariant(H, g, T[stays])
        scale = H.diagonal().clamp_min(1e-300).sqrt()
        values, vectors = torch.linalg.eigh(H / scale / scale[:, None])
        root = scale[:, None] * vectors * values.clamp_min(0).sqrt()
        H = root @ root.T
        if not bool(H.any()):
            return None
        return Prior(stamps[which[stays]], T[stays], (H + H.T) / 2, g)


def _reduced(problem: Problem, kernel: Kernel, which: Tensor) -> tuple[Tensor, Tensor]:
    """
    Hessian and gradient of the poses ``which``.

    Of all that are observed among them, landmarks eliminated.
    """
    n = 6 * len(which)
    if len(problem.pose) == 0:
        return torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    landmarks, landmark = torch.unique(problem.landmark, return_inverse=True)
    posed = replace(
        problem, T_world_camera=problem.T_world_camera[which], points=problem.points[landmarks],
        pose=torch.searchsorted(which, problem.pose), landmark=landmark, prior=None,
    )  # fmt: skip
    system = System(posed, kernel, torch.arange(n), torch.float64)
    system.linearise(system.evaluate(*system.start()), curved=False)
    return system.reduce(0.0)


def _eliminate(H: Tensor, g: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
    """
    Return the Schur complement on the coordinates that stay (bool).

    What leaves without being known takes nothing along.
    """
    leaves = ~stays
    scale = H.diagonal()[leaves].clamp_min(1e-300).rsqrt()
    values, vectors = torch.linalg.eigh(H[leaves][:, leaves] * scale * scale[:, None])
    known = values > 1e-11
    root = (
        torch.where(known, torch.where(known, values, 1.0).rsqrt(), 0.0) * vectors * scale[:, None]
    )
    tied = H[stays][:, leaves] @ root
    return H[stays][:, stays] - tied @ tied.T, g[stays] - tied @ (root.T @ g[leaves])


def _invariant(H: Tensor, g: Tensor, T_world_camera: Tensor) -> tuple[Tensor, Tensor]:
    """
    Return H and g without knowledge of a similarity transform of the world.

    ``poses``: (P, 7), where they are linearised.

    With the first pose and one translation component of the pose farthest from it held, which is
    how ``adjust`` holds a window, they stay as they are; in the seven directions of the gauge they
    are then what invariance asks for.
    """
    offset = T_world_camera[:, :3] - T_world_camera[0, :3]
    directions = torch.zeros(len(offset), 6, 7, dtype=torch.float64)
    directions[:, :3, :3] = directions[:, 3:, 3:6] = torch.eye(3, dtype=torch.float64)
    directions[:, :3, 3:6] = lie.cross(torch.eye(3, dtype=torch.float64), offset[:, None]).mT
    directions[:, :3, 6] = offset
    farthest = int(offset.norm(dim=-1).argmax())
    component = int(offset[farthest].abs().argmax())
    # all in one place: they have no scale
    held = [*range(6), 6 * farthest + component][:7 if farthest else 6]
    N = directions.view(-1, 7)[:, : len(held)]
    P = torch.eye(len(N), dtype=torch.float64)
    P[:, held] -= N @ torch.linalg.inv(N[held])
    return P.T @ H @ P, P.T @ g
