"""
What the three nodes share.

A life cycle, parameters, camera, a core object in a thread of its own, diagnostics.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as Unfinished
import contextlib
import copy
import os
from pathlib import Path
import textwrap
import time
import traceback
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
import numpy as np
from rclpy.clock import Clock, ClockType, JumpThreshold
from rclpy.duration import Duration
from rclpy.lifecycle import (
    LifecycleNode,
    LifecyclePublisher,
    LifecycleState,
    TransitionCallbackReturn,
)
from rclpy.qos import (
    DurabilityPolicy,
    HistoryPolicy,
    QoSProfile,
    ReliabilityPolicy,
)
from rclpy.qos_overriding_options import QoSOverridingOptions
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Header
from std_srvs.srv import Trigger
import torch

from . import messages, parameters
from .diagnostics import ERROR, Health, OK, WARN
from .worker import Worker
from .. import kernels
from ..data.images import Greys
from ..data.stamps import LEAP_NS, RESTART, RESTART_NS, SAME, Stamps
from ..geometry.camera import Camera, is_rectified, unclear
from ..matching import weights

UNCONFIGURED, INACTIVE, ACTIVE, FINALIZED = 'unconfigured', 'inactive', 'active', 'finalized'
SENTENCE = 400  #: characters of what is said, at most
REPEAT_S = 5.0  #: the same sentence goes to the log this seldom
SILENCE_S = 2.0  #: without input for this long, an active node says so
BUSY_S = 20.0  #: one piece of work that takes this long is said
PATIENCE_S = 60.0  #: a service or a transition waits this long for the piece of work in hand
END_S = 20.0  #: and the end of the process this long
STILL_BUSY = 'the node is still busy; try again'  #: says a service that has waited so long

SUCCESS, FAILURE = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE


def load_weights(path: Path, device: str) -> tuple[torch.nn.Module, weights.WeightsInfo]:
    """
    Return the matcher of a weights file, on a device.

    FileNotFoundError or ValueError, one sentence each.
    """
    matcher, info = weights.load(path)
    return placed(matcher, device), info


def placed(matcher: torch.nn.Module, device: str) -> torch.nn.Module:
    """Return the matcher on a device; ValueError where torch has no such device."""
    try:
        return matcher.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"parameter 'device' is '{device}', which torch cannot use: {reason}"
        ) from None


def lossless() -> QoSProfile:
    """Everything arrives and waits until it is read."""
    return QoSProfile(history=HistoryPolicy.KEEP_ALL, reliability=ReliabilityPolicy.RELIABLE)


def sensor_data() -> QoSProfile:
    """
    Return the QoS of a sensor, with room for a second of a camera's images.

    Those that the middleware overwrites while a node is held up nobody counts.
    """
    return QoSProfile(depth=30, reliability=ReliabilityPolicy.BEST_EFFORT)


def latched(depth: int = 1) -> QoSProfile:
    """Whoever comes late still gets the last ``depth``."""
    return QoSProfile(
        depth=depth, reliability=ReliabilityPolicy.RELIABLE,
        durability=DurabilityPolicy.TRANSIENT_LOCAL,
    )


class CoreNode(LifecycleNode):
    """
    A managed node around one core object.

    This is built once its camera is known and lives in the worker's thread.

    Configuring checks parameters and files and makes the topics and services; only an active node
    takes inputs and publishes; cleaning up frees all of it. Diagnostics are published in every
    state.

    A child says what its core is (``options``, ``build``), which topics and services it has
    (``configure``), what one input does (``process``), and may say why it cannot work
    (``trouble``), what it does when no input waits (``idle``), what happens when time goes back
    (``restart``), what its diagnostics add (``values``) and what it holds (``forget``).
    """

    #: matcher, bundle or learner: the node's name unless remapped, and its column of the
    #: parameters
    role: str
    feed: str  #: the topic without which it has nothing to do
    judged = False  #: whether who sends its inputs has judged their stamps

    def __init__(
        self, load: Callable[[Path, str], Any] = load_weights, **node_options: Any
    ) -> None:
        """
        ``load``: what reads weights files.

        Nodes of one process may share one that reads each only once.
        """
        super().__init__(self.role, **node_options)
        self._load = load
        self._changed: dict[str, parameters.Value] = {}  # ROS tells of a change before it makes it
        self._wrong = parameters.declare(self, self.role, self.on_change)
        self.health = Health()
        self.state = UNCONFIGURED
        self.refusal = ''  #: why the last configuration was refused
        self.worker: Worker | None = None
        self._configured = contextlib.ExitStack()  # what cleaning up undoes
        self._last_said = ('', 0.0)
        self.forget()
        self._diagnostics = self.create_publisher(DiagnosticArray, '/diagnostics', 10)
        # Simulated time may stand still; what a node says of itself must not
        self.create_timer(
            1.0, self._beat, clock=Clock(clock_type=ClockType.STEADY_TIME)
        )
        threshold = JumpThreshold(
            min_forward=Duration(nanoseconds=LEAP_NS),
            min_backward=Duration(nanoseconds=-RESTART_NS),
            on_clock_change=False,
        )  # fmt: skip
        self._jump = self.get_clock().create_jump_callback(
            threshold, post_callback=self._on_clock_jump
        )

    # What a child says of itself

    def options(self) -> Any:
        """Return the core object's options."""
        raise NotImplementedError

    def build(self, camera: Camera) -> Any:
        """Return a fresh core object."""
        raise NotImplementedError

    def configure(self) -> None:
        """
        Files, then topics and services, by ``tell``, ``hear`` and ``serve``.

        ValueError or OSError refuses.
        """
        raise NotImplementedError

    def process(self, item: Any) -> None:
        """One input; ValueError refuses it with a sentence."""
        raise NotImplementedError

    def begin(self) -> None:
        """Do the first thing in the core's thread."""
        if threads := self.value('threads'):
            torch.set_num_threads(threads)

    def idle(self) -> bool:
        """Do a piece of background work; False where there is none."""
        return False

    def trouble(self) -> str:
        """Why inputs cannot be worked on now, or nothing."""
        if self.camera is None:
            return f'no usable camera_info has come on {self.resolve_topic_name("camera_info")}'
        return ''

    def concern(self) -> str:
        """Return what to warn of though nothing went wrong, or nothing."""
        if (stuck := self.worker.stuck) > BUSY_S:
            return f'the node hangs: its work has taken no processor time for {stuck:.0f} s'
        if (busy := self.worker.busy()) > BUSY_S:
            return f'one piece of work has taken {busy:.0f} s so far'
        if (silence := time.monotonic() - self._last_heard) > SILENCE_S:
            return f'nothing has come on {self.resolve_topic_name(self.feed)} for {silence:.0f} s'
        return ''

    def values(self) -> dict[str, object]:
        """Return what diagnostics say beside the counters."""
        return {}

    def reset(self) -> str:
        """Start afresh with the next input; runs in the core's thread."""
        if self.core is not None:
            self.core.reset()
        self._stamps = Stamps(self.judged)
        return 'starts afresh with the next image'

    def restart(self) -> None:
        """Time went back: what is remembered of later times goes; runs in the core's thread."""
        self.reset()

    def recalibrate(self, camera: Camera) -> None:
        """Take a changed camera; runs in the core's thread."""
        if not camera.goes_on_from(self.camera):
            self._stamps = Stamps(self.judged)
        self.camera = camera
        if self.core is not None:
            self.core.recalibrate(camera)

    def forget(self) -> None:
        """Nothing is known yet, or any more."""
        self.camera: Camera | None = None
        self._greys = Greys()
        self.core: Any = None
        self.worker = None
        self._results: dict[str, LifecyclePublisher] = {}  # by topic
        self.prepared = False  #: whether what it computes with is compiled
        self._stamps = Stamps(self.judged)
        self._calibration: CameraInfo | None = None
        self._last_heard = 0.0

    # What a child uses

    def value(self, name: str) -> Any:
        """Return a parameter's value."""
        return self._changed.get(name, self.get_parameter(name).value)

    def load(self) -> tuple[torch.nn.Module, weights.WeightsInfo, Path]:
        """
        Return the file of parameter ``weights``, or the shipped one.

        FileNotFoundError or ValueError.
        """
        path = Path(os.path.expanduser(self.value('weights') or weights.default_path()))
        return *self._load(path, self.value('device')), path

    @property
    def keeps_all(self) -> bool:
        return self.value('image_qos') == 'keep_all'

    @property
    def input_qos(self) -> QoSProfile:
        return lossless() if self.keeps_all else sensor_data()

    @property
    def result_qos(self) -> QoSProfile:
        return lossless() if self.keeps_all else QoSProfile(depth=10)

    @property
    def window_qos(self) -> QoSProfile:
        return latched(100 if self.keeps_all else 1)

    def tell(self, kind: type, topic: str, qos: QoSProfile) -> LifecyclePublisher:
        """Make a publisher until the node is cleaned up; silent while it is not active."""
        publisher = self.create_lifecycle_publisher(
            kind, topic, copy.copy(qos),
            qos_overriding_options=QoSOverridingOptions.with_default_policies(),
        )
        self._configured.callback(self.destroy_lifecycle_publisher, publisher)
        self._results[topic] = publisher
        return publisher

    def hear(
        self, kind: type, topic: str, callback: Callable[[Any], None], qos: QoSProfile
    ) -> None:
        """
        Make a subscription until the node is cleaned up.

        What ``callback`` raises is said, and ends nothing.
        """

        def heard(message: Any) -> None:
            try:
                callback(message)
            except Exception as error:
                self._failed(error)

        subscription = self.create_subscription(
            kind, topic, heard, copy.copy(qos),
            qos_overriding_options=QoSOverridingOptions.with_default_policies(),
        )
        self._configured.callback(self.destroy_subscription, subscription)

    def hear_images(self, callback: Callable[[Any], None]) -> None:
        """Subscribe to the camera's images, as ``image_transport`` says."""
        compressed = self.value('image_transport') == 'compressed'
        self.feed = 'image/compressed' if compressed else 'image'
        self.hear(CompressedImage if compressed else Image, self.feed, callback, self.input_qos)

    def serve(self, name: str, action: Callable[[], str]) -> None:
        """
        Offer a Trigger service.

        Its ``action`` runs in the core's thread and returns what to say.
        """

        def answer(_: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
            response.success, response.message = self.ask(name, action)
            return response

        self.answer(Trigger, name, answer)

    def answer(self, kind: type, name: str, callback: Callable[[Any, Any], Any]) -> None:
        """Offer a service until the node is cleaned up."""
        self._configured.callback(self.destroy_service, self.create_service(kind, name, callback))

    def ask(self, name: str, action: Callable[[], str]) -> tuple[bool, str]:
        """Run ``action`` in the core's thread and wait: whether it went well, and what it says."""
        try:
            return True, self.worker.request(action).result(timeout=PATIENCE_S)
        except (Unfinished, CancelledError):  # first, for it may be an OSError too
            return False, STILL_BUSY
        except (ValueError, OSError) as error:
            self.fault(f'{name}: {error}')
            return False, str(error)
        except Exception as error:
            self._failed(error)
            return False, self.health.last_error

    def receive(self, item: Any, fed: bool = True) -> None:
        """
        Queue an input for the core.

        ``fed``: it came on the topic without which there is nothing to do.
        """
        if self.state == ACTIVE:
            if fed:
                self._last_heard = time.monotonic()
            self.health.received += 1
            self.worker.put(item)

    def look(self, message: Image | CompressedImage) -> np.ndarray:
        """
        Return the image (H, W) uint8.

        Only one that can be read, and is the camera's, sets the time.
        """
        (height, width), camera = messages.image_size(message), self.camera
        if (width, height) != (camera.width, camera.height):
            raise ValueError(
                f'the image is {width}x{height}, camera_info says {camera.width}x{camera.height}; '
                'publish the camera_info that belongs to the image'
            )
        image = messages.image_from_message(message, self._greys)
        self.follow(messages.to_ns(message.header.stamp))
        return image

    def follow(self, stamp: int) -> None:
        """
        Keep time by the rule of ``data.stamps``.

        ValueError for a stamp that does not go on; start afresh where the stamps begin again,
        which takes a second message to believe.
        """
        last = self._stamps.last
        reason = self._stamps.judge(stamp)
        if reason == RESTART:
            self.fault(f'the clock went back by {(last - stamp) / 1e9:.3f} s: starting afresh')
            self.restart()
            self._stamps.restart(stamp)
        elif reason and abs(stamp - last) < RESTART_NS:
            what = 'the same stamp as' if reason == SAME else 'an older stamp than'
            raise ValueError(
                f'a message with {what} the one before is ignored; check for a second publisher'
            )
        elif reason:
            raise ValueError(
                f'a message with a stamp {abs(stamp - last) / 1e9:.3f} s '
                f'{"ahead of" if stamp > last else "behind"} the one before is ignored, unless '
                'the next one goes on from it; check the clocks'
            )
        elif last is not None and stamp - last > LEAP_NS:
            self.fault(
                f'the clock went forward by {(stamp - last) / 1e9:.3f} s from one message to '
                'the next'
            )

    def fault(self, sentence: str) -> None:
        """Say it in diagnostics, and in the log unless it was just said there."""
        # what a broken message names may be anything
        sentence = textwrap.shorten(sentence, SENTENCE, placeholder=' …')
        said, when = self._last_said
        if sentence != said or time.monotonic() > when + REPEAT_S:
            self._last_said = sentence, time.monotonic()
            self.get_logger().error(sentence)
        self.health.fault(sentence)

    # Its life

    def start(self) -> None:
        """Configure and activate the node. Raises ValueError with the reason where it refuses."""
        if self.trigger_configure() != SUCCESS or self.trigger_activate() != SUCCESS:
            raise ValueError(f'{self.get_name()}: {self.refusal}')

    def close(self) -> bool:
        """End the core's thread, and free what was configured; False where that thread hangs."""
        ended = self.worker is None or self.worker.stop(END_S)
        self._configured.close()
        self.forget()
        return ended

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.refusal = ''
        self.worker = Worker(
            self._work, lambda: self.state == ACTIVE and not self.trouble(), self._failed,
            self._queue_size(),
            self._dropped, lambda: self.state == ACTIVE and self.idle(),
        )  # fmt: skip
        try:
            if self._wrong:
                raise ValueError('; '.join(self._wrong.values()))
            self.options()
            self.configure()
            self.hear(CameraInfo, 'camera_info', self._on_camera_info, self.input_qos)
            self.serve('~/reset', self.reset)
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
        self.worker.post(self._prepare)
        self.worker.start()
        self.state = INACTIVE
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        result = super().on_activate(state)
        self._last_heard = time.monotonic()
        self.state = ACTIVE
        return result

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.state = INACTIVE
        self.worker.clear()
        try:
            # the piece of work in hand ends first
            self.worker.request(lambda: None).result(timeout=PATIENCE_S)
        except Unfinished:
            self.fault(
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

    def _queue_size(self) -> int:
        return self.value('queue_size')

    def _prepare(self) -> None:
        """Have the kernels compiled before the first input, and say what they wait for or lack."""

        def say(done: int, total: int, _: str) -> None:
            if done < total:
                self.get_logger().info(kernels.state())

        try:
            kernels.prepare(say)
        finally:
            self.prepared = True
        if notice := kernels.state():
            self.get_logger().warning(notice)
        self.get_logger().info('ready')

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

    def _dropped(self, _: Any) -> None:
        self.health.dropped += 1

    def _failed(self, error: Exception) -> None:
        if not self.context.ok():
            return  # the signal to end came first, and nothing can be published any more
        if isinstance(error, ValueError | OSError):
            self.fault(str(error))
        else:
            self.fault(f'unexpected {type(error).__name__}: {error}')
            self.get_logger().error(
                ''.join(traceback.format_exception(error)), throttle_duration_sec=10.0
            )
        if self.keeps_all:  # a replay waits until each image is answered or refused
            self._publish_diagnostics()

    def _on_camera_info(self, message: CameraInfo) -> None:
        message.header = Header()  # its stamp is each image's own, the calibration is not
        if message == self._calibration:
            return
        self._calibration = message
        try:
            camera = Camera.from_camera_info(message, self._rectified())
        except ValueError as error:
            self.fault(f'camera_info: {error}')
            return
        before = self.camera
        if before is None:
            self.camera = camera
            self._doubt(camera, message)
            return
        if not camera.goes_on_from(before):
            self.fault('camera_info changed: starting afresh with the new calibration')
            self._doubt(camera, message)
        if camera != before:
            self.worker.post(lambda: self.recalibrate(camera))

    def _doubt(self, camera: Camera, info: CameraInfo) -> None:
        """Say what is odd about the camera, and where nothing tells which one it is."""
        for doubt in camera.doubts():
            self.get_logger().warning(f'camera_info: {doubt}')
        if self.value('rectified') == 'auto' and not self._rectified():
            topic = self.resolve_topic_name('image')
            if (apart := unclear(info, topic)) is not None:
                self.get_logger().warning(
                    f"the images of {topic} are taken as raw, by camera_info's K and D; by P "
                    f'pixels lie up to {apart:.0f} px elsewhere: if they are rectified, set the '
                    'parameter rectified to always, else to never'
                )

    def _rectified(self) -> bool:
        if (given := self.value('rectified')) != 'auto':
            return given == 'always'
        # Whether the camera_info's P or K describes an image, the image's name alone tells
        names = ('image', 'image/compressed')
        return any(is_rectified(self.resolve_topic_name(name)) for name in names)

    def _on_clock_jump(self, jump: Any) -> None:
        seconds = jump.delta.nanoseconds / 1e9
        if self.get_clock().now().nanoseconds <= jump.delta.nanoseconds:
            return  # from zero: the clock was set
        if seconds > 0:
            self.fault(f'the clock on /clock went forward by {seconds:.3f} s')
            return
        self.fault(f'the clock on /clock went back by {-seconds:.3f} s: starting afresh')
        if self.worker is not None:
            self.worker.post(self.restart)

    def _condition(self) -> tuple[int, str]:
        """Return what diagnostics say in one level and one sentence."""
        if self.worker is not None and not self.prepared:
            return WARN, kernels.state() or 'getting ready'
        if self.state != ACTIVE:
            return (ERROR, f'{self.state}: {self.refusal}') if self.refusal else (OK, self.state)
        level, text = self.health.level(self.trouble())
        concerns = '; '.join(filter(None, (self.concern(), kernels.state())))
        return (WARN, concerns) if level == OK and concerns else (level, text)

    def _beat(self) -> None:
        """Once a second the node says how it is, whatever its core is at."""
        if self.worker is not None:
            self.worker.look()
        faults = self.health.faults
        self._publish_diagnostics()
        self.health.said(faults)

    def _publish_diagnostics(self) -> None:
        (level, text), worker = self._condition(), self.worker
        values = {
            'lifecycle': self.state,
            'ready': self.state == ACTIVE and self.prepared,
            **self.health.values(),
            'waiting': worker.waiting() if worker else 0,
            'busy_s': worker.busy() if worker else 0.0,
            # before, it may wait for another process that compiles
            'stuck_s': worker.stuck if worker and self.prepared else 0.0,
            **{
                f'{topic}_listeners': publisher.get_subscription_count()
                for topic, publisher in self._results.items()
            },
            **self.values(),
        }
        status = messages.diagnostic_status(level, self.get_fully_qualified_name(), text, values)
        self._diagnostics.publish(
            messages.diagnostic_array([status], self.get_clock().now().to_msg())
        )
