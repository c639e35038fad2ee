"""``imatching tune``: weights that were trained on recordings, and what they are worth."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
import shutil
from statistics import median
import time

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
import torch

from . import Nothing
from .common import (
    compare,
    console,
    open_given,
    report,
    run_folder,
    say,
    true_poses,
    warn,
    warn_of,
)
from .. import files, kernels
from ..data.recording import Recording
from ..evaluation.pictures import Event, Pictures
from ..learning import tune
from ..learning.learner import Learner, StepResult
from ..learning.options import LearnerOptions
from ..learning.verdict import Verdict
from ..matching import weights

EPOCHS = 2


def run(options: argparse.Namespace) -> None:
    """Fine-tune on recordings, deterministic by seed; go on with an interrupted run."""
    torch.manual_seed(options.seed)
    checkpoints = options.out.with_name(options.out.name + '.checkpoints')
    start = options.weights or _where_to_start(checkpoints, options.out)
    matcher, info = weights.load(start)
    say(f'starting from {start}, version {info.version}')
    recordings = [open_given(bag, options) for bag in options.bag]
    kernels.show()
    with console.status('Looking through the images'):
        counts = [sum(1 for _ in recording) for recording in recordings]
    for recording in recordings:
        warn_of(recording)
    splits = [round(count * options.train_fraction) for count in counts]
    run_dir = run_folder(options.run_dir, 'tune')
    started = time.perf_counter()
    with _Shown(options.steps, options.out) as shown:
        try:
            learner, history = tune.tune(
                matcher,
                info,
                [(r.camera, _First(r, n)) for r, n in zip(recordings, splits, strict=True)],
                options.steps,
                epochs=EPOCHS,
                options=LearnerOptions(seed=options.seed, objective=options.objective),
                folder=checkpoints,
                on_frame=shown.frame,
                on_step=shown.step,
            )
        except tune.TooFewWindowsError as error:
            raise Nothing(str(error)) from None
    if history.resumed:
        say(f'went on from step {history.resumed} of an interrupted run')
    for note in filter(None, (*history.refused, history.stopped)):
        warn(note)
    files.write(options.out, learner.weights())
    # Not from the files: where --out is gone on from, `start` is overwritten by now
    tuned, _ = weights.loads(learner.weights())
    compared = compare(recordings[0], splits[0], matcher, tuned)
    figures = {
        'input': {
            'frames': sum(map(len, recordings)),
            'frames_matched': sum(splits),
            'dropped': 0,
            'true_poses': true_poses(recordings[0]),
        },
        'matching': {'before': compared.before, 'after': compared.after},
        'learning': {
            'steps': learner.step_count,
            'windows': learner.windows,
            'promotions': learner.promotions,
            'rollbacks': learner.rollbacks,
            'seconds': time.perf_counter() - started,
            'model_version': learner.version,
        },
        'latency_ms': {
            'learner_step_p50': median(1e3 * step.seconds for step in history.steps)
            if history.steps else None
        },
    }
    pictures = Pictures(
        *compared.typical,
        loss=[(step.step, step.loss) for step in history.steps],
        events=[
            Event.of_verdict(
                v.step, v.promoted, v.rolled_back, v.version, v.reason, v.figures
            )
            for v in history.verdicts
        ],
    )
    report(run_dir, figures, pictures, f'tune {recordings[0].bag.name}')
    shutil.rmtree(checkpoints, ignore_errors=True)
    say(f'weights, version {learner.version}: {options.out}')


def _where_to_start(checkpoints: Path, out: Path) -> Path:
    """
    Return the weights to start from where none were given.

    They are those that an interrupted run began with, else those that are to be written, else the
    shipped ones: ``out`` may hold by now what an interrupted run had promoted.
    """
    interrupted = sorted(checkpoints.glob('epoch_0.safetensors'))
    there = next((path for path in (*interrupted, out) if path.is_file()), None)
    return there or weights.default_path()


class _First:
    """The first images of a recording, as often as they are asked for."""

    def __init__(self, recording: Recording, count: int) -> None:
        self.recording, self.count = recording, count
        self.camera_of = recording.camera_of

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        return islice(self.recording, self.count)


class _Shown(Progress):
    """Two bars, the images that are tracked and the steps; what is promoted is written."""

    def __init__(self, steps: int, out: Path) -> None:
        super().__init__(
            TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), console=console,
        )
        self.out = out
        self.tracking = self.add_task('Tracking', total=None)
        self.learning = self.add_task('Learning', total=steps)

    def frame(self, done: int, total: int) -> None:
        self.update(self.tracking, completed=done, total=total)

    def step(self, learner: Learner, step: StepResult | None, verdict: Verdict | None) -> None:
        if step:
            text = f'Learning, loss {step.loss:.3f}'
            self.update(self.learning, completed=step.step, description=text)
        if verdict:
            kept = 'promoted' if verdict.promoted else 'not promoted'
            console.print(
                f'step {verdict.step}: {kept}, {verdict.reason}',
                style='green' if verdict.promoted else None,
            )
            if verdict.promoted:
                files.write(self.out, learner.weights())
