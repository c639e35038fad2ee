"""The matcher_node takes images, and gives correspondences with the past n keyframes."""

from __future__ import annotations

import time

import cv2
import numpy as np
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CompressedImage, Image, PointCloud, PointCloud2
from std_msgs.msg import UInt8MultiArray
import torch

from . import parameters
from .clouds import correspondences_to_cloud, vins_features
from .core_node import CoreNode
from .images import image_to_message
from .process import keep_freed_memory, run
from .qos import latched
from .stamps import to_ns
from .weights import to_device, weights_from_message
from ..geometry.camera import Camera
from ..geometry.correspondences import Correspondences
from ..matching import weights
from ..matching.tracker import Tracker, TrackerOptions


class MatcherNode(CoreNode):
    """Runs the tracker on each image; takes new weights between two of them."""

    role, feed = 'matcher', 'image'

    def forget(self) -> None:
        super().forget()
        self.matcher: torch.nn.Module | None = None
        self.version = -1
        self.rows = 0  # of the newest image
        self._previous: Correspondences | None = None

    def configure(self) -> None:
        keep_freed_memory()
        ends, results = self.endpoints, self.qos.results
        self._correspondences = ends.advertise(PointCloud2, 'correspondences', results)
        self._debug = ends.advertise(Image, 'debug/matches', QoSProfile(depth=1))
        self._vins = None
        if self.value('vins_features'):
            self._vins = ends.advertise(PointCloud, 'feature_tracker/feature', results)
        self.reload_weights()
        ends.subscribe(UInt8MultiArray, 'weights', self._on_weights, latched())
        ends.offer_trigger('~/reload_weights', self.reload_weights)
        self.subscribe_to_images(self.receive)

    def options(self) -> TrackerOptions:
        return parameters.options(TrackerOptions(), 'tracker', self.role, self.value)

    def build(self, camera: Camera) -> Tracker:
        return Tracker(self.matcher, self.version, camera, self.options())

    def queue_size(self) -> int:
        return 1 if self.value('processing_mode') == 'latest' else super().queue_size()

    def process(self, message: Image | CompressedImage) -> None:
        started = time.perf_counter()
        image, frame = self.decode(message), message.header.frame_id
        correspondences = self.core.track(to_ns(message.header.stamp), image)
        self.rows = len(correspondences)
        self._correspondences.publish(correspondences_to_cloud(correspondences, frame))
        self.health.done(time.perf_counter() - started)
        if self._vins is not None:
            self._vins.publish(vins_features(correspondences, self._previous, frame))
            self._previous = correspondences
        if self._debug.get_subscription_count():
            self._debug.publish(
                image_to_message(draw(image, correspondences), message.header)
            )

    def reload_weights(self) -> str:
        """Load the file of parameter ``weights``, or the shipped one."""
        matcher, info, path = self.load()
        self._use(matcher, info)
        return f'version {self.version} from {path}'

    def values(self) -> dict[str, object]:
        return {'model_version': self.version, 'rows': self.rows}

    def _on_weights(self, message: UInt8MultiArray) -> None:
        try:
            matcher, info = weights.loads(
                weights_from_message(message), 'the weights message'
            )
            matcher = to_device(matcher, self.value('device'))
        except ValueError as error:
            self.reporter.fault(str(error))
            return
        self.worker.post(lambda: self._use(matcher, info))

    def _use(self, matcher: torch.nn.Module, info: weights.WeightsInfo) -> None:
        self.matcher, self.version = matcher, info.version
        if self.core is not None:
            self.core.swap(matcher, info.version)
        self.get_logger().info(f'weights of version {info.version} are in use')


def draw(image: np.ndarray, correspondences: Correspondences) -> np.ndarray:
    """
    Return the image (H, W, 3) rgb, with a line for each match, red to green by score.

    The line goes from where the point was to where it is.
    """
    canvas = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    columns = (correspondences.ref_uv, correspondences.uv, correspondences.score)
    for start, end, score in zip(*(column.tolist() for column in columns), strict=True):
        colour = (round(255 * (1 - score)), round(255 * score), 0)
        end = tuple(map(round, end))
        cv2.line(canvas, tuple(map(round, start)), end, colour, 1, cv2.LINE_AA)
        cv2.circle(canvas, end, 2, colour, -1, cv2.LINE_AA)
    return canvas


def main(arguments: list[str] | None = None) -> None:
    run(MatcherNode, arguments)


if __name__ == '__main__':
    main()
