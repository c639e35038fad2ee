"""Offline: the tracker, the bundle and the learner in one process, over recordings, deterministic by seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from ..bundle.bundle import Bundle
from ..geometry.camera import Camera
from ..matching import weights
from ..matching.tracker import Tracker, TrackerOptions
from .gate import Verdict
from .learner import Learner, LearnerOptions, StepResult

#: One recording: its camera, and its images (stamp ns, (H, W) uint8), iterated once in each epoch.
Recording = tuple[Camera, Iterable[tuple[int, np.ndarray]]]


@dataclass
class History:
    """What happened, for the report."""

    steps: list[StepResult] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)


def tune(
    matcher: nn.Module,
    info: weights.WeightsInfo,
    recordings: list[Recording],
    steps: int,
    *,
    epochs: int = 2,
    options: LearnerOptions | None = None,
    tracker_options: TrackerOptions | None = None,
    on_frame: Callable[[int, int], None] = lambda epoch, stamp: None,
    on_step: Callable[[Learner, StepResult | None, Verdict | None], None] = lambda learner, step, verdict: None,
) -> tuple[Learner, History]:
    """Fine-tunes on recordings: in each epoch all are tracked and solved with the weights in use, then learned from.

    Raises ValueError where no recording gave a window to learn from.
    """
    learner = Learner(matcher, info, recordings[0][0], options)
    history = History()
    for epoch in range(epochs):
        in_use, info = weights.loads(learner.weights())
        for camera, images in recordings:
            learner.start_recording(camera)
            tracker = Tracker(in_use, info.version, camera, tracker_options)
            bundle = Bundle(camera, learner.bundle)
            for stamp, image in images:
                correspondences = tracker.track(stamp, image)
                learner.add_image(stamp, image)
                learner.add_correspondences(correspondences)
                estimate = bundle.add(correspondences)
                if estimate.window is not None:
                    learner.add_window(estimate.window)
                on_frame(epoch, stamp)
        target = steps * (epoch + 1) // epochs
        failures = 0
        while learner.step_count < target and failures < 50:
            step = learner.step()
            failures = failures + 1 if step is None else 0
            verdict = learner.verdict(now=learner.step_count == steps)
            if step:
                history.steps.append(step)
            if verdict:
                history.verdicts.append(verdict)
            on_step(learner, step, verdict)
        if target and learner.step_count == 0:
            raise ValueError(
                f"the recordings gave {learner.windows} solved windows, too few to learn from and to judge by; they "
                "need more images, more sideways motion, or more texture"
            )
    return learner, history
