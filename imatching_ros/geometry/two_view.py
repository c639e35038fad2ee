"""Robust two-view pose and pose from points, by PoseLib. Deterministic: RANSAC's seed is fixed."""

from __future__ import annotations

import numpy as np
import poselib
import torch
from torch import Tensor

from imatching_ros.geometry import lie

_RELATIVE_MINIMUM = 8  #: five points give a model, eight begin to confirm it
_ABSOLUTE_MINIMUM = 6


def relative_pose(
    xy_i: Tensor, xy_j: Tensor, threshold_px: float, focal: float
) -> tuple[Tensor, Tensor] | None:
    """Pose between two views by the essential matrix (paper 3.1.2, the anchor pair).

    xy_i, xy_j: (N, 2) undistorted, on the plane z = 1; rows that are not finite are outliers.
    threshold_px: epipolar (Sampson) error of an inlier, in pixels of a camera of focal length ``focal``.
    Returns T_j_i (7,) float64 with a translation of length 1 and the inliers (N,) bool,
    or None where there are fewer than eight finite rows or no model.
    """
    finite = (xy_i.isfinite() & xy_j.isfinite()).all(-1)
    if int(finite.sum()) < _RELATIVE_MINIMUM:
        return None
    camera = _camera(focal)
    pose, info = poselib.estimate_relative_pose(
        _pixels(xy_i[finite], focal), _pixels(xy_j[finite], focal), camera, camera,
        {"max_epipolar_error": threshold_px, "seed": 0, "max_iterations": 2000, "min_iterations": 100},
        {"loss_type": "CAUCHY", "loss_scale": 0.5 * threshold_px},
    )  # fmt: skip
    return _result(pose, info, finite, _RELATIVE_MINIMUM)


def absolute_pose(points: Tensor, xy: Tensor, threshold_px: float, focal: float) -> tuple[Tensor, Tensor] | None:
    """Pose of a camera that sees known points (paper 3.1.2, 2D-3D registration).

    points: (N, 3), world. xy: (N, 2) undistorted, on the plane z = 1. Rows that are not finite are outliers.
    threshold_px: reprojection error of an inlier, in pixels of a camera of focal length ``focal``.
    Returns T_camera_world (7,) float64 and the inliers (N,) bool, or None where there are
    fewer than six finite rows or no model.
    """
    finite = points.isfinite().all(-1) & xy.isfinite().all(-1)
    if int(finite.sum()) < _ABSOLUTE_MINIMUM:
        return None
    pose, info = poselib.estimate_absolute_pose(
        _pixels(xy[finite], focal), points[finite].double().numpy(), _camera(focal),
        {"max_reproj_error": threshold_px, "seed": 0, "max_iterations": 1000, "min_iterations": 20},
        {"loss_type": "CAUCHY", "loss_scale": 0.5 * threshold_px},
    )  # fmt: skip
    return _result(pose, info, finite, _ABSOLUTE_MINIMUM)


def sampson_error(T_j_i: Tensor, xy_i: Tensor, xy_j: Tensor) -> Tensor:
    """First-order distance of correspondences from the epipolar geometry (Hartley and Zisserman, 11.4.3).

    T_j_i: (7,). xy_i, xy_j: (N, 2) undistorted, on the plane z = 1. Returns (N,), in units of that plane.
    """
    R, t = lie.matrix(T_j_i).split((3, 1), -1)
    E = torch.linalg.cross(t.expand(3, 3), R, dim=0)
    one = torch.ones_like(xy_i[:, :1])
    line_j = torch.cat((xy_i, one), -1) @ E.mT
    line_i = torch.cat((xy_j, one), -1) @ E
    algebraic = (torch.cat((xy_j, one), -1) * line_j).sum(-1)
    scale = line_j[:, :2].square().sum(-1) + line_i[:, :2].square().sum(-1)
    return algebraic.abs() / scale.sqrt().clamp_min(1e-12)


def _camera(focal: float) -> dict:
    # The origin at the principal point: PoseLib then normalises by the focal length alone.
    return {"model": "SIMPLE_PINHOLE", "width": 0, "height": 0, "params": [focal, 0.0, 0.0]}


def _pixels(xy: Tensor, focal: float) -> np.ndarray:
    return xy.detach().double().numpy() * focal


def _result(pose: poselib.CameraPose, info: dict, finite: Tensor, minimum: int) -> tuple[Tensor, Tensor] | None:
    inliers = torch.zeros(len(finite), dtype=torch.bool)
    inliers[finite] = torch.tensor(info["inliers"], dtype=torch.bool)
    T = lie.from_matrix(torch.tensor(np.asarray(pose.Rt), dtype=torch.float64))
    if int(inliers.sum()) < minimum or not T.isfinite().all():
        return None
    return T, inliers
