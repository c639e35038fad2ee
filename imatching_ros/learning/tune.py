"""Tracker, bundle and learner in one process, offline over recordings, deterministic by seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import nn

from . import checkpoints
from .learner import Learner, StepResult
from .options import LearnerOptions
from .verdict import Verdict
from .. import files
from ..bundle.bundle import Bundle
from ..geometry.camera import Camera
from ..matching import weights
from ..matching.tracker import Tracker, TrackerOptions
from ..pipeline import Frame, track_and_solve

GAP = 5  #: images between those that train and those that judge
VALIDATION = 0.15  #: of each recording's images, the last ones, judge
PATIENCE = 5  #: verdicts in a row without a promotion, after which there is no more to gain
#: Where recordings give fewer windows to learn from, keyframes are set twice as densely, and
#: twice again: offline nothing hurries, and a short clip has no other windows.
ENOUGH, DENSITIES = 6, (1, 2, 4)


class Images(Protocol):
    """
    A recording's images, (stamp ns, (H, W) uint8) in order, iterated once in each epoch.

    Where the camera changes among them they have ``camera_of(stamp)``, as a Recording does.
    """

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]: ...


class TooFewWindowsError(ValueError):
    """The recordings show too little to learn from; the text says why, in one sentence."""


#: One recording: its camera, and its images.
Recording = tuple[Camera, Images]


@dataclass
class History:
    """What happened in a tune, for the report."""

    steps: list[StepResult] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    resumed: int = 0  #: steps that an earlier run had done
    #: checkpoints that could not be taken up, one sentence each
    refused: list[str] = field(default_factory=list)
    stopped: str = ''  #: why it ended before the last step, one sentence


def tune(
    matcher: nn.Module,
    info: weights.WeightsInfo,
    recordings: Sequence[Recording],
    steps: int,
    *,
    epochs: int = 2,
    options: LearnerOptions | None = None,
    tracker_options: TrackerOptions | None = None,
    folder: Path | None = None,
    on_frame: Callable[[int, int], None] = lambda done, total: None,
    on_step: Callable[
        [Learner, StepResult | None, Verdict | None], None
    ] = lambda learner, step, verdict: None,
) -> tuple[Learner, History]:
    """
    Fine-tune on recordings: in each epoch all are tracked and solved, then learned from.

    Each recording is split by time: its first images train, the last ``VALIDATION`` of them, after
    a gap, are the gate's, where they give a window. Short ones get denser keyframes. It ends after
    ``steps``, or where the gate has promoted nothing in ``PATIENCE`` verdicts in a row. folder: of
    checkpoints; where one is there that the same call has left behind, the run goes on from it, to
    the same bits. on_frame is told after each image how many have been tracked, and how many will
    be. Raises ValueError where the checkpoints are another call's, TooFewWindowsError where the
    recordings gave too few windows to learn from and to judge by.
    """
    options = options or LearnerOptions()

    tracking = tracker_options or TrackerOptions()
    job = {
        'start': info.sha256, 'images': [len(images) for _, images in recordings],
        'steps': steps, 'epochs': epochs,
        'options': asdict(options), 'tracker': asdict(tracking),
    }
    showing = Showing(recordings, tracking, epochs, on_frame)
    history, idle = History(), 0
    earlier = _earlier(folder, job)  # the weights that each epoch of an interrupted run began with
    for epoch in range(epochs):
        if epoch == 0:
            learner = showing.first(matcher, info, options)
        begins_with = earlier[epoch] if epoch < len(earlier) else learner.weights()
        if epoch:
            showing.again(learner, *weights.loads(begins_with))
        if epoch + 1 < len(earlier):
            continue  # the interrupted run has learned from it
        if epoch + 1 == len(earlier):
            idle = _take_up(folder, learner, history)
        target, failures = steps * (epoch + 1) // epochs, 0
        while learner.step_count < target and failures < 50 and idle < PATIENCE:
            step = learner.step()
            failures = failures + 1 if step is None else 0
            verdict = learner.verdict(now=learner.step_count == steps)
            if step:
                history.steps.append(step)
            if verdict:
                history.verdicts.append(verdict)
                idle = 0 if verdict.promoted else idle + 1
            if folder is not None and step and learner.settled:
                if not (folder / _epoch_name(epoch)).is_file():
                    files.write(folder / _epoch_name(epoch), begins_with)
                checkpoints.save(
                    folder, learner, job=job, epoch=epoch, idle=idle, history=asdict(history)
                )
            on_step(learner, step, verdict)
        if target and learner.step_count == 0:
            raise TooFewWindowsError(
                f'the recordings gave {learner.windows} solved windows, too few to learn from '
                'and to judge by; they need more images, more sideways motion, or more texture'
            )
    if idle >= PATIENCE:
        history.stopped = f'the gate found nothing certainly better in {idle} verdicts in a row'
    return learner, history


class Showing:
    """Shows the recordings to a learner, once for each epoch, in windows that are dense enough."""

    def __init__(
        self, recordings: Sequence[Recording], tracking: TrackerOptions, epochs: int,
        on_frame: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.recordings, self.tracking, self.on_frame = recordings, tracking, on_frame
        self.parallax, self.done, self.epochs = tracking.parallax, 0, epochs
        self.part = first_images  # that trains
        self.total = self._all_in_all(first_images)

    def first(
        self, matcher: nn.Module, info: weights.WeightsInfo, options: LearnerOptions
    ) -> Learner:
        """Return a learner that has seen all once."""
        for density in DENSITIES:
            if density > 1:
                options = replace(options, new_keyframes=1)
                self.total = self.done + self._all_in_all(first_images)
            self.tracking = replace(self.tracking, parallax=self.parallax / density)
            learner = Learner(matcher, info, self.recordings[0][0], options)
            self.part = first_images
            self._show(learner, matcher, info, last_images, True)
            if learner.windows > 0:
                self._show(learner, matcher, info, first_images, False)
            else:
                # The last images are too few to give a window: all train but for one window in so
                # many
                self.part = _all
                self.total = self.done + self.epochs * self._count(_all)
                self._show(learner, matcher, info, _all, None)
            if len(learner.inputs.lessons) >= ENOUGH and len(learner.inputs.held_out):
                break
        return learner

    def again(self, learner: Learner, matcher: nn.Module, info: weights.WeightsInfo) -> None:
        """Show what trains, tracked by other weights."""
        self._show(learner, matcher, info, self.part, False)

    def _show(
        self, learner: Learner, matcher: nn.Module, info: weights.WeightsInfo,
        part: Callable[[int], tuple[int, int]], held_out: bool | None,
    ) -> None:
        for camera, images in self.recordings:
            tracker = Tracker(matcher, info.version, camera, self.tracking)
            for _ in watch(learner, images, tracker, held_out, *part(len(images))):
                self.done += 1
                self.on_frame(self.done, self.total)

    def _all_in_all(self, part: Callable[[int], tuple[int, int]]) -> int:
        return self._count(last_images) + self.epochs * self._count(part)

    def _count(self, part: Callable[[int], tuple[int, int]]) -> int:
        return sum(len(range(*part(len(images)))) for _, images in self.recordings)


def watch(
    learner: Learner, images: Images, tracker: Tracker, held_out: bool | None,
    first: int = 0, last: int | None = None,
) -> Iterator[Frame]:
    """
    Let a learner see a recording's images, ``first`` to before ``last``; yield each, seen.

    ``held_out`` as in :meth:`Learner.add_window`.
    """
    learner.start_recording(tracker.camera)
    bundle = Bundle(tracker.camera, learner.bundle)
    for frame in track_and_solve(images, tracker, bundle, first, last):
        learner.recalibrate(frame.camera)
        learner.add_image(frame.stamp, frame.image)
        learner.add_correspondences(frame.correspondences)
        if frame.estimate.window is not None:
            learner.add_window(frame.estimate.window, held_out)
        yield frame


def first_images(count: int) -> tuple[int, int]:
    """Return the images, first and last (exclusive), that train."""
    return 0, max(last_images(count)[0] - GAP, 0)


def last_images(count: int) -> tuple[int, int]:
    """Return the images, first and last (exclusive), that judge."""
    return count - round(VALIDATION * count), count


def _all(count: int) -> tuple[int, int]:
    return 0, count


def _epoch_name(epoch: int) -> str:
    return f'epoch_{epoch}.safetensors'


def _earlier(folder: Path | None, job: dict) -> list[bytes]:
    """
    Return the weights that each epoch of an interrupted run of the same job began with.

    There are none for a new run. Raises ValueError where another job has left the folder.
    """
    for path in checkpoints.manifests(folder) if folder is not None else ():
        try:
            notes = checkpoints.read(path)[0]['notes']
        except ValueError:
            continue
        if notes.get('job') != job:
            raise ValueError(
                f'{folder} was left by a run with other images or options; finish that one or '
                'remove it'
            )
        return [(folder / _epoch_name(epoch)).read_bytes() for epoch in range(notes['epoch'] + 1)]
    return []


def _take_up(folder: Path, learner: Learner, history: History) -> int:
    """
    Bring learner and history to where the interrupted run was.

    Returns how many verdicts in a row had promoted nothing.
    """
    notes, history.refused = checkpoints.resume(folder, learner)
    history.steps = [StepResult(**step) for step in notes['history']['steps']]
    history.verdicts = [Verdict(**verdict) for verdict in notes['history']['verdicts']]
    history.resumed = learner.step_count
    return notes['idle']
