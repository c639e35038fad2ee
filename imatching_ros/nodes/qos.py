"""The qualities of service of the topics: what waits for whom, and what may be lost."""

from __future__ import annotations

from dataclasses import dataclass

from rclpy.qos import (
    DurabilityPolicy,
    HistoryPolicy,
    QoSProfile,
    ReliabilityPolicy,
)


def lossless() -> QoSProfile:
    """Return the QoS with which everything arrives and waits until it is read."""
    return QoSProfile(history=HistoryPolicy.KEEP_ALL, reliability=ReliabilityPolicy.RELIABLE)


def sensor_data() -> QoSProfile:
    """
    Return the QoS of a sensor, with room for a second of a camera's images.

    Nobody counts those that the middleware overwrites while a node is held up.
    """
    return QoSProfile(depth=30, reliability=ReliabilityPolicy.BEST_EFFORT)


def latched(depth: int = 1) -> QoSProfile:
    """Return the QoS with which whoever comes late still gets the last ``depth`` messages."""
    return QoSProfile(
        depth=depth, reliability=ReliabilityPolicy.RELIABLE,
        durability=DurabilityPolicy.TRANSIENT_LOCAL,
    )


@dataclass(frozen=True)
class Qualities:
    """The QoS of a node's topics, as the parameter ``image_qos`` chooses it."""

    keep_all: bool  #: for replay: everything from image to result is kept until it is read

    @property
    def inputs(self) -> QoSProfile:
        return lossless() if self.keep_all else sensor_data()

    @property
    def results(self) -> QoSProfile:
        return lossless() if self.keep_all else QoSProfile(depth=10)

    @property
    def windows(self) -> QoSProfile:
        return latched(100 if self.keep_all else 1)
