"""The pose of one frame against known landmarks (paper 3.1.2, frame tracking)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .compiled import ready
from .solver.adjust import AdjustOptions, array
from .solver.problem import BEHIND_PX, MIN_DEPTH
from .solver.robust import Kernel, KERNELS
from ..geometry import lie, triangulation, two_view

_GUESSED = 0.5  #: where the motion model agrees with this share of the points, PnP is not asked


@dataclass(frozen=True)
class Registration:
    """A pose, and the points that agree with it."""

    T_world_camera: Tensor  #: (7,)
    inliers: Tensor  #: (N,) bool


def register(
    points: Tensor, xy: Tensor, cov: Tensor, focal: Tensor, guess: Tensor | None,
    options: AdjustOptions, inlier_px: float,
) -> Registration | None:
    """
    Return the pose of an image by 2D-3D registration.

    It is the motion model's guess, refined under the robust kernel; or that of PnP, where too few
    points agree with the guess and more with PnP.

    points: (N, 3), world. xy: (N, 2) on the plane z = 1, cov: (N, 3) undistorted px^2, focal: (2,)
    px. guess: T_world_camera (7,) or None. Returns None where there is neither a guess nor a
    model.
    """
    backend = options.backend
    T, inliers = (
        guess,
        None if guess is None else _inliers(guess, points, xy, focal, inlier_px, backend),
    )
    if guess is not None and int(inliers.sum()) < _GUESSED * len(points):
        # the kernel alone brings most guesses there
        T = refine(guess, points, xy, cov, focal, options.kernel, backend=backend)
        inliers = _inliers(T, points, xy, focal, inlier_px, backend)
    if inliers is None or int(inliers.sum()) < _GUESSED * len(points):
        found = two_view.absolute_pose(points, xy, inlier_px, float(focal.mean()))
        if found is not None:
            other = lie.inverse(found[0])
            agreeing = _inliers(other, points, xy, focal, inlier_px, backend)
            if inliers is None or int(agreeing.sum()) > int(inliers.sum()):
                T, inliers = other, agreeing
    if T is None:
        return None
    # on inliers only: with half the rows wrong, the kernel alone would be pulled aside
    for _ in range(2):
        T = refine(
            T, points[inliers], xy[inliers], cov[inliers], focal, options.kernel, backend=backend
        )
        inliers = _inliers(T, points, xy, focal, inlier_px, backend)
    return Registration(T, inliers)


def refine(
    T_world_camera: Tensor, points: Tensor, xy: Tensor, cov: Tensor, focal: Tensor, kernel: Kernel,
    iterations: int = 10, backend: str = 'auto',
) -> Tensor:
    """
    Return a pose (7,) after Levenberg-Marquardt steps from the one that is given.

    Arguments as in :func:`register`, ``backend`` as in ``AdjustOptions``.
    """
    if images := ready('images', backend):
        T = images.refine(
            *map(array, (T_world_camera, points, xy, cov)), *focal.tolist(),
            KERNELS.index(kernel.name), float(kernel.scale), iterations,
        )
        return torch.from_numpy(T)
    uu, uv, vv = cov.unbind(-1)
    information = torch.stack((vv, -uv, uu)) / (uu * vv - uv * uv)
    points, xy = points.T.contiguous(), xy.T.contiguous()
    T, damping = T_world_camera, 1e-4
    cost, H, g = _normal_equations(T, points, xy, information, focal, kernel)
    for _ in range(iterations):
        step, failed = torch.linalg.solve_ex(H + damping * torch.diag(H.diagonal() + 1e-12), -g)
        trial = lie.retract(T, step)
        result = _normal_equations(trial, points, xy, information, focal, kernel)
        if not failed and result[0] < cost:
            done = cost - result[0] < 1e-6 * cost
            T, (cost, H, g), damping = trial, result, damping * 0.1
            if done:
                break
        else:
            damping *= 10
            if damping > 1e3:
                break
    return T


def _normal_equations(
    T, points, xy, information, focal, kernel: Kernel
) -> tuple[float, Tensor, Tensor]:
    """
    Return the cost, H (6, 6) and g (6,) of one pose.

    points: (3, N), xy: (2, N), information: (3, N): rows of N numbers, which torch is fastest at.
    """
    R, d = lie.rotation(T[3:]), points - T[:3, None]
    q = R.T @ d
    front = q[2] > MIN_DEPTH
    inverse = torch.where(front, q[2], 1.0).reciprocal()
    z = q[:2] * inverse
    ex, ey = (z - xy) * focal[:, None]
    xx, uv, yy = information
    gx, gy = xx * ex + uv * ey, uv * ex + yy * ey
    s = torch.where(front, ex * gx + ey * gy, BEHIND_PX**2)
    weight = torch.where(front, kernel.weight(s), 0.0)
    # (2, 3, N)
    A = (R.T[:2, :, None] - z[:, None] * R.T[2, :, None]) * (focal[:, None] * inverse)[:, None]
    Jx, Jy = torch.cat((-A, torch.linalg.cross(A, d.expand_as(A), dim=1)), 1)  # (6, N) each
    H = (weight * (xx * Jx + uv * Jy)) @ Jx.T + (weight * (uv * Jx + yy * Jy)) @ Jy.T
    g = Jx @ (weight * gx) + Jy @ (weight * gy)
    return 0.5 * kernel.rho(s).sum().item(), H, g


def _inliers(T, points, xy, focal, inlier_px: float, backend: str) -> Tensor:
    if images := ready('images', backend):
        return torch.from_numpy(
            images.agreeing(*map(array, (T, points, xy)), *focal.tolist(), inlier_px)
        )
    predicted, depth = triangulation.reproject(T, points)
    return (depth > MIN_DEPTH) & (((predicted - xy) * focal).norm(dim=-1) < inlier_px)
