"""Poses and odometry as ROS messages, and back: malformed ones raise ValueError."""

from __future__ import annotations

from collections.abc import Sequence

from geometry_msgs.msg import Pose, Transform
from nav_msgs.msg import Odometry
import numpy as np
import torch

from .stamps import to_header, to_ns
from ..geometry.frames import carried


def pose_to_message(T: torch.Tensor) -> Pose:
    """Return the message of a pose (7,), ``tx ty tz qx qy qz qw``."""
    message = Pose()
    position, orientation = message.position, message.orientation
    position.x, position.y, position.z = T[:3].tolist()
    orientation.x, orientation.y, orientation.z, orientation.w = T[3:].tolist()
    return message


def pose_from_message(message: Pose) -> torch.Tensor:
    """Return the pose (7,) float64 of a message, whatever its numbers are."""
    p, q = message.position, message.orientation
    return torch.tensor([p.x, p.y, p.z, q.x, q.y, q.z, q.w], dtype=torch.float64)


def pose_from_numbers(numbers: Sequence[float]) -> torch.Tensor:
    """
    Return the pose (7,) float64 of ``x y z qx qy qz qw``, its quaternion made exactly a unit.

    Raises ValueError where the quaternion is not nearly a unit.
    """
    T = torch.tensor(list(numbers), dtype=torch.float64)
    norm = T[3:].norm()
    if not abs(float(norm) - 1.0) < 1e-2:
        raise ValueError(f'the pose {T.tolist()} has no unit quaternion; write x y z qx qy qz qw')
    return torch.cat((T[:3], T[3:] / norm))


def pose_from_transform(message: Transform) -> torch.Tensor:
    """Return the pose (7,) float64 of a transform; ValueError where it has no unit quaternion."""
    t, q = message.translation, message.rotation
    return pose_from_numbers((t.x, t.y, t.z, q.x, q.y, q.z, q.w))


def odometry_to_message(
    T_world_camera: torch.Tensor, covariance: torch.Tensor | None, stamp: int, world_frame: str,
    camera_frame: str,
) -> Odometry:
    """
    Return the message of one image's pose (7,) and covariance (6, 6), at its stamp in ns.

    Where the covariance is not known the message has zeros.
    """
    message = Odometry(header=to_header(stamp, world_frame), child_frame_id=camera_frame)
    message.pose.pose = pose_to_message(T_world_camera)
    if covariance is not None:
        message.pose.covariance = covariance.to(torch.float64).reshape(-1).numpy()
    return message


def camera_odometry(
    message: Odometry, T_child_camera: torch.Tensor
) -> tuple[int, torch.Tensor, torch.Tensor | None]:
    """
    Return stamp (ns), pose (7,) and covariance (6, 6) of the camera that an odometry carries.

    T_child_camera: (7,), where the camera is in the odometry's child frame. The covariance is
    None where the message has only zeros. Raises ValueError where the message holds no pose.
    """
    T = pose_from_message(message.pose.pose)
    covariance = torch.from_numpy(np.array(message.pose.covariance, np.float64).reshape(6, 6))
    if not (T.isfinite().all() and covariance.isfinite().all()):
        raise ValueError('the odometry holds a number that is not finite')
    T = pose_from_numbers(T.tolist())
    return to_ns(message.header.stamp), *carried(
        T, covariance if bool(covariance.any()) else None, T_child_camera
    )
