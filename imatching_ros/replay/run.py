"""One replay, from the first process to the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
from dataclasses import dataclass, field
from pathlib import Path
import signal
import threading
from typing import Any

import numpy as np

from .bar import Bar
from .domain import free_domain, on_this_machine
from .feed import Feed
from .observer import LearningEvent, Observer, observing
from .processes import Processes, ReplayError
from .. import files, kernels
from ..data.recording import Recording
from ..matching import weights as weights_files
from ..nodes import parameters


@dataclass(frozen=True)
class ReplayResult:
    """
    What came out of a replay.

    Poses are ``tx ty tz qx qy qz qw`` of T_world_camera; stamps are in ns.
    """

    run_dir: Path
    sent: int  #: images played
    train_frames: int  #: the first of them, those that were played while the learner was on
    matched: int  #: images for which correspondences came
    refused: int  #: images that the matcher refused; a note has its reason
    #: what was lost for a node: images for the matcher, their correspondences for the bundle,
    #: messages for the learner; a note has the numbers of each
    dropped: int
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
        return self.sent / self.play_seconds

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
    Writes trajectory.txt, landmarks.ply, weights/ and logs/ into ``run_dir``. Raises ReplayError
    where a node dies or hangs, or no image can be matched; FileNotFoundError or ValueError for
    unusable weights; FileExistsError where ``run_dir`` holds the weights of another run. In the
    main thread SIGTERM and SIGHUP end the nodes too, and raise SystemExit.
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
    files.write(before, source.read_bytes())

    roles = parameters.NODES if learn else parameters.NODES[:2]
    given = _parameters(recording.transport, run_dir, before, node_parameters or {})
    train_frames = round(len(recording) * train_fraction) if learn else 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ended_by(signal.SIGTERM, signal.SIGHUP))
        bar = stack.enter_context(Bar(progress))
        _prepare(bar)
        bar.begin('Starting nodes', None)
        domain = stack.enter_context(free_domain())
        (run_dir / 'logs').mkdir(exist_ok=True)
        stack.enter_context(on_this_machine(run_dir / 'logs' / 'fastdds.xml'))
        nodes = stack.enter_context(_ending(Processes(run_dir / 'logs', domain)))
        for role in roles:
            nodes.start(role, given[role])
        observer = stack.enter_context(observing(recording.transport, nodes, bar))
        observer.wait_for_nodes()
        feed = Feed(recording, observer, {role: given[role]['queue_size'] for role in roles})
        if learn:
            bar.begin('Playing, learning' if train_fraction > 0 else 'Playing', train_frames)
            feed.play(train_frames)
            observer.drain(feed.sent)
            bar.begin('Learning', None)
            observer.learn(learn_seconds)
            observer.stop_learning()
        if train_frames < len(recording):
            bar.begin('Playing', len(recording) - train_frames)
            feed.play(len(recording) - train_frames)
        observer.drain(feed.sent)
        if not observer.matched:
            reasons = [nodes.running['matcher'].says['last_error'], *recording.notes()]
            raise ReplayError(f'no image could be matched: {"; ".join(filter(None, reasons))}')
        observer.collect()
        observer.save_map()
    return _result(observer, feed, run_dir, before, train_frames)


def _parameters(
    transport: str, run_dir: Path, weights: Path,
    further: Mapping[str, Mapping[str, parameters.Value]],
) -> dict[str, dict[str, parameters.Value]]:
    """Return the parameters of each node in a replay."""
    common = {
        'image_qos': 'keep_all', 'image_transport': transport, 'weights': str(weights),
    }
    given = {
        'matcher': {**common, 'processing_mode': 'all'},
        'bundle': {'image_qos': 'keep_all', 'map_dir': str(run_dir)},
        # it is nice to the others
        'learner': {**common, 'weights_dir': str(weights.parent), 'threads': 0},
    }
    queue_size = next(p.default for p in parameters.TABLE if p.name == 'queue_size')
    # images and camera of a recording have been brought together already
    every = {'rectified': 'never', 'queue_size': queue_size}
    return {role: {**every, **given[role], **further.get(role, {})} for role in given}


def _prepare(bar: Bar) -> None:
    """Compile before the nodes do, each for itself and unseen; they find it cached."""

    def show(done: int, total: int, name: str) -> None:
        if not done:
            bar.begin('Compiling', total)
        bar.show(kernels.state(), completed=done)

    kernels.prepare(show)


@contextlib.contextmanager
def _ending(nodes: Processes) -> Iterator[Processes]:
    """Have the nodes end with the context; at once where that is interrupted once more."""
    try:
        yield nodes
    finally:
        try:
            nodes.end()
        except BaseException:
            nodes.kill()
            raise


@contextlib.contextmanager
def _ended_by(*signals: signal.Signals) -> Iterator[None]:
    """
    Have signals that would end this process raise SystemExit, so that what it began is undone.

    Its code is what a shell says of such an end: 128 and the signal's number.
    """
    before: dict[int, Any] = {}

    def end(number: int, _: Any) -> None:
        for one in before:  # a closing terminal sends several
            signal.signal(one, signal.SIG_IGN)
        raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        before = {
            one: signal.signal(one, end)
            for one in signals if signal.getsignal(one) is signal.SIG_DFL
        }
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _result(
    observer: Observer, feed: Feed, run_dir: Path, before: Path, train_frames: int
) -> ReplayResult:
    nodes = observer.nodes
    keyframe_stamps, keyframe_poses = files.read_tum(run_dir / files.TRAJECTORY)
    matched = np.array([(stamp, *of) for stamp, of in observer.matched.items()], np.int64)
    odometry = sorted(observer.odometry)
    versions = sorted((run_dir / 'weights').glob('version_*.safetensors'))
    steps = [event.seconds for event in observer.learning if event.kind == 'step']
    refused, lost = nodes.count('matcher', 'refused'), observer.owed(feed.sent)
    notes = [*observer.notes, *nodes.notes]
    if refused:
        reason = nodes.running['matcher'].says['last_error']
        notes.append(f'the matcher refused {refused} of {feed.sent} images; the last: {reason}')
    notes += [
        f'the {role} node went without {count} of the messages it was sent'
        for role, count in lost.items() if count
    ]
    if notice := kernels.state():
        notes.append(notice)
    return ReplayResult(
        run_dir=run_dir,
        sent=feed.sent,
        train_frames=train_frames,
        matched=len(matched),
        refused=refused,
        dropped=sum(lost.values()),
        frame_stamps=matched[:, 0],
        frame_rows=matched[:, 1],
        frame_models=matched[:, 2],
        keyframe_stamps=keyframe_stamps,
        keyframe_poses=keyframe_poses,
        odometry_stamps=np.array(odometry, np.int64),
        odometry_poses=np.array([observer.odometry[stamp] for stamp in odometry]).reshape(-1, 7),
        landmarks=np.array(list(observer.landmarks.values())).reshape(-1, 3),
        learning=observer.learning,
        weights_before=before,
        weights_after=versions[-1],
        weights=versions,
        diagnostics={role: node.says for role, node in nodes.running.items()},
        play_seconds=feed.seconds,
        learning_seconds=steps[-1] - steps[0] if steps else 0.0,
        notes=notes,
    )
