"""What the three nodes share: a life cycle around one core object in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import TimeoutError as Unfinished
import os
from pathlib import Path
from typing import Any

import numpy as np
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
import torch

from . import parameters
from .calibration import Calibration
from .condition import ACTIVE, Condition, FINALIZED, INACTIVE, UNCONFIGURED
from .diagnostics import Health
from .endpoints import Endpoints
from .images import image_from_camera
from .qos import Qualities
from .reporter import Reporter
from .stamps import Timeline, to_ns, watch_clock
from .weights import load_weights
from .worker import PATIENCE_S, Worker
from ..data.images import Greys
from ..geometry.camera import Camera
from ..matching import weights

END_S = 20.0  #: the end of the process waits this long for the piece of work in hand

SUCCESS, FAILURE = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE


class CoreNode(LifecycleNode):
    """
    A managed node around one core object.

    The core is built once its camera is known, and lives in the worker's thread.

    Configuring checks parameters and files and makes the topics and services; only an active node
    takes inputs and publishes; cleaning up frees all of it. Diagnostics are published in every
    state.

    A child says what its core is (``options``, ``build``), which topics and services it has
    (``configure``) and what one input does (``process``). It may say what keeps it from working
    (``blocker``) and what to warn of (``warning``), what it does when no input waits (``idle``),
    what happens when time goes back (``restart``), what its diagnostics add (``values``) and what
    it holds (``forget``).
    """

    #: matcher, bundle or learner: the node's name unless remapped, and its column of the
    #: parameters
    role: str
    feed: str  #: the topic without which it has nothing to do
    judged = False  #: whether who sends its inputs has judged their stamps

    def __init__(
        self, load: Callable[[Path, str], Any] = load_weights, **node_options: Any
    ) -> None:
        """``load`` reads weights files; nodes of one process may share what reads each once."""
        super().__init__(self.role, **node_options)
        self._load = load
        self._changed: dict[str, parameters.Value] = {}  # ROS tells of a change before it makes it
        self._wrong = parameters.declare(self, self.role, self.on_change)
        self.qos = Qualities(keep_all=self.value('image_qos') == 'keep_all')
        self.health = Health()
        self.state = UNCONFIGURED
        self.refusal = ''  #: why the last configuration was refused
        self.worker: Worker | None = None
        self.condition = Condition(self)
        self.reporter = Reporter(self, self.health, self.condition.describe, self.qos.keep_all)
        self.endpoints = Endpoints(self, self.reporter, lambda: self.worker)
        self.timeline = Timeline(self.judged, self.reporter.fault, self.restart)
        self._jumps = watch_clock(self.get_clock(), self.reporter.fault, self._post_restart)
        self.forget()
        # Simulated time may stand still; what a node says of itself must not
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(1.0, self._beat, clock=steady)

    # What a child says of itself

    def options(self) -> Any:
        """Return the core object's options."""
        raise NotImplementedError

    def build(self, camera: Camera) -> Any:
        """Return a fresh core object."""
        raise NotImplementedError

    def configure(self) -> None:
        """
        Read files, then make topics and services by ``endpoints``.

        ValueError or OSError refuses to be configured.
        """
        raise NotImplementedError

    def process(self, item: Any) -> None:
        """Work on one input; ValueError refuses it with a sentence."""
        raise NotImplementedError

    def queue_size(self) -> int:
        """Return how many inputs may wait for the core."""
        return self.value('queue_size')

    def begin(self) -> None:
        """Make the core's thread ready; runs there before all else."""
        if threads := self.value('threads'):
            torch.set_num_threads(threads)

    def idle(self) -> bool:
        """Do a piece of background work; False where there is none."""
        return False

    def blocker(self) -> str:
        """Return why inputs cannot be worked on now, or nothing."""
        if self.camera is None:
            return f'no usable camera_info has come on {self.resolve_topic_name("camera_info")}'
        return ''

    def warning(self) -> str:
        """Return what to warn of though nothing went wrong, or nothing."""
        return self.condition.warning()

    def values(self) -> dict[str, object]:
        """Return what diagnostics say beside the counters."""
        return {}

    def reset(self) -> str:
        """Start afresh with the next input; runs in the core's thread."""
        if self.core is not None:
            self.core.reset()
        self.timeline.forget()
        return 'starts afresh with the next image'

    def restart(self) -> None:
        """Forget what was of later times, for time went back; runs in the core's thread."""
        self.reset()

    def recalibrate(self, camera: Camera) -> None:
        """Take a changed camera; runs in the core's thread."""
        if not camera.goes_on_from(self.camera):
            self.timeline.forget()
        self.camera = camera
        if self.core is not None:
            self.core.recalibrate(camera)

    def on_change(self, changes: dict[str, parameters.Value]) -> None:
        """Change parameters, all of these together; ValueError refuses them."""
        before, self._changed = self._changed, self._changed | changes
        try:
            options = self.options()
        except ValueError:
            self._changed = before
            raise
        if self.worker is not None:
            self.worker.post(
                lambda: self.core is not None and setattr(self.core, 'options', options)
            )

    def forget(self) -> None:
        """Hold nothing, as before the node was configured."""
        self.camera: Camera | None = None
        self._greys = Greys()
        self.core: Any = None
        self.worker = None
        self.timeline.forget()
        self.condition.forget()

    # What a child uses

    def value(self, name: str) -> Any:
        """Return a parameter's value."""
        return self._changed.get(name, self.get_parameter(name).value)

    def load(self) -> tuple[torch.nn.Module, weights.WeightsInfo, Path]:
        """
        Return matcher, what is known of it, and path of parameter ``weights`` or the shipped file.

        Raises FileNotFoundError or ValueError.
        """
        path = Path(os.path.expanduser(self.value('weights') or weights.default_path()))
        return *self._load(path, self.value('device')), path

    def subscribe_to_images(self, callback: Callable[[Any], None]) -> None:
        """Subscribe to the camera's images, as ``image_transport`` says."""
        compressed = self.value('image_transport') == 'compressed'
        self.feed = 'image/compressed' if compressed else 'image'
        kind = CompressedImage if compressed else Image
        self.endpoints.subscribe(kind, self.feed, callback, self.qos.inputs)

    def receive(self, item: Any, fed: bool = True) -> None:
        """
        Queue an input for the core, if the node is active.

        fed: whether it came on the topic without which there is nothing to do.
        """
        if self.state == ACTIVE:
            if fed:
                self.condition.heard()
            self.health.received += 1
            self.worker.put(item)

    def decode(self, message: Image | CompressedImage) -> np.ndarray:
        """
        Return the image (H, W) uint8, whose stamp is checked.

        Only an image that can be read, and is the camera's, sets the time. Raises ValueError for
        another, and for one whose stamp does not go on.
        """
        image = image_from_camera(message, self.camera, self._greys)
        self.timeline.check(to_ns(message.header.stamp))
        return image

    # Its life

    def start(self) -> None:
        """Configure and activate the node. Raises ValueError with the reason where it refuses."""
        if self.trigger_configure() != SUCCESS or self.trigger_activate() != SUCCESS:
            raise ValueError(f'{self.get_name()}: {self.refusal}')

    def close(self) -> bool:
        """End the core's thread, and free what was configured; False where that thread hangs."""
        ended = self.worker is None or self.worker.stop(END_S)
        self.endpoints.close()
        self.forget()
        return ended

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.refusal = ''
        self.worker = Worker(
            process=self._work,
            ready=lambda: self.state == ACTIVE and not self.blocker(),
            on_error=self.reporter.failed,
            queue_size=self.queue_size(),
            on_drop=self._dropped,
            idle=lambda: self.state == ACTIVE and self.idle(),
        )
        topics = [self.resolve_topic_name(name) for name in ('image', 'image/compressed')]
        self._calibration = Calibration(self.value('rectified'), topics)
        try:
            if self._wrong:
                raise ValueError('; '.join(self._wrong.values()))
            self.options()
            self.configure()
            self.endpoints.subscribe(
                CameraInfo, 'camera_info', self._on_camera_info, self.qos.inputs
            )
            self.endpoints.offer_trigger('~/reset', self.reset)
        except Exception as error:
            expected = isinstance(error, ValueError | OSError)
            self.refusal = (
                str(error) if expected else f'unexpected {type(error).__name__}: {error}'
            )
            if not self.value('autostart'):  # start says it otherwise
                self.get_logger().error(f'not configured: {self.refusal}')
            self.close()
            return FAILURE
        self.worker.post(self.begin)
        self.worker.post(self.condition.prepare)
        self.worker.start()
        self.state = INACTIVE
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        result = super().on_activate(state)
        self.condition.heard()
        self.state = ACTIVE
        return result

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.state = INACTIVE
        self.worker.clear()
        try:
            # the piece of work in hand ends first
            self.worker.request(lambda: None).result(timeout=PATIENCE_S)
        except Unfinished:
            self.reporter.fault(
                f'not deactivated: one piece of work has taken more than {PATIENCE_S:.0f} s'
            )
            self.state = ACTIVE
            return FAILURE
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.state = UNCONFIGURED
        self.close()
        return super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.state = FINALIZED
        self.close()
        return super().on_shutdown(state)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.state = UNCONFIGURED
        self.close()
        return SUCCESS

    # The rest is its own business

    def _work(self, item: Any) -> None:
        processed = self.health.processed
        try:
            if self.core is None:
                self.core = self.build(self.camera)
            self.process(item)
        except Exception:
            # what was published before something else went wrong is not refused
            self.health.refused += self.health.processed == processed
            raise

    def _dropped(self, _: Any) -> None:
        self.health.dropped += 1

    def _on_camera_info(self, message: CameraInfo) -> None:
        try:
            camera = self._calibration.read(message)
        except ValueError as error:
            self.reporter.fault(f'camera_info: {error}')
            return
        if camera is None:
            return
        before = self.camera
        goes_on = before is not None and camera.goes_on_from(before)
        if before is None:
            self.camera = camera
        elif not goes_on:
            self.reporter.fault('camera_info changed: starting afresh with the new calibration')
        if not goes_on:
            for doubt in self._calibration.doubts(camera):
                self.get_logger().warning(doubt)
        if before is not None and camera != before:
            self.worker.post(lambda: self.recalibrate(camera))

    def _post_restart(self) -> None:
        if self.worker is not None:
            self.worker.post(self.restart)

    def _beat(self) -> None:
        """Say how the node is, once a second, whatever its core is at."""
        if self.worker is not None:
            self.worker.check_progress()
        faults = self.health.faults
        self.reporter.publish()
        self.health.said(faults)
