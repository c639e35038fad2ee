"""bundle_node: correspondences in; odometry, keyframes and landmarks out."""

from __future__ import annotations

import time
from pathlib import Path as FilePath

import numpy as np
from geometry_msgs.msg import TransformStamped
from nav_msgs.msg import Odometry, Path
from sensor_msgs.msg import PointCloud2

from ..bundle.bundle import Bundle
from ..bundle.options import BundleOptions
from ..geometry.camera import Camera
from . import messages, parameters
from .core_node import CoreNode, run
from .run_files import write_map

try:
    from tf2_ros import TransformBroadcaster
except ImportError:  # ROS from PyPI has no tf2_ros
    TransformBroadcaster = None


class BundleNode(CoreNode):
    """Runs the lower level on each image's correspondences."""

    role, feed = "bundle", "correspondences"

    def forget(self) -> None:
        super().forget()
        self._points: dict[int, np.ndarray] = {}  # by track: the last position of every landmark
        self.status = "waiting"
        self.inliers = self.poses = self.windows = 0

    def configure(self) -> None:
        self._world_frame = self.value("world_frame")
        self._odometry = self.tell(Odometry, "odometry", self.result_qos)
        self._keyframes = self.tell(Path, "keyframes", self.window_qos)
        self._landmarks = self.tell(PointCloud2, "landmarks", self.window_qos)
        self._tf = None
        if self.value("publish_tf"):
            if TransformBroadcaster is None:
                raise ValueError("publish_tf is set but tf2_ros is not installed; install it, or leave publish_tf out")
            self._tf = TransformBroadcaster(self)
        self.serve("~/save_map", self.save_map)
        self.hear(PointCloud2, "correspondences", self.receive, self.result_qos)

    def options(self) -> BundleOptions:
        return parameters.options(BundleOptions(), "bundle", self.role, self.value)

    def build(self, camera: Camera) -> Bundle:
        return Bundle(camera, self.options())

    def process(self, message: PointCloud2) -> None:
        started = time.perf_counter()
        correspondences = messages.correspondences_from_cloud(message)
        self.follow(correspondences.stamp)
        estimate = self.core.add(correspondences)
        self.status, self.inliers = estimate.status, estimate.inliers
        if estimate.T_world_camera is not None:
            pose = messages.odometry(
                estimate.T_world_camera, estimate.covariance, estimate.stamp, self._world_frame, message.header.frame_id
            )
            self._odometry.publish(pose)
            self.poses += 1
            if self._tf is not None:
                self._send_transform(pose)
        if estimate.window is not None:
            self._points.update(zip(estimate.window.track.tolist(), estimate.window.points.numpy(), strict=True))
            keyframes, landmarks = messages.window_to_messages(estimate.window, estimate.stamp, self._world_frame)
            self._landmarks.publish(landmarks)
            self._keyframes.publish(keyframes)
            self.windows += 1
        self.health.done(time.perf_counter() - started)

    def reset(self) -> str:
        self._points.clear()
        return super().reset()

    def save_map(self) -> str:
        """Writes every keyframe's pose and every landmark's position into ``map_dir``."""
        folder = FilePath(self.value("map_dir") or ".").expanduser().resolve()
        poses = self.core.trajectory if self.core is not None else {}
        write_map(folder, {stamp: T.numpy() for stamp, T in poses.items()}, self._points)
        return f"{len(poses)} keyframes and {len(self._points)} landmarks in {folder}"

    def values(self) -> dict[str, object]:
        # Monocular: the scale is whatever the first two keyframes made it.
        return {
            "status": self.status,
            "inliers": self.inliers,
            "poses": self.poses,
            "keyframes": self.core.keyframes if self.core else 0,
            "maps": self.core.maps if self.core else 0,
            "windows": self.windows,
            "scale": "arbitrary",
        }

    def _send_transform(self, pose: Odometry) -> None:
        transform = TransformStamped(header=pose.header, child_frame_id=pose.child_frame_id)
        position = pose.pose.pose.position
        translation = transform.transform.translation
        translation.x, translation.y, translation.z = position.x, position.y, position.z
        transform.transform.rotation = pose.pose.pose.orientation
        self._tf.sendTransform(transform)


def main(arguments: list[str] | None = None) -> None:
    run([BundleNode], arguments)


if __name__ == "__main__":
    main()
