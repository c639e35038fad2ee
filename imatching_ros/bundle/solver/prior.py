"""What poses and landmarks that leave a problem know of the poses that stay."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .problem import Problem
from .robust import Kernel
from .system import System
from ...geometry import lie


def marginalise(
    problem: Problem, kernel: Kernel, poses: Tensor, landmarks: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """
    Eliminate the leaving poses and landmarks by the Schur complement (paper 3.1.2).

    problem: at its solution, with any earlier prior. poses: (K,) bool and landmarks: (L,) bool,
    those that leave. Used are all observations of the leaving landmarks, with the kernel's weights
    at the solution, and the earlier prior, linearised anew. What a leaving pose sees of landmarks
    that stay is dropped: it would tie them together.

    Returns the quadratic 1/2 d'H d + g'd that is left, d as of ``PosePrior``: the indices (P,) of
    the poses that it speaks of, these poses (P, 7), H (6P, 6P), and g (6P,). H takes the seven
    directions of a similarity transform of the world to zero, and g has no part of them. Returns
    None where nothing is known of the poses that stay.
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
        return which[stays], T[stays], (H + H.T) / 2, g


def _reduced(problem: Problem, kernel: Kernel, which: Tensor) -> tuple[Tensor, Tensor]:
    """Return Hessian and gradient of the poses ``which``, with all landmarks eliminated."""
    n = 6 * len(which)
    if len(problem.pose) == 0:
        return torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    landmarks, landmark = torch.unique(problem.landmark, return_inverse=True)
    posed = replace(
        problem, T_world_camera=problem.T_world_camera[which], points=problem.points[landmarks],
        pose=torch.searchsorted(which, problem.pose), landmark=landmark, prior=None,
    )
    system = System(posed, kernel, torch.arange(n), torch.float64)
    system.linearise(system.evaluate(*system.start()), curved=False)
    return system.reduce(0.0)


def _eliminate(H: Tensor, g: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
    """
    Return the Schur complement on the coordinates that stay (bool).

    A coordinate that leaves without being known takes nothing along.
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

    T_world_camera: (P, 7), where they are linearised. With the first pose and one translation
    component of the pose farthest from it held, which is how ``adjust`` holds a problem, they stay
    as they are; in the seven directions of the gauge they are then what invariance asks for.
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
