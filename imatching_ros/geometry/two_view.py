"""
Robust pose of two views and pose from points, by PoseLib, and which model two views call for.

All is deterministic, for RANSAC's seed is fixed.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import poselib
import torch
from torch import Tensor

from . import lie

_RELATIVE_MINIMUM = 8  #: five points give a model, eight begin to confirm it
_ABSOLUTE_MINIMUM = 6
_RANSAC = {'seed': 0, 'max_iterations': 2000, 'min_iterations': 100}
HYPOTHESES = 64  #: pairs of rays that the rotation is first guessed from


def relative_pose(
    xy_i: Tensor, xy_j: Tensor, threshold_px: float, focal: float
) -> tuple[Tensor, Tensor] | None:
    """
    Return the pose between two views by the essential matrix (paper 3.1.2, the anchor pair).

    xy_i, xy_j: (N, 2) undistorted, on the plane z = 1; rows that are not finite are outliers.
    threshold_px: epipolar (Sampson) error of an inlier, in pixels of a camera of focal length
    ``focal``. Returns T_j_i (7,) float64 with a translation of length 1 and the inliers (N,) bool,
    or None where there are fewer than eight finite rows or no model.
    """
    finite = (xy_i.isfinite() & xy_j.isfinite()).all(-1)
    if int(finite.sum()) < _RELATIVE_MINIMUM:
        return None
    camera = _camera(focal)
    ransac = {'max_epipolar_error': threshold_px, **_RANSAC}
    refinement = {'loss_type': 'CAUCHY', 'loss_scale': 0.5 * threshold_px}
    pose, info = poselib.estimate_relative_pose(
        _pixels(xy_i[finite], focal), _pixels(xy_j[finite], focal), camera, camera, ransac,
        refinement,
    )
    return _result(pose, info, finite, _RELATIVE_MINIMUM)


def absolute_pose(
    points: Tensor, xy: Tensor, threshold_px: float, focal: float
) -> tuple[Tensor, Tensor] | None:
    """
    Return the pose of a camera that sees known points (paper 3.1.2, 2D-3D registration).

    points: (N, 3), world. xy: (N, 2) undistorted, on the plane z = 1. Rows that are not finite are
    outliers. threshold_px: reprojection error of an inlier, in pixels of a camera of focal length
    ``focal``. Returns T_camera_world (7,) float64 and the inliers (N,) bool, or None where there
    are fewer than six finite rows or no model.
    """
    finite = points.isfinite().all(-1) & xy.isfinite().all(-1)
    if int(finite.sum()) < _ABSOLUTE_MINIMUM:
        return None
    seen, known = _pixels(xy[finite], focal), points[finite].double().numpy()
    ransac = {
        'max_reproj_error': threshold_px, 'seed': 0, 'max_iterations': 1000, 'min_iterations': 20,
    }
    refinement = {'loss_type': 'CAUCHY', 'loss_scale': 0.5 * threshold_px}
    pose, info = poselib.estimate_absolute_pose(seen, known, _camera(focal), ransac, refinement)
    return _result(pose, info, finite, _ABSOLUTE_MINIMUM)


def relative_rotation(xy_i: Tensor, xy_j: Tensor, threshold: float) -> Tensor | None:
    """
    Return the turn of a camera that stays where it is: T_j_i (7,) without translation.

    It is None for fewer than two points. xy_i, xy_j: (N, 2) undistorted, on the plane z = 1,
    finite. threshold: distance of an inlier, on that plane. Two rays fix a rotation (frames built
    on them, Black 1964); of such guesses from rays that lie far apart in the list the one with the
    least truncated error is refined on its inliers (Kabsch 1976).
    """
    N = len(xy_i)
    if N < 2:
        return None
    # Rows of N numbers, on which torch is fastest.
    a, b = (
        torch.nn.functional.normalize(_homogeneous(xy.double()).T.contiguous(), dim=0)
        for xy in (xy_i, xy_j)
    )
    x, y = xy_j.double().T.contiguous()
    tried = min(HYPOTHESES, N)
    first = torch.arange(tried) * (N - 1) // (tried - 1)
    second = (first + max(N // 2, 1)) % N
    R = _frame(b.T[first], b.T[second]) @ _frame(a.T[first], a.T[second]).mT
    for turn in range(4):
        # (H, N) each, and (1, N) once refined
        X, Y, Z = (R.reshape(-1, 3) @ a).view(-1, 3, N).unbind(1)
        depth = Z.clamp_min(1e-6)
        error2 = (X / depth - x).square_() + (Y / depth - y).square_()
        error2.masked_fill_(Z <= 0, torch.inf)
        if turn == 0:
            error2 = error2[int(error2.clamp_max(threshold**2).sum(-1).argmin())]
        weight = (error2.view(-1) < threshold**2).double()
        U, _, Vt = torch.linalg.svd((weight * b) @ a.T)
        sign = torch.det(U @ Vt).sign()
        R = U @ torch.diag(torch.stack((torch.ones_like(sign), torch.ones_like(sign), sign))) @ Vt
    if not R.isfinite().all():
        return None
    return lie.from_matrix(torch.cat((R, torch.zeros(3, 1, dtype=R.dtype)), -1))


def homography(xy_i: Tensor, xy_j: Tensor, threshold_px: float, focal: float) -> Tensor | None:
    """
    Return H_j_i (3, 3) float64 of points (N, 2) that lie on one plane in space, or None.

    Points are undistorted, on the plane z = 1, and must be finite; other arguments are those of
    :func:`relative_pose`.
    """
    if len(xy_i) < _RELATIVE_MINIMUM:
        return None
    ransac = {'max_reproj_error': threshold_px, **_RANSAC}
    H, info = poselib.estimate_homography(_pixels(xy_i, focal), _pixels(xy_j, focal), ransac, {})
    H = torch.from_numpy(np.asarray(H, np.float64))
    if sum(info['inliers']) < _RELATIVE_MINIMUM or not H.isfinite().all():
        return None
    to_plane = torch.tensor([1 / focal, 1 / focal, 1.0], dtype=torch.float64)
    H = to_plane[:, None] * H / to_plane
    # what is seen lies in front: that gives the sign
    ahead = (_homogeneous(xy_i.double()) @ H[2]).median()
    return H / ahead if float(ahead) != 0.0 else None


def homography_motions(H: Tensor, xy_i: Tensor, xy_j: Tensor) -> list[Tensor]:
    """
    Return the motions T_j_i (7,) that a plane's homography allows, with translations of length 1.

    xy_i, xy_j: (N, 2), inliers. Of the four candidates (Malis and Vargas 2007, by OpenCV) those
    are kept, mostly two, whose points lie in front of both cameras as often as those of the best.
    """
    _, rotations, translations, normals = cv2.decomposeHomographyMat(H.numpy(), np.eye(3))
    motions, fronts = [], []
    ray = _homogeneous(xy_i.double())
    for R, t, n in zip(rotations, translations, normals, strict=True):
        t, n = torch.from_numpy(t).squeeze(-1), torch.from_numpy(n).squeeze(-1)
        if not 1e-6 < float(t.norm()):
            continue
        # the plane n.x = d lies ahead where the ray meets it at a positive depth
        front = int((ray @ n > 0).sum())
        T = lie.from_matrix(torch.cat((torch.from_numpy(R), (t / t.norm())[:, None]), -1))
        motions.append(T)
        fronts.append(front)
    return [T for T, front in zip(motions, fronts, strict=True) if front >= 0.9 * max(fronts)]


def transfer_error(H: Tensor, xy_i: Tensor, xy_j: Tensor) -> Tensor:
    """
    Return how far (N,) points xy_j lie from where a homography (3, 3) puts xy_i.

    It is infinite where that is not in front.
    """
    moved = _homogeneous(xy_i.double()) @ H.mT
    error = (moved[:, :2] / moved[:, 2:].clamp_min(1e-9) - xy_j).norm(dim=-1)
    return torch.where(moved[:, 2] > 1e-9, error, torch.inf)


def gric(squared: Tensor, dimension: int, parameters: int) -> float:
    """
    Return Torr's robust information criterion of a two-view model; the least explains best.

    squared: (N,) squared errors over their variance. A model has a manifold of ``dimension`` (3: a
    point lies on its epipolar line; 2: it lies where the model puts it) in the four coordinates of
    a correspondence, and so many ``parameters``. With lambda_1 = ln 4, lambda_2 = ln 4N and errors
    cut off at lambda_3 = 2 per degree of freedom (Torr, The problem of degeneracy in structure and
    motion recovery from uncalibrated image sequences, IJCV 1999).
    """
    n = len(squared)
    fit = squared.clamp_max(2.0 * (4 - dimension)).sum()
    return float(fit) + math.log(4) * dimension * n + math.log(4 * max(n, 1)) * parameters


def sampson_error(T_j_i: Tensor, xy_i: Tensor, xy_j: Tensor) -> Tensor:
    """
    Return the first-order distance (N,) of correspondences from the epipolar geometry.

    T_j_i: (7,). xy_i, xy_j: (N, 2) undistorted, on the plane z = 1, in whose units it is. By
    Hartley and Zisserman, Multiple View Geometry, 11.4.3.
    """
    R, t = lie.matrix(T_j_i).split((3, 1), -1)
    E = torch.linalg.cross(t.expand(3, 3), R, dim=0)
    one = torch.ones_like(xy_i[:, :1])
    line_j = torch.cat((xy_i, one), -1) @ E.mT
    line_i = torch.cat((xy_j, one), -1) @ E
    algebraic = (torch.cat((xy_j, one), -1) * line_j).sum(-1)
    scale = line_j[:, :2].square().sum(-1) + line_i[:, :2].square().sum(-1)
    return algebraic.abs() / scale.sqrt().clamp_min(1e-12)


def _homogeneous(xy: Tensor) -> Tensor:
    return torch.cat((xy, torch.ones_like(xy[..., :1])), -1)


def _frame(a: Tensor, b: Tensor) -> Tensor:
    """Return orthonormal frames (H, 3, 3), as columns, built on two directions (H, 3) each."""
    x = torch.nn.functional.normalize(a + b, dim=-1)
    z = torch.nn.functional.normalize(torch.linalg.cross(a, b), dim=-1)
    return torch.stack((x, torch.linalg.cross(z, x), z), -1)


def _camera(focal: float) -> dict:
    # The origin at the principal point: PoseLib then normalises by the focal length alone.
    return {'model': 'SIMPLE_PINHOLE', 'width': 0, 'height': 0, 'params': [focal, 0.0, 0.0]}


def _pixels(xy: Tensor, focal: float) -> np.ndarray:
    return xy.detach().double().numpy() * focal


def _result(
    pose: poselib.CameraPose, info: dict, finite: Tensor, minimum: int
) -> tuple[Tensor, Tensor] | None:
    inliers = torch.zeros(len(finite), dtype=torch.bool)
    inliers[finite] = torch.tensor(info['inliers'], dtype=torch.bool)
    T = lie.from_matrix(torch.tensor(np.asarray(pose.Rt), dtype=torch.float64))
    if int(inliers.sum()) < minimum or not T.isfinite().all():
        return None
    return T, inliers
