"""From the pose of a robot to the pose of the camera that it carries."""

from __future__ import annotations

import torch
from torch import Tensor

from . import lie


def carried(
    T_world_body: Tensor, covariance: Tensor | None, T_body_camera: Tensor
) -> tuple[Tensor, Tensor | None]:
    """
    Return T_world_camera (7,) and its covariance (6, 6) from those of what carries the camera.

    Covariances are as in ``lie.retract``, which is geometry_msgs/PoseWithCovariance: position,
    then rotation about the world's axes. A turn of the body moves the camera by the lever between
    them: c = t + R b, so dc = dt + w x R b.
    """
    T = lie.compose(T_world_body, T_body_camera)
    if covariance is None:
        return T, None
    x, y, z = lie.rotate(T_world_body[3:], T_body_camera[:3]).tolist()
    J = torch.eye(6, dtype=covariance.dtype)
    J[:3, 3:] = torch.tensor([[0.0, z, -y], [-z, 0.0, x], [y, -x, 0.0]], dtype=covariance.dtype)
    return T, J @ covariance @ J.T
