"""
The executable player_node: a camera's stand-in.

It plays a recording onto ``image`` (or ``image/compressed``) and ``camera_info`` at its own pace.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
import time
from typing import Any

import rclpy
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from . import messages, parameters
from .process import run_ros
from ..data.recording import RecordingError
from ..data.video import open_images


class PlayerNode(Node):
    """
    Play once, at ``rate`` times the recording's own pace.

    What is lost on the way stays lost: see replay.
    """

    def __init__(self, **node_options: Any) -> None:
        super().__init__('player', **node_options)
        if wrong := parameters.declare(self, 'player', lambda _: None):
            raise ValueError('; '.join(wrong.values()))
        bag = self.get_parameter('bag').value
        if not bag:
            raise ValueError("no recording is given; set the parameter 'bag'")
        *topics, camera, rectified = (
            self.get_parameter(name).value or None
            for name in ('image_topic', 'camera_info_topic', 'camera', 'rectified')
        )
        try:
            self.recording = open_images(Path(bag), *topics, camera, rectified)
        except RecordingError:
            # A launch file names the topic to play onto: of one camera that may be another
            self.recording = open_images(Path(bag), None, None, camera, rectified)
        for note in self.recording.notes():
            self.get_logger().warning(note)
        compressed = self.recording.transport == 'compressed'
        topic = 'image/compressed' if compressed else 'image'
        self._publishers_of = {
            'image': self.create_publisher(
                CompressedImage if compressed else Image, topic, QoSProfile(depth=10)
            ),
            'camera_info': self.create_publisher(CameraInfo, 'camera_info', QoSProfile(depth=10)),
        }
        self._time = (
            self.create_publisher(Clock, '/clock', 10)
            if self.get_parameter('clock').value
            else None
        )

    def play(self) -> None:
        """Block until the recording has ended, or ROS is shut down."""
        patience = time.monotonic() + 30.0
        while not self._publishers_of['image'].get_subscription_count():
            rclpy.spin_once(self, timeout_sec=0.1)
            if time.monotonic() > patience:
                topic = self._publishers_of['image'].topic_name
                transport = self.recording.transport
                self.get_logger().warning(
                    f'nobody listens on {topic}; start the nodes with image_transport:={transport}'
                )
                break
        rate = self.get_parameter('rate').value
        begun, first, images = time.monotonic(), None, 0
        info = None
        for stamp, kind, message in self.recording.messages():
            if kind == 'camera':
                info = message
                continue
            first = stamp if first is None else first
            while (
                left := begun + (stamp - first) * 1e-9 / rate - time.monotonic()
            ) > 0 and rclpy.ok():
                rclpy.spin_once(self, timeout_sec=min(left, 0.1))
            if not rclpy.ok():
                return
            if self._time is not None:
                self._time.publish(Clock(clock=messages.to_stamp(stamp)))
            image = messages.from_recording(message, stamp)
            self._publishers_of['camera_info'].publish(messages.camera_to_info(info, image.header))
            self._publishers_of['image'].publish(image)
            images += 1
        self.get_logger().info(f'the recording has ended: {images} images')


def main(arguments: list[str] | None = None) -> None:
    def body(stack: contextlib.ExitStack) -> None:
        try:
            node = PlayerNode()
            stack.callback(node.destroy_node)
            node.play()
        except (ValueError, OSError) as error:  # RecordingError among them
            raise ValueError(f'player: {error}') from None

    run_ros(body, arguments)


if __name__ == '__main__':
    main()
