"""What the three nodes share: parameters, camera, a core object in a thread of its own, diagnostics, a clean end."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

import rclpy
import torch
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.clock import Clock, ClockType
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from sensor_msgs.msg import CameraInfo
from std_srvs.srv import Trigger

from imatching_ros.geometry.camera import Camera

from . import messages, parameters
from .diagnostics import Health
from .worker import Worker

REPEAT_S = 5.0  #: the same sentence goes to the log this seldom
RESTART_NS = 1_000_000_000  #: a stamp this far behind the last one is a recording that starts again


def lossless() -> QoSProfile:
    """Everything arrives and waits until it is read."""
    return QoSProfile(history=HistoryPolicy.KEEP_ALL, reliability=ReliabilityPolicy.RELIABLE)


def latched(depth: int = 1) -> QoSProfile:
    """Whoever comes late still gets the last ``depth``."""
    return QoSProfile(
        depth=depth, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
    )


class CoreNode(Node):
    """A node around one core object, which is built once its camera is known and lives in the worker's thread.

    A child says what its core is (``build``), what one input does to it (``process``), and may say why it cannot
    work (``trouble``), what it does when no input waits (``idle``) and what its diagnostics add (``values``).
    """

    role: str  #: matcher, bundle or learner: the node's name unless remapped, and its column of the parameters

    def __init__(self, **node_options: Any) -> None:
        super().__init__(self.role, **node_options)
        self._changed: dict[str, parameters.Value] = {}  # ROS tells of a change before it makes it
        parameters.declare(self, self.role, self.on_change)
        if threads := self.value("threads"):
            torch.set_num_threads(threads)
        keep_all = self.value("image_qos") == "keep_all"
        self.input_qos = lossless() if keep_all else qos_profile_sensor_data
        self.result_qos = lossless() if keep_all else QoSProfile(depth=10)
        self.window_qos = latched(100 if keep_all else 1)

        self.health = Health()
        self.camera: Camera | None = None
        self.core: Any = None
        self._last_stamp: int | None = None
        self._calibration: tuple[Any, ...] | None = None
        self._last_said = ("", 0.0)
        self.worker = Worker(
            self._work, lambda: not self.trouble(), self._failed, self._queue_size(), self._dropped, self.idle
        )
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        # Simulated time may stand still; what a node says of itself must not
        self.create_timer(1.0, self._publish_diagnostics, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self.create_subscription(CameraInfo, "camera_info", self._on_camera_info, self.input_qos)
        self.serve("~/reset", self.reset)

    # What a child says of itself

    def options(self) -> Any:
        """The core object's options."""
        raise NotImplementedError

    def build(self, camera: Camera) -> Any:
        """A fresh core object."""
        raise NotImplementedError

    def process(self, item: Any) -> None:
        """One input; ValueError refuses it with a sentence."""
        raise NotImplementedError

    def idle(self) -> bool:
        """A piece of background work; False where there is none."""
        return False

    def trouble(self) -> str:
        """Why inputs cannot be worked on now, or nothing."""
        if self.camera is None:
            return f"no usable camera_info has come on {self.resolve_topic_name('camera_info')}"
        return ""

    def values(self) -> dict[str, object]:
        """What diagnostics say beside the counters."""
        return {}

    def reset(self) -> str:
        """Starts afresh with the next input; runs in the core's thread."""
        if self.core is not None:
            self.core.reset()
        self._last_stamp = None
        return "starts afresh with the next image"

    # What a child uses

    def value(self, name: str) -> Any:
        """A parameter's value."""
        return self._changed.get(name, self.get_parameter(name).value)

    def receive(self, item: Any) -> None:
        """Queues an input for the core."""
        self.health.received += 1
        self.worker.put(item)

    def follow(self, stamp: int) -> None:
        """Keeps time: ValueError for a duplicate or late stamp; starts afresh where a recording begins again."""
        last = self._last_stamp
        if last is not None and stamp <= last:
            if last - stamp < RESTART_NS:
                what = "the same stamp as" if stamp == last else "an older stamp than"
                raise ValueError(f"a message with {what} the one before is ignored; check for a second publisher")
            self.fault(f"the clock went back by {(last - stamp) / 1e9:.3f} s: starting afresh")
            self.reset()
        self._last_stamp = stamp

    def fault(self, sentence: str) -> None:
        """Says it in diagnostics, and in the log unless it was just said there."""
        said, when = self._last_said
        if sentence != said or time.monotonic() > when + REPEAT_S:
            self._last_said = sentence, time.monotonic()
            self.get_logger().error(sentence)
        self.health.fault(sentence)

    def serve(self, name: str, action: Callable[[], str]) -> None:
        """A Trigger service whose ``action`` runs in the core's thread and returns what to say."""

        def answer(_: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
            try:
                response.message = self.worker.request(action).result(timeout=60.0)
                response.success = True
            except (ValueError, OSError) as error:
                response.message = str(error)
                self.fault(f"{name}: {error}")
            except (TimeoutError, CancelledError):
                response.message = "the node is still busy; try again"
            return response

        self.create_service(Trigger, name, answer)

    def close(self) -> None:
        """Ends the core's thread; call it before the node is destroyed."""
        self.worker.stop()

    # The rest is its own business

    def _queue_size(self) -> int:
        return self.value("queue_size")

    def _work(self, item: Any) -> None:
        if self.core is None:
            self.core = self.build(self.camera)
        try:
            self.process(item)
        except Exception:
            self.health.refused += 1
            raise

    def _rebuild(self) -> None:
        self.core, self._last_stamp = None, None

    def on_change(self, changes: dict[str, parameters.Value]) -> None:
        self._changed |= changes
        options = self.options()
        self.worker.request(lambda: self.core is not None and setattr(self.core, "options", options))

    def _dropped(self, _: Any) -> None:
        self.health.dropped += 1

    def _failed(self, error: Exception) -> None:
        if not self.context.ok():
            return  # the signal to end came first, and nothing can be published any more
        if isinstance(error, ValueError | OSError):
            self.fault(str(error))
        else:
            self.fault(f"unexpected {type(error).__name__}: {error}")
            self.get_logger().error("".join(traceback.format_exception(error)), throttle_duration_sec=10.0)

    def _on_camera_info(self, message: CameraInfo) -> None:
        calibration = (message.width, message.height, *message.k, message.distortion_model, *message.d)
        if calibration == self._calibration:
            return
        self._calibration = calibration
        try:
            camera = messages.camera_from_info(message)
        except ValueError as error:
            self.fault(f"camera_info: {error}")
            return
        if self.camera is not None and camera != self.camera:
            self.fault("camera_info changed: starting afresh with the new calibration")
            self.worker.request(self._rebuild)
        self.camera = camera

    def _publish_diagnostics(self) -> None:
        level, text = self.health.level(self.trouble())
        values = {**self.health.values(), "waiting": self.worker.waiting(), **self.values()}
        status = messages.diagnostic_status(level, self.get_fully_qualified_name(), text, values)
        self._diagnostics.publish(messages.diagnostic_array([status], self.get_clock().now().to_msg()))


def run(node_class: type[CoreNode], arguments: list[str] | None = None) -> None:
    """Spins a node until SIGINT or SIGTERM; exit code 0 then, 2 with one sentence where a parameter is wrong."""
    rclpy.init(args=arguments)
    node, code = None, 0
    try:
        node = node_class()
        node.worker.start()
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        executor.spin()
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except (ValueError, FileNotFoundError) as error:
        if node is not None:
            raise
        print(f"{node_class.role}: {error}", file=sys.stderr)
        code = 2
    finally:
        if node is not None:
            node.close()
            node.destroy_node()
        rclpy.try_shutdown()
    sys.exit(code)
