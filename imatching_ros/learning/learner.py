"""The learner: takes images, correspondences and solved windows, gives weights (paper 3.2)."""

from __future__ import annotations

import copy
import random
import time
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..bundle.options import BundleOptions
from ..bundle.window import Window
from ..geometry.camera import Camera
from ..geometry.correspondences import Correspondences
from ..matching import weights
from . import gate
from .gate import Evidence, Verdict
from .lesson import Lesson, Pair, Survivors, make_lesson, match, objective, rematch, requery, resolve, survivors_of
from .probe import Probe, known_warp_loss, make_probe


@dataclass(frozen=True)
class LearnerOptions:
    """How fast, how much and how carefully."""

    rate: float = 2e-4  #: Adam's learning rate (the paper's is 1e-4, over hours)
    clip: float = 1.0  #: largest norm of a gradient
    average: float = 0.9  #: of the candidate's weights: what one step adds is one part in ten of what is judged
    coarse: float = 0.02  #: weight of the coarse head's loss
    anchor: float = 0.3  #: weight of the known warps: windows show few views, and what they do not show is forgotten
    targets: int = 2  #: keyframes j per step; each with all its references
    steps_per_solve: int = 5  #: gradient steps before the window is matched and solved anew
    lessons: int = 24  #: windows that are remembered
    new_keyframes: int = 3  #: by which a window must differ from the last one remembered
    held_out: int = 8  #: of so many windows one is held out, its images never train: the gate's evidence
    images: int = 200  #: that wait for their window
    verdict_every: int = 30  #: steps
    patience: int = 3  #: verdicts "worse" in a row before the candidate goes back to the weights in use
    seed: int = 0


@dataclass(frozen=True)
class StepResult:
    """One gradient step."""

    step: int
    loss: float  #: mean robust reprojection cost of the rows, before the step
    rows: int
    seconds: float


class Learner:
    """Fine-tunes a copy of the matcher on the robot's own windows; the gate decides what the robot gets.

    ``incumbent`` is what the robot uses, the candidate is what trains. All inputs may come in any order that a
    robot's messages come in; they are joined by stamp and kept in bounded buffers.
    """

    def __init__(
        self,
        matcher: nn.Module,
        info: weights.WeightsInfo,
        camera: Camera,
        options: LearnerOptions | None = None,
        bundle: BundleOptions | None = None,
    ) -> None:
        self.camera = camera
        self.options = options or LearnerOptions()
        self.bundle = bundle or BundleOptions()
        self.enabled = True
        self.step_count = self.promotions = self.rollbacks = self.skipped = 0
        self._history = [weights.dumps(matcher, info.version, info.parent)]  # what was in use, oldest first
        self._version = info.version
        self._random = random.Random(self.options.seed)
        self._images: OrderedDict[int, torch.Tensor] = OrderedDict()
        self._messages: OrderedDict[int, Correspondences] = OrderedDict()
        self._train: list[Lesson] = []
        self._held_out: list[tuple[Lesson, list[Pair]]] = []  # with the pairs of which neither image ever trained
        self._probes: list[Probe] = []
        self._anchors: list[Probe] = []
        self._held_stamps: set[int] = set()
        self._trained_stamps: set[int] = set()
        self._windows = 0
        self._last_stamps: set[int] = set()
        self._evidence: tuple[int, Evidence] | None = None  # of the incumbent, with the number of windows it is of
        self._device = next(matcher.parameters()).device
        self._start_candidate(matcher)

    def start_recording(self, camera: Camera) -> None:
        """Another camera, or another recording, from now on; what was learned and remembered stays."""
        self.camera = camera
        self._images.clear()
        self._messages.clear()
        self._last_stamps = set()

    # What comes in ------------------------------------------------------------------------------------------------

    def add_image(self, stamp: int, image: np.ndarray) -> None:
        """An image (H, W) uint8."""
        if self.enabled:
            _remember(self._images, stamp, torch.tensor(image).unsqueeze(0), self.options.images)

    def add_correspondences(self, correspondences: Correspondences) -> None:
        """The rows of an image."""
        if self.enabled:
            _remember(self._messages, correspondences.stamp, correspondences, self.options.images)

    def add_window(self, window: Window) -> bool:
        """A solved window; true where it was remembered as a lesson."""
        stamps = set(window.stamps.tolist())
        if not self.enabled or len(stamps - self._last_stamps) < self.options.new_keyframes:
            return False
        lesson = make_lesson(window, self._messages, self._images, self.camera)
        if lesson is None:
            return False
        self._last_stamps = stamps
        self._windows += 1
        fresh = _pairs_without(lesson, self._trained_stamps)  # windows overlap: some of its images may have trained
        due = not self._held_out or (self._windows - 2) % self.options.held_out == 0
        if self._train and due and fresh:
            self._held_out = (self._held_out + [(lesson, fresh)])[-4:]
            self._held_stamps |= stamps
            chosen = sorted({index for pair in fresh for index in (pair.reference, pair.target)})
            chosen = chosen[0], chosen[len(chosen) // 2]
            self._probes = (self._probes + [self._probe(lesson, k) for k in chosen])[-8:]
        else:
            self._train = (self._train + [lesson])[-self.options.lessons :]
            free = [k for k, stamp in enumerate(window.stamps.tolist()) if stamp not in self._held_stamps]
            if free:
                # The oldest: the windows to come, one of which will be held out, have left it behind
                self._anchors = (self._anchors + [self._probe(lesson, free[0])])[-self.options.lessons :]
                self._trained_stamps.add(int(window.stamps[free[0]]))
        return True

    # What goes on -------------------------------------------------------------------------------------------------

    @property
    def windows(self) -> int:
        """Windows remembered so far, held-out ones included."""
        return self._windows

    @property
    def version(self) -> int:
        """Of the weights in use."""
        return self._version

    @property
    def ready(self) -> bool:
        """Whether there is something to learn from, and something to judge by."""
        return self.enabled and bool(self._train) and bool(self._anchors) and bool(self._held_out)

    def step(self) -> StepResult | None:
        """One gradient step (equation 7), or None where there is nothing to learn from."""
        if not self.ready:
            return None
        started = time.perf_counter()
        if self._lesson is None or self._steps_left == 0:
            self._lesson = self._next_lesson()
            self._steps_left = self.options.steps_per_solve
            if self._lesson is None:
                return None
        self._steps_left -= 1
        lesson, survivors = self._lesson
        pairs = _pairs_without(lesson, self._held_stamps)
        # Neighbours share their references, so that few images are encoded for many pairs
        frames = sorted({pair.target for pair in pairs})
        first = self._random.randrange(max(len(frames) - self.options.targets, 0) + 1)
        pairs = [pair for pair in pairs if pair.target in frames[first : first + self.options.targets]]
        fine, coarse, rows = objective(
            lesson, survivors, pairs, match(self._candidate, lesson, pairs), self.bundle.adjust.kernel
        )
        if rows == 0:
            return None
        loss = fine / rows + self.options.coarse * coarse
        if self.options.anchor > 0:
            loss = loss + self.options.anchor * known_warp_loss(self._candidate, self._random.choice(self._anchors))
        for group in self._optimiser.param_groups:
            group["lr"] = self.options.rate
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._candidate.parameters(), self.options.clip)
        if not bool(norm.isfinite()):
            self.skipped += 1
            return None
        self._optimiser.step()
        self._average.update_parameters(self._candidate)
        self.step_count += 1
        stamps = lesson.window.stamps.tolist()
        self._trained_stamps.update(stamps[index] for pair in pairs for index in (pair.reference, pair.target))
        return StepResult(self.step_count, float(fine.detach()) / rows, rows, time.perf_counter() - started)

    def verdict(self, now: bool = False) -> Verdict | None:
        """The gate's word on the candidate, every ``verdict_every`` steps, or ``now``; None where no word is due."""
        steps = self.step_count - self._judged
        if not self._held_out or steps == 0 or (steps < self.options.verdict_every and not now):
            return None
        self._judged = self.step_count
        if self._evidence is None or self._evidence[0] != self._windows:
            incumbent, _ = weights.loads(self._history[-1][0])
            self._evidence = (self._windows, self._gather(incumbent.to(self._device)))
        candidate = self._average.module
        evidence = self._gather(candidate)
        mark, reason, figures = gate.judge(evidence, self._evidence[1])
        self._worse = self._worse + 1 if mark < 0 else 0
        if mark > 0:
            self._use(candidate, parent=self._version)
            self._evidence = (self._windows, evidence)
            self.promotions += 1
        rolled_back = self._worse >= self.options.patience
        if rolled_back:
            self._start_candidate(weights.loads(self._history[-1][0])[0])
            self.rollbacks += 1
            reason += "; the candidate goes back to the weights in use"
        return Verdict(self.step_count, mark > 0, rolled_back, self._version, reason, figures)

    def weights(self) -> bytes:
        """The weights file of what is in use."""
        return self._history[-1][0]

    def rollback(self) -> int:
        """Goes back to the weights that were in use before; the version still grows. Returns it."""
        before = self._history[max(len(self._history) - 2, 0)]
        del self._history[-2:]
        matcher, info = weights.loads(before[0])
        self._use(matcher, parent=info.version)
        self._start_candidate(matcher)
        self.rollbacks += 1
        return self._version

    def reset(self) -> int:
        """Forgets all and goes back to the first weights; the version still grows. Returns it."""
        matcher, info = weights.loads(self._history[0][0])
        self._images.clear()
        self._messages.clear()
        self._train, self._held_out, self._probes, self._anchors = [], [], [], []
        self._held_stamps.clear()
        self._trained_stamps.clear()
        self._last_stamps = set()
        self._use(matcher, parent=info.version)
        self._start_candidate(matcher)
        return self._version

    # ----------------------------------------------------------------------------------------------------------------

    def _start_candidate(self, matcher: nn.Module) -> None:
        self._candidate = copy.deepcopy(matcher).to(self._device)
        self._optimiser = torch.optim.Adam(self._candidate.parameters(), lr=self.options.rate)
        self._average = AveragedModel(self._candidate, multi_avg_fn=get_ema_multi_avg_fn(self.options.average))
        self._lesson = None
        self._steps_left = self._worse = 0
        self._judged = self._started = self.step_count

    def _use(self, matcher: nn.Module, parent: int) -> None:
        self._version += 1
        self._evidence = None
        self._history.append(weights.dumps(matcher, self._version, parent))
        del self._history[1:-10]  # the first and the last ten

    def _probe(self, lesson: Lesson, k: int) -> Probe:
        """A known warp of the k-th image of a lesson."""
        others = [image[0].numpy() for image in list(self._images.values())[:: 1 + len(self._images) // 32]]
        return make_probe(lesson.images[k, 0].numpy(), others, int(lesson.window.stamps[k]))

    def _gather(self, matcher: nn.Module) -> Evidence:
        return gate.gather(matcher, self._held_out, self._probes, self.bundle)

    def _next_lesson(self) -> tuple[Lesson, Survivors] | None:
        """A window as the candidate sees it now: matched again, the lower level solved again, with its survivors."""
        fallen = []
        while self._train:
            index = self._random.randrange(len(self._train))
            if _pairs_without(self._train[index], self._held_stamps):
                lesson = requery(self._train[index], self.bundle.prune_px)
                lesson = resolve(rematch(self._candidate, lesson), self.bundle)
                if lesson is not None:
                    self._train[index] = lesson
                    return lesson, survivors_of(lesson, self.bundle.prune_px)
                fallen.append(self._train[index])
            # No stationary point with enough survivors, or nothing but held-out images: nothing to be learned
            del self._train[index]
            self.skipped += 1
        if fallen and self.step_count > self._started:  # one after the other: the fault is the candidate's
            self._train = fallen
            self._start_candidate(weights.loads(self._history[-1][0])[0])
            self.rollbacks += 1
        return None


def _pairs_without(lesson: Lesson, stamps: set[int]) -> list[Pair]:
    """The pairs of which neither image has one of these stamps."""
    free = [stamp not in stamps for stamp in lesson.window.stamps.tolist()]
    return [pair for pair in lesson.pairs if free[pair.reference] and free[pair.target]]


def _remember(buffer: OrderedDict, key: int, value: object, most: int) -> None:
    buffer[key] = value
    while len(buffer) > most:
        buffer.popitem(last=False)
