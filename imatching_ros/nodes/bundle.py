"""The bundle_node takes correspondences, and gives odometry, keyframes, landmarks and prior."""

from __future__ import annotations

import os
from pathlib import Path as FilePath
import time

from geometry_msgs.msg import TransformStamped
from nav_msgs.msg import Odometry, Path
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.time import Time
from sensor_msgs.msg import PointCloud2
import torch

from . import parameters
from .clouds import correspondences_from_cloud, prior_to_cloud, window_to_messages
from .condition import ACTIVE
from .core_node import CoreNode
from .poses import camera_odometry, odometry_to_message, pose_from_numbers, pose_from_transform
from .process import run
from .qos import lossless
from ..bundle.bundle import Bundle, LOST
from ..bundle.options import BundleOptions
from ..bundle.window import Window
from ..data.stamps import LEAP_NS
from ..files import write_map
from ..geometry.camera import Camera

try:
    import tf2_ros
except ImportError:  # ROS from PyPI has none
    tf2_ros = None

LANDMARKS = 200_000  #: that save_map can write; the oldest beyond are forgotten


class BundleNode(CoreNode):
    """Runs the lower level on each image's correspondences, beside another odometry if any."""

    role, feed = 'bundle', 'correspondences'
    judged = True  # by the matcher

    def forget(self) -> None:
        super().forget()
        # by track: the last position of every landmark, oldest track first
        self._points: dict[int, list[float]] = {}
        self.status, self.motion, self.reason = 'waiting', 'unknown', ''
        self.inliers = self.poses = self.windows = self.odometry = 0
        self._camera_frame = ''
        self._T_child_camera: torch.Tensor | None = None

    def configure(self) -> None:
        self._external = self.value('poses') == 'external'
        self._world_frame = self.value('world_frame')
        ends = self.endpoints
        self._odometry = ends.advertise(Odometry, 'odometry', self.qos.results)
        self._keyframes = ends.advertise(Path, 'keyframes', self.qos.windows)
        self._landmarks = ends.advertise(PointCloud2, 'landmarks', self.qos.windows)
        self._prior = ends.advertise(PointCloud2, 'prior', self.qos.windows)
        if any(given := self.value('camera_pose')):
            self._T_child_camera = pose_from_numbers(given)
        self._broadcaster = None
        if self.value('publish_tf'):
            if tf2_ros is None:
                raise ValueError(
                    'publish_tf is set but tf2_ros is not installed; install it, or leave '
                    'publish_tf out'
                )
            self._broadcaster = tf2_ros.TransformBroadcaster(self)
            ends.on_close(self.destroy_publisher, self._broadcaster.pub_tf)
        self._buffer = self._listener = None
        if tf2_ros is not None and self._T_child_camera is None:
            self._buffer = tf2_ros.Buffer()
            self._listener = tf2_ros.TransformListener(self._buffer, self)
            ends.on_close(self._listener.unregister)
        ends.offer_trigger('~/save_map', self.save_map)
        ends.subscribe(PointCloud2, 'correspondences', self.receive, self.qos.results)
        often = QoSProfile(depth=100, reliability=ReliabilityPolicy.BEST_EFFORT)
        ends.subscribe(
            Odometry, 'external_odometry', self._on_odometry,
            lossless() if self.qos.keep_all else often,
        )

    def options(self) -> BundleOptions:
        return parameters.options(BundleOptions(), 'bundle', self.role, self.value)

    def build(self, camera: Camera) -> Bundle:
        return Bundle(camera, self.options())

    def process(self, message: PointCloud2) -> None:
        started = time.perf_counter()
        correspondences = correspondences_from_cloud(message)
        self.timeline.check(correspondences.stamp)
        estimate = self.core.add(correspondences)
        self._camera_frame = message.header.frame_id
        self.status, self.motion, self.reason = estimate.status, estimate.motion, estimate.reason
        self.inliers = estimate.inliers
        # Poses of earlier images stay out of odometry, whose stamps never go back; the keyframes
        # among them are in the window
        if estimate.T_world_camera is not None:
            pose = odometry_to_message(
                estimate.T_world_camera, estimate.covariance, estimate.stamp, self._world_frame,
                self._camera_frame,
            )
            self._odometry.publish(pose)
            self.poses += 1
            if self._broadcaster is not None:
                self._broadcaster.sendTransform(transform(pose))
        if estimate.window is not None:
            self._remember(estimate.window)
            self._publish(estimate.window, estimate.stamp)
        self.health.done(time.perf_counter() - started)

    def reset(self) -> str:
        self._points.clear()
        return super().reset()

    def save_map(self) -> str:
        """Write every keyframe's pose and every landmark's position into ``map_dir``."""
        folder = FilePath(os.path.expanduser(self.value('map_dir') or '.')).resolve()
        poses = self.core.trajectory if self.core is not None else {}
        write_map(folder, {stamp: T.numpy() for stamp, T in poses.items()}, self._points)
        return f'{len(poses)} keyframes and {len(self._points)} landmarks in {folder}'

    def warning(self) -> str:
        return super().warning() or (f'lost: {self.reason}' if self.status == LOST else '')

    def values(self) -> dict[str, object]:
        # Monocular: without another odometry the scale is whatever the first two keyframes made it
        return {
            'status': self.status,
            'motion': self.motion,
            'reason': self.reason,
            'inliers': self.inliers,
            'poses': self.poses,
            'keyframes': self.core.keyframes if self.core else 0,
            'maps': self.core.maps if self.core else 0,
            'windows': self.windows,
            'scale': 'metric' if self.core and self.core.metric else 'arbitrary',
            'external_odometry': self.odometry,
        }

    def _publish(self, window: Window, stamp: int) -> None:
        keyframes, landmarks = window_to_messages(window, stamp, self._world_frame)
        self._prior.publish(prior_to_cloud(window.prior, stamp, self._world_frame))
        self._landmarks.publish(landmarks)
        self._keyframes.publish(keyframes)
        self.windows += 1

    def _remember(self, window: Window) -> None:
        for track, point in zip(window.track.tolist(), window.points.tolist(), strict=True):
            self._points.pop(track, None)  # so that it is the newest again
            self._points[track] = point
        while len(self._points) > LANDMARKS:
            del self._points[next(iter(self._points))]

    def _on_odometry(self, message: Odometry) -> None:
        if self.state == ACTIVE:
            self.worker.post(lambda: self._add_odometry(message))

    def _add_odometry(self, message: Odometry) -> None:
        if self.camera is None:
            return
        try:
            extrinsics = self._extrinsics(message.child_frame_id)
            if extrinsics is None:
                return
            if self.core is None:
                self.core = self.build(self.camera)
            stamp, *pose = camera_odometry(message, extrinsics)
            # all later ones would be too old
            last = self.timeline.last
            if last is not None and stamp > last + LEAP_NS:
                ahead = (stamp - last) / 1e9
                raise ValueError(f'it is {ahead:.3f} s ahead of the images; check clocks')
            self.core.add_odometry(stamp, *pose)
        except ValueError as error:
            self.reporter.fault(f'external_odometry: {error}')
            return
        self.odometry += 1
        if self._external:
            self._world_frame = message.header.frame_id or self._world_frame

    def _extrinsics(self, child_frame: str) -> torch.Tensor | None:
        """
        Return the pose (7,) of the camera in the odometry's child frame.

        It is None as long as the camera's frame is not known. Raises ValueError where nothing
        tells it.
        """
        if self._T_child_camera is None and self._camera_frame:
            if child_frame in ('', self._camera_frame):
                self._T_child_camera = pose_from_numbers(
                    (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
                )
            elif self._buffer is not None:
                try:
                    found = self._buffer.lookup_transform(child_frame, self._camera_frame, Time())
                except tf2_ros.TransformException as error:
                    raise ValueError(
                        f"where the camera is in '{child_frame}' is not known: {error}"
                    ) from None
                self._T_child_camera = pose_from_transform(found.transform)
            else:
                raise ValueError(
                    f"where the camera '{self._camera_frame}' is in '{child_frame}' is not "
                    'known; set camera_pose'
                )
        return self._T_child_camera


def transform(pose: Odometry) -> TransformStamped:
    """Return what /tf says of a pose."""
    message = TransformStamped(header=pose.header, child_frame_id=pose.child_frame_id)
    position, translation = pose.pose.pose.position, message.transform.translation
    translation.x, translation.y, translation.z = position.x, position.y, position.z
    message.transform.rotation = pose.pose.pose.orientation
    return message


def main(arguments: list[str] | None = None) -> None:
    run(BundleNode, arguments)


if __name__ == '__main__':
    main()
