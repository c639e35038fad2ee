"""
The objective of both levels.

Robust, whitened reprojection error of a sparse list of observations (equation 3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from imatching_ros.bundle.robust import Kernel
from imatching_ros.geometry import lie
import torch
from torch import Tensor

#: A point behind its camera costs what a point this many pixels off would, and pulls nowhere.
BEHIND_PX = 1000.0
MIN_DEPTH = 1e-6


@dataclass(frozen=True)
class PosePrior:
    """
    ``prior.Prior`` on poses of a problem.

    1/2 d'H d + g'd + constant, d (6P,) as ``lie.local``.
    """

    pose: Tensor  #: (P,) int64, indices of the problem's poses
    T_world_camera: Tensor  #: (P, 7), the linearisation point
    information: Tensor  #: H (6P, 6P)
    gradient: Tensor  #: g (6P,)
    constant: Tensor  #: scalar, such that the cost is never negative

    def cost(self, T_world_camera: Tensor) -> Tensor:
        """Of the problem's poses (K, 7), scalar."""
        d = lie.local(self.T_world_camera, T_world_camera[self.pose]).flatten()
        return 0.5 * d @ (self.information @ d) + self.gradient @ d + self.constant

    def linearise(self, T_world_camera: Tensor) -> tuple[Tensor, Tensor]:
        """
        Hessian (6P, 6P) and gradient (6P,) at the problem's poses.

        In the coordinates of ``lie.retract``.

        Of Gauss-Newton: d moves with a step w of the rotation by the inverse left Jacobian, whose
        own change is left out of the Hessian.
        """
        d = lie.local(self.T_world_camera, T_world_camera[self.pose])
        turn = torch.eye(6, dtype=d.dtype, device=d.device).repeat(len(d), 1, 1)
        turn[:, 3:, 3:] = lie.left_jacobian_inverse(d[:, 3:])
        J = torch.block_diag(*turn)
        return J.T @ self.information @ J, J.T @ (self.information @ d.flatten() + self.gradient)


@dataclass(frozen=True)
class Problem:
    """
    K poses, L landmarks and O observations, sorted by landmark.

    Differentiable in every float field.

    Build one with :func:`problem`, which checks and sorts. All float64, one device.
    """

    T_world_camera: Tensor  #: (K, 7)
    points: Tensor  #: (L, 3), world
    pose: Tensor  #: (O,) int64, index of the observation's pose
    landmark: Tensor  #: (O,) int64, index of its landmark, ascending
    xy: Tensor  #: (O, 2), undistorted, on the plane z = 1
    cov: Tensor  #: (O, 3), uu uv vv, undistorted px^2
    focal: Tensor  #: (2,), fx fy in pixels
    prior: PosePrior | None = None  #: on some of the poses

    def residual(self) -> tuple[Tensor, Tensor]:
        """Residuals (O, 2) in undistorted pixels, predicted minus observed, and depths (O,)."""
        # One rotation matrix per pose, not per observation; and rows of O numbers, which torch is
        # fastest at.
        R = (
            lie.rotation(self.T_world_camera[:, 3:])
            .flatten(1)
            .T.index_select(1, self.pose)
            .view(3, 3, -1)
        )
        d = self.points.T.index_select(1, self.landmark) - self.T_world_camera[
            :, :3
        ].T.index_select(1, self.pose)
        X, Y, depth = (R * d[:, None]).sum(0)
        x, y = self.xy.unbind(-1)
        return torch.stack(
            ((X / depth - x) * self.focal[0], (Y / depth - y) * self.focal[1]), -1
        ), depth

    def squared(self) -> Tensor:
        """Squared whitened residuals (O,): what the kernel takes."""
        residual, depth = self.residual()
        return torch.where(depth > MIN_DEPTH, whitened(residual, self.cov), BEHIND_PX**2)

    def cost(self, kernel: Kernel) -> Tensor:
        """
        1/2 sum rho(s), and the prior's.

        The scalar that the bundle minimises and the learner differentiates.
        """
        cost = 0.5 * kernel.rho(self.squared()).sum()
        return cost if self.prior is None else cost + self.prior.cost(self.T_world_camera)

    def select(self, keep: Tensor) -> Problem:
        """Return the same poses and landmarks with the observations ``keep`` ((O,) bool) only."""
        keep = keep.nonzero().squeeze(-1)
        return replace(
            self, pose=self.pose[keep], landmark=self.landmark[keep], xy=self.xy[keep],
            cov=self.cov[keep],
        )


def whitened(residual: Tensor, cov: Tensor) -> Tensor:
    """Squared Mahalanobis length (O,) of residuals (O, 2) under covariances (O, 3)."""
    uu, uv, vv = cov.unbind(-1)
    a, b = residual.unbind(-1)
    return (vv * a * a - 2 * uv * a * b + uu * b * b) / (uu * vv - uv * uv)


def problem(
    T_world_camera: Tensor, points: Tensor, pose: Tensor, landmark: Tensor, xy: Tensor,
    cov: Tensor, focal: Tensor,
) -> Problem:
    """
    Return a :class:`Problem` from raw rows.

    Those that are not finite, or whose covariance is not positive definite, are left out, the rest
    sorted by landmark. Raises ValueError where the shapes do not fit or a pose is not finite.
    """
    rows = len(pose)
    if not (
        len(landmark) == len(xy) == len(cov) == rows
        and xy.shape[1:] == (2,)
        and cov.shape[1:] == (3,)
    ):
        raise ValueError(
            'observations must have as many pose and landmark indices as xy (O, 2) and cov (O, '
            '3) rows'
        )
    if T_world_camera.shape[1:] != (7,) or points.shape[1:] != (3,):
        raise ValueError('poses must be (K, 7) and points (L, 3)')
    if not T_world_camera.isfinite().all():
        raise ValueError('every pose of a bundle must be finite; leave out frames without a pose')
    xy, cov, points = xy.double(), cov.double(), points.double()
    uu, uv, vv = cov.unbind(-1)
    good = xy.isfinite().all(-1) & cov.isfinite().all(-1) & (uu > 0) & (uu * vv - uv * uv > 0)
    good &= points.isfinite().all(-1)[landmark]
    kept = good.nonzero().squeeze(-1)
    order = kept[torch.argsort(landmark[kept], stable=True)]
    return Problem(
        T_world_camera.double(), points, pose[order], landmark[order], xy[order], cov[order],
        focal.to(xy).reshape(2),
    )  # fmt: skip
