"""The node that hears all that a replay's nodes say, and talks to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
from dataclasses import dataclass
import threading
import time
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from nav_msgs.msg import Odometry
import numpy as np
from rclpy import init, shutdown
from rclpy.context import Context
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud2
from std_srvs.srv import SetBool, Trigger

from .bar import Bar
from .processes import Processes, ReplayError
from ..nodes.clouds import correspondences_from_cloud, landmarks_from_cloud
from ..nodes.endpoints import STILL_BUSY
from ..nodes.learner import PARTS
from ..nodes.poses import pose_from_message
from ..nodes.qos import latched, lossless
from ..nodes.stamps import to_ns

TICK_S = 0.2  #: between two looks at the nodes while waiting
IDLE_S = 15.0  #: learning ends early when the learner has had nothing to do for this long
SETTLED_S = 10.0  #: what has not come when all nodes have rested for this long does not come


@dataclass(frozen=True)
class LearningEvent:
    """One message of the learner: a gradient step or a verdict of the gate."""

    kind: str  #: "step" or "verdict"
    seconds: float  #: since the first image was played
    text: str
    #: step: step, loss, seconds, rows; verdict: step, promoted, version, reason, figures
    values: Mapping[str, str]


class Observer(Node):
    """Writes down all that the nodes publish, waits for it, and has the ends of what they hear."""

    def __init__(self, transport: str, context: Context, nodes: Processes, bar: Bar) -> None:
        super().__init__('observer', context=context, enable_rosout=False)
        self.nodes, self.bar = nodes, bar
        self.changed = threading.Condition()
        self.notes: list[str] = []
        #: by stamp: how many correspondences the image has, and which weights made them
        self.matched: dict[int, tuple[int, int]] = {}
        self.odometry: dict[int, np.ndarray] = {}
        self.landmarks: dict[int, np.ndarray] = {}
        self.learning: list[LearningEvent] = []
        self._windows = 0
        self._started = time.monotonic()
        compressed = transport == 'compressed'
        self.image = self.create_publisher(
            CompressedImage if compressed else Image,
            'image/compressed' if compressed else 'image', lossless(),
        )
        self.camera_info = self.create_publisher(CameraInfo, 'camera_info', lossless())
        self._enable = self.create_client(SetBool, 'learner/enable')
        self._save_map = self.create_client(Trigger, 'bundle/save_map')
        for kind, topic, handle, qos in (
            (PointCloud2, 'correspondences', self._on_correspondences, lossless()),
            (Odometry, 'odometry', self._on_odometry, lossless()),
            (PointCloud2, 'landmarks', self._on_landmarks, latched(100)),
            (DiagnosticStatus, 'learning', self._on_learning, lossless()),
            (DiagnosticArray, '/diagnostics', self._on_diagnostics, lossless()),
        ):
            self.create_subscription(kind, topic, self._noting(handle), qos)

    # What comes

    def _noting(self, handle: Callable[[Any], None]) -> Callable[[Any], None]:
        def callback(message: Any) -> None:
            with self.changed:
                handle(message)
                self.changed.notify_all()

        return callback

    def _on_correspondences(self, message: PointCloud2) -> None:
        correspondences = correspondences_from_cloud(message)
        rows = len(correspondences)
        self.matched[correspondences.stamp] = rows, correspondences.model if rows else -1

    def _on_odometry(self, message: Odometry) -> None:
        self.odometry[to_ns(message.header.stamp)] = pose_from_message(
            message.pose.pose
        ).numpy()

    def _on_landmarks(self, message: PointCloud2) -> None:
        track, points = landmarks_from_cloud(message)
        self.landmarks.update(zip(track.tolist(), points, strict=True))
        self._windows += 1

    def _on_learning(self, message: DiagnosticStatus) -> None:
        kind = message.name.rpartition(' ')[2]
        values = {pair.key: pair.value for pair in message.values}
        self.learning.append(
            LearningEvent(kind, time.monotonic() - self._started, message.message, values)
        )

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            node = self.nodes.running.get(status.name.strip('/'))
            if node is not None:
                values = {pair.key: pair.value for pair in status.values}
                node.heard(values | {'message': status.message})

    # How far the nodes are

    def answered(self) -> int:
        """Images that the matcher has dealt with."""
        return len(self.matched) + self.nodes.count('matcher', 'refused', 'dropped')

    def owed(self, sent: int) -> dict[str, int]:
        """
        Return how many messages each node has not dealt with yet, after ``sent`` images.

        The learner takes images, their correspondences, and windows in several parts.
        """
        windows = max(self._windows, self.nodes.count('bundle', 'windows'))
        given = {
            'matcher': sent,
            'bundle': len(self.matched),
            'learner': sent + len(self.matched) + len(PARTS) * windows,
        }
        dealt = {role: self.nodes.count(role, 'processed', 'refused') for role in given}
        dealt['matcher'] = len(self.matched) + self.nodes.count('matcher', 'refused')
        return {role: given[role] - dealt[role] for role in self.nodes.running}

    def waiting(self, sent: int) -> dict[str, int]:
        """Return how many messages wait for each node: what it dropped does not."""
        return {
            role: owed - self.nodes.count(role, 'dropped')
            for role, owed in self.owed(sent).items()
        }

    # Waiting

    def wait(self, condition: Callable[[], bool], what: str, settle: float | None = None) -> bool:
        """
        Wait until ``condition``, while all nodes live; ReplayError names one that does not.

        With ``settle`` give up, and return False, once the nodes have rested for so many seconds.
        """
        self.nodes.rest()
        while True:
            with self.changed:
                if condition():
                    return True
                self.changed.wait(TICK_S)
                self.nodes.check(what)
                if settle is not None and self.nodes.idle() > settle:
                    return False
                self.bar.show(self.state())

    def state(self) -> str:
        """Say what the nodes are at: what others wait for, or what has been learned."""
        steps = [event for event in self.learning if event.kind == 'step']
        loss = f'step {len(steps)}, loss {float(steps[-1].values["loss"]):.3f}, ' if steps else ''
        learned = f'{loss}model {self.nodes.count("matcher", "model_version")}'
        return self.nodes.waits_for() or learned

    def wait_for_nodes(self) -> None:
        """Wait until each node can work and every topic has found all that listen to it."""
        learner = int('learner' in self.nodes.running)
        listeners = {
            'matcher': {'correspondences': 2 + learner},
            'bundle': {
                'odometry': 1, 'landmarks': 1 + learner, 'keyframes': learner, 'prior': learner,
            },
            'learner': {'learning': 1, 'weights': 1},
        }

        def connected() -> bool:
            return (
                self.image.get_subscription_count() >= 1 + learner
                and self.camera_info.get_subscription_count() >= 2 + learner
                and self._save_map.service_is_ready()
                and (not learner or self._enable.service_is_ready())
                and all(
                    node.says.get('ready') == 'true'
                    and all(
                        node.figure(f'{topic}_listeners') >= count
                        for topic, count in listeners[role].items()
                    )
                    for role, node in self.nodes.running.items()
                )
            )

        self.wait(connected, 'waiting for the nodes to find each other')
        self._started = time.monotonic()

    def fresh(self) -> None:
        """Wait until each node has spoken twice more, so that what it says is of now."""
        beats = {role: node.beats + 2 for role, node in self.nodes.running.items()}
        self.wait(
            lambda: all(self.nodes.running[role].beats >= count for role, count in beats.items()),
            'waiting for diagnostics',
        )

    def drain(self, sent: int) -> None:
        """Wait until every node has dealt with all that ``sent`` images made for it."""
        self.fresh()
        self.wait(
            lambda: not any(self.waiting(sent).values()), 'waiting for the nodes to finish',
            SETTLED_S,
        )
        self.fresh()

    def collect(self) -> None:
        """Wait until all that the nodes say they published is here."""

        def all_here() -> bool:
            kinds = [event.kind for event in self.learning]
            return (
                len(self.odometry) >= self.nodes.count('bundle', 'poses')
                and self._windows >= self.nodes.count('bundle', 'windows')
                and kinds.count('step') >= self.nodes.count('learner', 'steps')
                and kinds.count('verdict') >= self.nodes.count('learner', 'verdicts')
            )

        if not self.wait(all_here, 'collecting', SETTLED_S):
            self.notes.append(
                'some messages of the nodes did not arrive, so trajectory or loss may have gaps'
            )

    def save_map(self) -> None:
        """Have the bundle write what it knows: it alone has the poses of late keyframes."""
        success, said = self._call(self._save_map, Trigger.Request(), 'saving the map')
        if not success:
            raise ReplayError(f'the map was not saved: {said}')
        if (maps := self.nodes.count('bundle', 'maps')) > 1:
            self.notes.append(
                f'the bundle lost its way and began {maps} maps, each with a scale of its own'
            )

    # The learner

    def learn(self, seconds: float) -> None:
        """Let the learner go on for ``seconds``, or less where it has nothing to learn."""
        begun, learner = time.monotonic(), self.nodes.running['learner']
        learner.idle = 0

        def over() -> bool:
            passed = time.monotonic() - begun
            self.bar.show(self.state(), completed=min(passed, seconds), total=seconds)
            return passed >= seconds or learner.idle > IDLE_S

        self.wait(over, 'learning')
        if time.monotonic() < begun + seconds:
            self.notes.append(
                f'the learner took no step for {IDLE_S:.0f} s, so learning ended early'
            )

    def stop_learning(self) -> None:
        """Turn the learner off, and wait until the matcher uses what it promoted last."""
        success, said = self._call(
            self._enable, SetBool.Request(data=False), 'turning the learner off'
        )
        if not success:
            self.notes.append(f'the learner was turned off without a last verdict: {said}')
        self.fresh()
        self.wait(
            lambda: self.nodes.count('matcher', 'model_version')
            == self.nodes.count('learner', 'model_version'),
            'waiting for the matcher to load new weights',
        )

    def _call(self, client: Any, request: Any, what: str) -> tuple[bool, str]:
        """Call a service, again while its node is busy: whether it went well, and what it says."""
        while True:
            answer = client.call_async(request)
            self.wait(answer.done, what)
            if answer.result().success or answer.result().message != STILL_BUSY:
                return answer.result().success, answer.result().message


@contextlib.contextmanager
def observing(transport: str, nodes: Processes, bar: Bar) -> Iterator[Observer]:
    """Give an observer that spins in a thread of its own, which is joined at the end."""
    context = Context()
    init(
        args=[], context=context, domain_id=nodes.domain,
        signal_handler_options=SignalHandlerOptions.NO,
    )
    observer = Observer(transport, context, nodes, bar)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(observer)

    def spin() -> None:
        with contextlib.suppress(ExternalShutdownException):
            executor.spin()

    thread = threading.Thread(target=spin, name='observer')
    thread.start()
    try:
        yield observer
    finally:
        executor.shutdown()
        thread.join()
        observer.destroy_node()
        shutdown(context=context)
