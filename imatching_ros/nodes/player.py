"""
The executable player_node stands in for a camera.

It plays a recording onto ``image`` (or ``image/compressed``) and ``camera_info`` at its own pace.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
import time
from typing import Any

import rclpy
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from . import parameters
from .images import camera_to_info, image_from_recording
from .process import run_ros
from .stamps import to_header, to_stamp
from ..data.recording import RecordingError
from ..data.stamps import LEAP_NS
from ..data.video import open_images

DELIVERY_S = 5.0  #: for the last images to arrive, at the end


class PlayerNode(Node):
    """
    Plays a recording once, at ``rate`` times its own pace.

    What is lost on the way stays lost, unlike in a replay.
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
        compressed = self.recording.transport == 'compressed'
        topic = 'image/compressed' if compressed else 'image'
        self._images = self.create_publisher(
            CompressedImage if compressed else Image, topic, QoSProfile(depth=10)
        )
        self._camera_info = self.create_publisher(CameraInfo, 'camera_info', QoSProfile(depth=10))
        self._time = (
            self.create_publisher(Clock, '/clock', 10)
            if self.get_parameter('clock').value
            else None
        )

    def play(self) -> None:
        """Block until the recording has ended, or ROS is shut down."""
        patience = time.monotonic() + 30.0
        while not self._images.get_subscription_count():
            rclpy.spin_once(self, timeout_sec=0.1)
            if time.monotonic() > patience:
                topic = self._images.topic_name
                transport = self.recording.transport
                self.get_logger().warning(
                    f'nobody listens on {topic}; start the nodes with image_transport:={transport}'
                )
                break
        rate = self.get_parameter('rate').value
        due, before, images = time.monotonic(), None, 0
        for stamp, kind, message in self.recording.messages():
            if kind == 'camera':
                camera = message
                continue
            step = stamp - before if before is not None else 0
            if step > LEAP_NS:
                self.get_logger().warning(
                    f'the recording goes on {step * 1e-9:.3f} s later, which are not waited for'
                )
                step = 0
            before, due = stamp, due + step * 1e-9 / rate
            while (left := due - time.monotonic()) > 0 and rclpy.ok():
                rclpy.spin_once(self, timeout_sec=min(left, 0.1))
            if not rclpy.ok():
                return
            if self._time is not None:
                self._time.publish(Clock(clock=to_stamp(stamp)))
            # as a driver does: whoever comes late needs it too
            head = to_header(stamp, message.header.frame_id)
            self._camera_info.publish(camera_to_info(camera, head))
            self._images.publish(image_from_recording(message, stamp))
            images += 1
        for publisher in (self._camera_info, self._images):
            # A process that ends takes with it what has not been delivered
            publisher.wait_for_all_acked(Duration(seconds=DELIVERY_S))
        self.get_logger().info(f'the recording has ended: {images} images')
        for note in self.recording.notes():
            self.get_logger().warning(note)


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
