"""
The objective of both levels (equation 3).

It is the robust, whitened reprojection error of a sparse list of observations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .robust import Kernel
from ...geometry import lie

#: A point behind its camera costs what a point this many pixels off would, and pulls nowhere.
BEHIND_PX = 1000.0
MIN_DEPTH = 1e-6


@dataclass(frozen=True)
class PosePrior:
    """
    The cost 1/2 d'H d + g'd + constant of P of a problem's poses.

    d (6P,) holds each pose's ``lie.local`` coordinates about its linearisation point.
    """

    pose: Tensor  #: (P,) int64, indices of the problem's poses
    T_world_camera: Tensor  #: (P, 7), the linearisation point
    information: Tensor  #: H (6P, 6P)
    gradient: Tensor  #: g (6P,)
    constant: Tensor  #: scalar, such that the cost is never negative

    @classmethod
    def of(
        cls, pose: Tensor, T_world_camera: Tensor, information: Tensor, gradient: Tensor
    ) -> PosePrior:
        """
        Return the prior whose least value is zero.

        A quadratic may be negative, a cost that is compared relatively must not be.
        """
        values, vectors = torch.linalg.eigh(information)
        along = vectors.T @ gradient
        sound = values > 1e-12 * values.max()
        least = torch.where(sound, along.square() / torch.where(sound, values, 1.0), 0.0).sum() / 2
        return cls(pose, T_world_camera, information, gradient, least)

    def cost(self, T_world_camera: Tensor) -> Tensor:
        """Return what it adds to the cost, a scalar, at the problem's poses (K, 7)."""
        d = lie.local(self.T_world_camera, T_world_camera[self.pose]).flatten()
        return 0.5 * d @ (self.information @ d) + self.gradient @ d + self.constant

    def linearise(self, T_world_camera: Tensor) -> tuple[Tensor, Tensor]:
        """
        Return the Gauss-Newton Hessian (6P, 6P) and gradient (6P,) at the problem's poses (K, 7).

        They are in the coordinates of ``lie.retract``: d moves with a step w of the rotation by
        the inverse left Jacobian, whose own change is left out of the Hessian.
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

    Build one with :func:`problem`, which checks and sorts. All floats are float64 on one device,
    and its cost is differentiable in every one of them.
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
        """Return predicted minus observed (O, 2) in undistorted pixels, and depths (O,)."""
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
        """Return the squared whitened residuals (O,), which the kernel takes."""
        residual, depth = self.residual()
        return torch.where(depth > MIN_DEPTH, whitened(residual, self.cov), BEHIND_PX**2)

    def cost(self, kernel: Kernel) -> Tensor:
        """
        Return 1/2 sum rho(s) and the prior's cost, a scalar.

        It is what the bundle minimises and the learner differentiates.
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
    """Return squared Mahalanobis lengths (O,) of residuals (O, 2) under covariances (O, 3)."""
    uu, uv, vv = cov.unbind(-1)
    a, b = residual.unbind(-1)
    return (vv * a * a - 2 * uv * a * b + uu * b * b) / (uu * vv - uv * uv)


def problem(
    T_world_camera: Tensor, points: Tensor, pose: Tensor, landmark: Tensor, xy: Tensor,
    cov: Tensor, focal: Tensor,
) -> Problem:
    """
    Return a :class:`Problem` from raw rows, sorted by landmark.

    Rows that are not finite, or whose covariance is not positive definite, are left out. Raises
    ValueError where the shapes do not fit or a pose is not finite.
    """
    rows = len(pose)
    if not (
        len(landmark) == len(xy) == len(cov) == rows
        and xy.shape[1:] == (2,)
        and cov.shape[1:] == (3,)
    ):
        raise ValueError(
            'observations must have as many pose and landmark indices as xy (O, 2) and '
            'cov (O, 3) rows'
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
    )
