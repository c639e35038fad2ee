"""Play a recording through the three real nodes, in three processes, without loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
from dataclasses import dataclass, field
import os
from pathlib import Path
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np

try:
    import rclpy
except ImportError:
    raise RuntimeError(
        "ROS 2 is not installed: source an installation, or pip install 'imatching_ros[ros]'; "
        'tune and evaluate work without it'
    ) from None
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus  # noqa: I100
from nav_msgs.msg import Odometry
from rclpy.context import Context
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud2
from std_srvs.srv import SetBool, Trigger

from . import messages, parameters
from .core_node import latched, lossless
from .run_files import read_trajectory
from ..data.recording import Recording
from ..matching import weights as weights_files

#: images that may be on their way to the matcher: it never waits for one, and none piles up
IN_FLIGHT = 3
BUNDLE_BACKLOG = 100  #: the player pauses while the bundle is this many images behind
STALL_S = 60.0  #: no answer from a living node for this long is an error
#: Environment variable and value that keep ROS on this machine
LOCALHOST = (
    ('ROS_LOCALHOST_ONLY', '1') if os.environ.get('ROS_DISTRO') == 'humble'
    else ('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
)  # fmt: skip
IDLE_S = 15.0  #: learning ends early when no gradient step has come for this long


@dataclass(frozen=True)
class LearningEvent:
    """One message of the learner: a gradient step or a verdict of the gate."""

    kind: str  #: "step" or "verdict"
    seconds: float  #: since the first image was played
    text: str
    #: step: step, loss, seconds, rows; verdict: step, promoted, version, reason, figures
    values: Mapping[str, str]


@dataclass(frozen=True)
class ReplayResult:
    """
    What came out of a replay.

    Poses are ``tx ty tz qx qy qz qw`` of T_world_camera; stamps are in ns.
    """

    run_dir: Path
    frames: int  #: images played
    train_frames: int  #: the first of them, those that were played while the learner was on
    matched: int  #: images for which correspondences came
    dropped: int  #: the others
    refused: int  #: images among those that the matcher refused
    frame_stamps: np.ndarray  #: (matched,) int64
    frame_rows: np.ndarray  #: (matched,) int64, correspondences of each image
    #: (matched,) int64, version of the weights that made them; -1 without rows
    frame_models: np.ndarray
    keyframe_stamps: np.ndarray  #: (K,) int64, all keyframes of the run
    keyframe_poses: np.ndarray  #: (K, 7), the last solved pose of each
    odometry_stamps: np.ndarray  #: (N,) int64
    odometry_poses: np.ndarray  #: (N, 7)
    landmarks: np.ndarray  #: (L, 3)
    learning: list[LearningEvent]
    weights_before: Path
    weights_after: Path  #: the same file where nothing was promoted
    #: the first, and then each promoted version in the run folder, oldest first
    weights: list[Path]
    diagnostics: dict[str, dict[str, str]]  #: the last key-values of matcher, bundle and learner
    play_seconds: float
    learning_seconds: float  #: from the first gradient step to the last
    notes: list[str] = field(default_factory=list)  #: what went wrong without ending the run

    @property
    def throughput_hz(self) -> float:
        return self.frames / self.play_seconds

    @property
    def peak_memory_mb(self) -> float:
        """Sum of the nodes' peaks."""
        return sum(float(values['peak_memory_mb']) for values in self.diagnostics.values())

    def figure(self, node: str, key: str) -> float | None:
        """Return a number from a node's diagnostics, or None where there is none."""
        try:
            value = float(self.diagnostics[node][key])
        except (KeyError, ValueError):
            return None
        return value if np.isfinite(value) else None


class ReplayError(RuntimeError):
    """A node died or hangs; the message says which and why, in one sentence."""


def replay(
    recording: Recording,
    run_dir: Path,
    *,
    learn: bool = True,
    train_fraction: float = 1.0,
    learn_seconds: float = 0.0,
    weights: Path | None = None,
    progress: bool = True,
    node_parameters: Mapping[str, Mapping[str, parameters.Value]] | None = None,
) -> ReplayResult:
    """
    Play the recording through matcher, bundle and (with ``learn``) learner.

    The learner sees the first ``train_fraction`` of the images, then goes on with what it has for
    up to ``learn_seconds``, and is off while the rest is played: those images never train.
    ``node_parameters`` are further parameters for each node, ``{"matcher": {"queries": 300}}``.
    Writes trajectory.txt, landmarks.ply, weights/ and logs/ into ``run_dir``. Raises ReplayError;
    FileNotFoundError or ValueError for unusable weights; FileExistsError where ``run_dir`` holds
    the weights of another run.
    """
    run_dir = Path(run_dir).resolve()
    weights_dir = run_dir / 'weights'
    if weights_dir.exists():
        raise FileExistsError(
            f'{run_dir} holds the weights of another run; choose another run folder'
        )
    source = Path(weights or weights_files.default_path())
    _, info = weights_files.load(source)
    before = weights_dir / f'version_{info.version:04d}.safetensors'
    weights_files.write(before, source.read_bytes())

    common = {
        'image_qos': 'keep_all', 'image_transport': recording.transport, 'weights': str(before),
        'rectified': 'never',  # they are told the finished camera
    }
    given = {
        'matcher': {**common, 'processing_mode': 'all'},
        'bundle': {'map_dir': str(run_dir), 'rectified': 'never'},
        # it is nice to the others
        'learner': {**common, 'weights_dir': str(weights_dir), 'threads': 0},
    }
    roles = parameters.NODES if learn else parameters.NODES[:2]
    frames = len(recording)
    train_frames = round(frames * train_fraction) if learn else 0
    with contextlib.ExitStack() as stack:
        domain = stack.enter_context(free_domain())
        nodes = stack.enter_context(
            _node_processes(roles, given, node_parameters or {}, run_dir / 'logs', domain)
        )
        player = stack.enter_context(_player(recording, domain, nodes))
        bar = stack.enter_context(_Bar(progress))
        player.wait_for_nodes(roles)
        images = _Images(recording, player)
        if learn:
            bar.begin('Playing, learning' if train_fraction > 0 else 'Playing', train_frames)
            images.play(train_frames, bar)
            player.drain(roles)
            bar.begin('Learning', None)
            player.learn(learn_seconds, bar)
            player.stop_learning()
        if train_frames < frames:
            bar.begin('Playing', frames - train_frames)
            images.play(frames - train_frames, bar)
        player.drain(roles)
        player.collect()
        player.save_map()
    return _result(player, images, nodes, run_dir, before, train_frames)


def _result(
    player: _Player, images: _Images, nodes: _Processes, run_dir: Path, before: Path,
    train_frames: int,
) -> ReplayResult:
    keyframe_stamps, keyframe_poses = read_trajectory(run_dir)
    matched = np.array(player.matched, np.int64).reshape(-1, 3)
    versions = sorted((run_dir / 'weights').glob('version_*.safetensors'))
    steps = [event.seconds for event in player.learning if event.kind == 'step']
    diagnostics = {
        name: values for name, values in player.diagnostics.items() if name in nodes.roles
    }
    return ReplayResult(
        run_dir=run_dir,
        frames=images.sent,
        train_frames=train_frames,
        matched=len(matched),
        dropped=images.sent - len(matched),
        refused=int(diagnostics['matcher']['refused']),
        frame_stamps=matched[:, 0],
        frame_rows=matched[:, 1],
        frame_models=matched[:, 2],
        keyframe_stamps=keyframe_stamps,
        keyframe_poses=keyframe_poses,
        odometry_stamps=np.array(sorted(player.odometry), np.int64),
        odometry_poses=np.array(
            [player.odometry[stamp] for stamp in sorted(player.odometry)]
        ).reshape(-1, 7),
        landmarks=np.array(list(player.landmarks.values())).reshape(-1, 3),
        learning=player.learning,
        weights_before=before,
        weights_after=versions[-1],
        weights=versions,
        diagnostics=diagnostics,
        play_seconds=images.seconds,
        learning_seconds=steps[-1] - steps[0] if steps else 0.0,
        notes=[*player.notes, *nodes.notes],
    )


class _Player(Node):
    """Publishes images and camera_info, and writes down all that the nodes answer."""

    def __init__(self, recording: Recording, context: Context, processes: _Processes) -> None:
        super().__init__('player', context=context, enable_rosout=False)
        self.processes = processes
        self.changed = threading.Condition()
        self.notes: list[str] = []
        self.matched: list[tuple[int, int, int]] = []
        self.odometry: dict[int, np.ndarray] = {}
        self.landmarks: dict[int, np.ndarray] = {}
        self.windows = 0
        self.learning: list[LearningEvent] = []
        self.diagnostics: dict[str, dict[str, str]] = {}
        self._heard: dict[str, int] = {}
        self._started = time.monotonic()
        compressed = recording.transport == 'compressed'
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
        correspondences = messages.correspondences_from_cloud(message)
        rows = len(correspondences)
        self.matched.append((correspondences.stamp, rows, correspondences.model if rows else -1))

    def _on_odometry(self, message: Odometry) -> None:
        self.odometry[messages.to_ns(message.header.stamp)] = messages.pose_from_message(
            message.pose.pose
        ).numpy()

    def _on_landmarks(self, message: PointCloud2) -> None:
        track, points = messages.landmarks_from_cloud(message)
        self.landmarks.update(zip(track.tolist(), points, strict=True))
        self.windows += 1

    def _on_learning(self, message: DiagnosticStatus) -> None:
        kind = message.name.rpartition(' ')[2]
        values = {pair.key: pair.value for pair in message.values}
        self.learning.append(
            LearningEvent(kind, time.monotonic() - self._started, message.message, values)
        )

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            name = status.name.strip('/')
            self.diagnostics[name] = {pair.key: pair.value for pair in status.values} | {
                'message': status.message
            }
            self._heard[name] = self._heard.get(name, 0) + 1

    # Waiting

    def wait(
        self,
        condition: Callable[[], bool],
        what: str,
        timeout: float = STALL_S,
        stall: bool = True,
    ) -> bool:
        """
        Wait until ``condition``, while all nodes live.

        Without an answer for ``timeout``: ReplayError, or False.
        """
        deadline = time.monotonic() + timeout
        while True:
            with self.changed:
                if condition():
                    return True
                self.changed.wait(0.2)
            self.processes.check()
            if time.monotonic() > deadline:
                if stall:
                    raise ReplayError(
                        f'no answer for {timeout:.0f} s while {what}; see {self.processes.logs}'
                    )
                return False

    def count(self, role: str, *keys: str) -> int:
        return sum(int(self.diagnostics.get(role, {}).get(key, 0)) for key in keys)

    def answered(self) -> int:
        """Images that the matcher has dealt with."""
        return len(self.matched) + self.count('matcher', 'refused', 'dropped')

    def wait_for_nodes(self, roles: tuple[str, ...]) -> None:
        """Until each node has spoken and every topic has all its ends."""
        learner = int('learner' in roles)
        subscribers = {
            '/correspondences': 2 + learner, '/keyframes': learner, '/landmarks': 1 + learner,
        }
        publishers = {
            '/correspondences': 1, '/odometry': 1, '/keyframes': 1, '/landmarks': 1,
            '/learning': learner,
        }

        def connected() -> bool:
            return (
                all(role in self.diagnostics for role in roles)
                and self.image.get_subscription_count() >= 1 + learner
                and self.camera_info.get_subscription_count() >= 2 + learner
                and all(
                    self.count_subscribers(topic) >= ends for topic, ends in subscribers.items()
                )
                and all(self.count_publishers(topic) >= ends for topic, ends in publishers.items())
                and self._save_map.service_is_ready()
                and (not learner or self._enable.service_is_ready())
            )

        self.wait(connected, 'waiting for the nodes to find each other', timeout=120.0)
        time.sleep(0.3)  # nodes see each other a moment after they are seen here
        self._started = time.monotonic()

    def fresh(self, roles: tuple[str, ...]) -> None:
        """Until each node has spoken twice more, so that what it says is of now."""
        heard = dict(self._heard)
        self.wait(
            lambda: all(self._heard.get(role, 0) >= heard[role] + 2 for role in roles),
            'waiting for diagnostics',
        )

    def drain(self, roles: tuple[str, ...]) -> None:
        """Until every node has worked off what it was sent."""
        self.fresh(roles)
        while True:
            done = self.count('bundle', 'processed', 'refused', 'dropped')
            if done >= len(self.matched) and all(
                self.count(role, 'waiting') == 0 for role in roles
            ):
                return
            self.wait(
                lambda done=done: (
                    self.count('bundle', 'processed', 'refused', 'dropped') > done
                    or all(self.count(role, 'waiting') == 0 for role in roles)
                ),
                'waiting for the bundle node to finish',
            )
            self.fresh(roles)

    def collect(self) -> None:
        """Until all that the nodes say they published is here."""

        def all_here() -> bool:
            kinds = [event.kind for event in self.learning]
            return (
                len(self.odometry) >= self.count('bundle', 'poses')
                and self.windows >= self.count('bundle', 'windows')
                and kinds.count('step') >= self.count('learner', 'steps')
                and kinds.count('verdict') >= self.count('learner', 'verdicts')
            )

        if not self.wait(all_here, 'collecting', timeout=10.0, stall=False):
            self.notes.append(
                'some messages of the nodes did not arrive, so trajectory or loss may have gaps'
            )

    def save_map(self) -> None:
        """
        Have the bundle write what it knows.

        It alone knows the poses of keyframes that it placed late.
        """
        answer = self._save_map.call_async(Trigger.Request())
        self.wait(answer.done, 'saving the map')
        if not answer.result().success:
            raise ReplayError(f'the map was not saved: {answer.result().message}')
        if (maps := self.count('bundle', 'maps')) > 1:
            self.notes.append(
                f'the bundle lost its way and began {maps} maps, each with a scale of its own'
            )

    # The learner

    def learn(self, seconds: float, bar: _Bar) -> None:
        """
        Let the learner go on for ``seconds``.

        Or less where there is nothing to learn for a while.
        """
        begun = time.monotonic()
        while (now := time.monotonic()) < begun + seconds:
            bar.show(self.learning_state(), completed=now - begun, total=seconds)
            last = self._started + self.learning[-1].seconds if self.learning else begun
            if now - max(last, begun) > IDLE_S:
                self.notes.append(
                    f'the learner took no step for {IDLE_S:.0f} s, so learning ended early'
                )
                return
            self.processes.check()
            time.sleep(0.2)

    def learning_state(self) -> str:
        steps = [event for event in self.learning if event.kind == 'step']
        loss = f'step {len(steps)}, loss {float(steps[-1].values["loss"]):.3f}, ' if steps else ''
        return f'{loss}model {self.count("matcher", "model_version")}'

    def stop_learning(self) -> None:
        """Turn the learner off, and wait until the matcher uses what it promoted last."""
        answer = self._enable.call_async(SetBool.Request(data=False))
        self.wait(answer.done, 'turning the learner off', timeout=120.0)
        self.fresh(('matcher', 'learner'))
        versions = lambda role: self.count(role, 'model_version')  # noqa: E731
        self.wait(
            lambda: versions('matcher') == versions('learner'),
            'waiting for the matcher to load new weights',
        )


class _Images:
    """The recording's messages, played on from where the last call ended."""

    def __init__(self, recording: Recording, player: _Player) -> None:
        self._player = player
        self._messages = iter(recording.messages())
        self.sent = 0
        self.seconds = 0.0

    def play(self, count: int, bar: _Bar) -> None:
        """Play ``count`` images, each only when the matcher has dealt with those before."""
        player, begun, first = self._player, time.monotonic(), self.sent
        while self.sent < first + count and (entry := next(self._messages, None)) is not None:
            stamp, kind, recorded = entry
            if kind == 'camera':
                info = messages.camera_to_info(recorded, messages.header(stamp, 'camera'))
                player.camera_info.publish(info)
                continue
            self._wait(IN_FLIGHT - 1)
            player.image.publish(messages.from_recording(recorded, stamp))
            self.sent += 1
            bar.show(player.learning_state(), completed=self.sent - first)
        self._wait(0)
        self.seconds += time.monotonic() - begun

    def _wait(self, in_flight: int) -> None:
        player = self._player

        def free() -> bool:
            behind = len(player.matched) - player.count(
                'bundle', 'processed', 'refused', 'dropped'
            )
            return self.sent - player.answered() <= in_flight and behind < BUNDLE_BACKLOG

        player.wait(free, 'playing images')


class _Processes:
    """The nodes' processes."""

    def __init__(self, roles: tuple[str, ...], logs: Path) -> None:
        self.roles, self.logs = roles, logs
        self.running: dict[str, subprocess.Popen] = {}
        self.notes: list[str] = []

    def check(self) -> None:
        """Raise ReplayError where a node has ended."""
        for role, process in self.running.items():
            if process.poll() is not None:
                log = self.logs / f'{role}.log'
                lines = [
                    line for line in log.read_text(errors='replace').splitlines() if line.strip()
                ]
                last = lines[-1] if lines else 'nothing'
                raise ReplayError(
                    f'the {role} node ended with exit code {process.returncode}; the last line '
                    f'of {log} is: {last}'
                )


@contextlib.contextmanager
def _node_processes(
    roles: tuple[str, ...],
    given: Mapping[str, Mapping[str, parameters.Value]],
    further: Mapping[str, Mapping[str, parameters.Value]],
    logs: Path,
    domain: int,
) -> Iterator[_Processes]:
    """Start the nodes; end them by SIGINT, and only where that does not help by more."""
    logs.mkdir(parents=True, exist_ok=True)
    package_root = str(Path(__file__).parents[2])
    environment = os.environ | {
        'ROS_DOMAIN_ID': str(domain),
        LOCALHOST[0]: LOCALHOST[1],
        'PYTHONPATH': os.pathsep.join(
            filter(None, (package_root, os.environ.get('PYTHONPATH', '')))
        ),
        'PYTHONUNBUFFERED': '1',
        'OMP_NUM_THREADS': '1',
    }
    processes = _Processes(roles, logs)
    try:
        for role in roles:
            values = {'image_qos': 'keep_all', **given[role], **further.get(role, {})}
            assignments = [
                f'{name}:={parameters.yaml_scalar(value)}' for name, value in values.items()
            ]
            with open(logs / f'{role}.log', 'wb') as log:
                processes.running[role] = subprocess.Popen(
                    [sys.executable, '-m', f'imatching_ros.nodes.{role}', '--ros-args']
                    + [word for assignment in assignments for word in ('-p', assignment)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
        yield processes
    finally:
        for role, process in processes.running.items():
            for stop, patience in (
                (signal.SIGINT, 20.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0),
            ):
                if process.poll() is None:
                    process.send_signal(stop)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(patience)
            if process.returncode != 0:
                processes.notes.append(
                    f'the {role} node ended with exit code {process.returncode}'
                )


@contextlib.contextmanager
def _player(recording: Recording, domain: int, processes: _Processes) -> Iterator[_Player]:
    """Return a node that spins in a thread of its own, which is joined at the end."""
    name, value = LOCALHOST
    before = os.environ.get(name)
    os.environ[name] = value
    context = Context()
    rclpy.init(
        args=[], context=context, domain_id=domain, signal_handler_options=SignalHandlerOptions.NO
    )
    player = _Player(recording, context, processes)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(player)

    def spin() -> None:
        with contextlib.suppress(ExternalShutdownException):
            executor.spin()

    thread = threading.Thread(target=spin, name='player')
    thread.start()
    try:
        yield player
    finally:
        executor.shutdown()
        thread.join()
        player.destroy_node()
        rclpy.shutdown(context=context)
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def free_domain(among: Sequence[int] = range(1, 100)) -> Iterator[int]:
    """
    Give a ROS domain in which nobody on this machine speaks, and which nobody else is given.

    Its first DDS ports are free; its third, which DDS leaves alone, is held until the context
    ends, or the process, however that ends. ReplayError where none is free.
    """
    # whatever seed a caller has set
    for domain in random.SystemRandom().sample(among, len(among)):
        first = 7400 + 250 * domain
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as held:
            try:
                held.bind(('', first + 2))
                for port in (first, first + 10, first + 11):
                    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
                        udp.bind(('', port))
            except OSError:
                continue
            yield domain
            return
    raise ReplayError(
        'no ROS domain is free on this machine; end some of the ROS programs that run'
    )


class _Bar:
    """The progress bar: one line at a time, on stderr."""

    def __init__(self, shown: bool) -> None:
        self._progress = Progress(
            TextColumn('{task.description:>17}'), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn('{task.fields[state]}'), console=Console(stderr=True), disable=not shown,
        )  # fmt: skip
        self._task: Any = None

    def __enter__(self) -> _Bar:
        self._progress.start()
        self.begin('Starting nodes', None)
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, what: str, total: int | None) -> None:
        self._end()
        self._task = self._progress.add_task(what, total=total, state='')

    def show(self, state: str, completed: float, total: float | None = None) -> None:
        limits = {} if total is None else {'total': round(total)}
        self._progress.update(self._task, completed=round(completed), state=state, **limits)

    def _end(self) -> None:
        if self._task is not None:
            task = next(task for task in self._progress.tasks if task.id == self._task)
            if task.total is None:
                self._progress.remove_task(self._task)
