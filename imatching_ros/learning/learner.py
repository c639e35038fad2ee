"""The learner: takes images, correspondences and solved windows, gives weights (paper 3.2)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable
import copy
from dataclasses import asdict, dataclass
import random
import time
from typing import Any

import numpy as np
import torch
from torch import nn, Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from . import gate, sgp
from .gate import Evidence, Verdict
from .lesson import (
    Lesson,
    make_lesson,
    match,
    objective,
    Pair,
    rematch,
    requery,
    resolve,
    Survivors,
    survivors_of,
)
from .memory import Memory
from .probe import known_warp_loss, make_probe, Probe
from ..bundle.options import BundleOptions
from ..bundle.window import Window
from ..geometry.camera import Camera
from ..geometry.correspondences import Correspondences
from ..matching import weights

OBJECTIVES = ('imatching', 'sgp')
_COUNTERS = (
    'step_count', 'promotions', 'rollbacks', 'skipped', 'stale', '_turn', '_worse', '_idle',
    '_judged',
    '_started',
)  # fmt: skip
_ADAM = ('step', 'exp_avg', 'exp_avg_sq')
TRAINED = 4000  #: newest stamps that trained, so that no window with one of them becomes evidence


@dataclass(frozen=True)
class LearnerOptions:
    """How fast, how much and how carefully."""

    #: the bundle's reprojection error, or "sgp": two views, RANSAC, no bundle
    objective: str = 'imatching'
    rate: float = 5e-4  #: Adam's learning rate (the paper's is 1e-4, over hours)
    clip: float = 1.0  #: largest norm of a gradient
    #: of the candidate's weights: what one step adds is one part in ten of what is judged
    average: float = 0.9
    coarse: float = 0.2  #: weight of the coarse head's loss
    #: weight of the known warps: windows show few views, and what they do not show is forgotten
    anchor: float = 0.3
    targets: int = 2  #: keyframes j per step; each with all its references
    steps_per_solve: int = 5  #: gradient steps before the window is matched and solved anew
    lessons: int = 24  #: windows that are remembered, half of them of earlier places
    new_keyframes: int = 3  #: by which a window must differ from the last one remembered
    #: of so many windows one is held out, its images never train: the gate's evidence
    held_out: int = 8
    judged: int = 6  #: held-out windows that are remembered, half of them of earlier places
    images: int = 200  #: that wait for their window
    #: versions by which the weights behind a window may be older than those in use
    max_age: int = 3
    #: share of one processor's time that steps and verdicts may take: they rest in between
    duty: float = 1.0
    verdict_every: int = 30  #: steps
    #: verdicts "worse" in a row, or twice as many that promote nothing, before the candidate goes
    patience: int = 3
    #: back to the weights in use
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"the learner's objective '{self.objective}' is not known; use "
                f'{" or ".join(OBJECTIVES)}'
            )
        if not 0.0 < self.duty <= 1.0:
            raise ValueError(
                f"the learner's duty is {self.duty:g}, it must lie above 0 and not above 1"
            )


@dataclass(frozen=True)
class StepResult:
    """One gradient step."""

    step: int
    loss: float  #: mean robust reprojection cost of the rows, before the step
    rows: int
    seconds: float


class Learner:
    """
    Fine-tunes a copy of the matcher on the robot's own windows.

    The gate decides what the robot gets.

    ``incumbent`` is what the robot uses, the candidate is what trains. All inputs may come in any
    order that a robot's messages come in; they are joined by stamp and kept in bounded buffers.
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
        self.last_verdict: Verdict | None = None
        self.step_count = self.promotions = self.rollbacks = self.skipped = 0
        self.stale = 0  #: windows that older weights made than ``max_age`` allows
        self.images_seen = 0
        self.last_stamp: int | None = None  #: of the newest window, ns
        # what was in use, oldest first
        self._history = [weights.dumps(matcher, info.version, info.parent)]
        self._version = info.version
        self._images: OrderedDict[int, Tensor] = OrderedDict()
        self._messages: OrderedDict[int, Correspondences] = OrderedDict()
        self._train: Memory[Lesson] = Memory(self.options.lessons)
        self._anchors: Memory[Probe] = Memory(self.options.lessons)
        self._held_out: Memory[_Held] = Memory(self.options.judged)
        self._trained_stamps: OrderedDict[int, None] = OrderedDict()
        self._windows = self._turn = 0
        self._last_stamps: set[int] = set()
        # of the incumbent, with the number of windows it is of
        self._evidence: tuple[int, Evidence] | None = None
        self._rest_until = 0.0
        self._device = next(matcher.parameters()).device
        self._start_candidate(matcher)

    def start_recording(self, camera: Camera) -> None:
        """
        Another camera, or another recording, from now on.

        What was learned and remembered stays.
        """
        self.camera = camera
        self._images.clear()
        self._messages.clear()
        self._last_stamps = set()

    def recalibrate(self, camera: Camera) -> None:
        """Go on with a camera that was focused anew; with another one, as another recording."""
        if not camera.goes_on_from(self.camera):
            self.start_recording(camera)
        self.camera = camera

    # What comes in -------------------------------------------------------------------------------

    def add_image(self, stamp: int, image: np.ndarray) -> None:
        """Take an image (H, W) uint8."""
        if self.enabled:
            self.images_seen += 1
            _remember(self._images, stamp, torch.tensor(image).unsqueeze(0), self.options.images)

    def add_correspondences(self, correspondences: Correspondences) -> None:
        """Take the rows of an image."""
        if self.enabled:
            _remember(self._messages, correspondences.stamp, correspondences, self.options.images)

    def add_window(self, window: Window, held_out: bool | None = None) -> bool:
        """
        Take a solved window; true where it was remembered.

        ``held_out``: whether it is to judge by, not to learn from; where None, one of
        ``LearnerOptions.held_out`` is.
        """
        stamps = set(window.stamps.tolist())
        if not self.enabled or len(stamps - self._last_stamps) < self.options.new_keyframes:
            return False
        made_by = [self._messages[stamp].model for stamp in stamps if stamp in self._messages]
        if made_by and min(made_by) < self._version - self.options.max_age:
            self.stale += 1
            return False
        lesson = make_lesson(window, self._messages, self._images, self.camera)
        if lesson is None:
            return False
        self._last_stamps, self.last_stamp = stamps, max(stamps)
        self._windows += 1
        # windows overlap: some images may have trained
        fresh = _pairs_without(lesson, self._trained_stamps.keys())
        if held_out is None:
            due = not len(self._held_out) or (self._windows - 2) % self.options.held_out == 0
            held_out = bool(len(self._train)) and due and bool(fresh)
        if held_out:
            if fresh:
                chosen = sorted(
                    {index for pair in fresh for index in (pair.reference, pair.target)}
                )
                chosen = chosen[0], chosen[len(chosen) // 2]
                self._held_out.add(_Held(lesson, fresh, [self._probe(lesson, k) for k in chosen]))
            return bool(fresh)
        self._train.add(lesson)
        held = self._held_stamps
        free = [k for k, stamp in enumerate(window.stamps.tolist()) if stamp not in held]
        if free:
            # The oldest: the windows to come, one of which will be held out, have left it behind
            self._anchors.add(self._probe(lesson, free[0]))
            self._note_trained([int(window.stamps[free[0]])])
        return True

    # What goes on --------------------------------------------------------------------------------

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
        """Return whether there is something to learn from, and something to judge by."""
        return self.enabled and all(map(len, (self._train, self._anchors, self._held_out)))

    @property
    def settled(self) -> bool:
        """
        Return whether the next step takes a new window.

        What :meth:`state` gives now is all that the next step needs.
        """
        return self._steps_left == 0

    def rest(self) -> float:
        """Seconds that ``LearnerOptions.duty`` asks to wait before the next step."""
        return max(self._rest_until - time.monotonic(), 0.0)

    def step(self) -> StepResult | None:
        """
        Take one step of the gradient (equation 7).

        Or None where there is nothing to learn from.
        """
        if not self.ready:
            return None
        started = time.monotonic()
        self._turn += 1
        # no state: a run that is taken up again draws alike
        draw = random.Random(f'{self.options.seed} {self._turn}')
        if self._lesson is None or self._steps_left == 0:
            self._lesson = self._next_lesson(draw)
            self._steps_left = self.options.steps_per_solve
            if self._lesson is None:
                self._steps_left = 0
                return None
        self._steps_left -= 1
        lesson, known = self._lesson
        pairs = _pairs_without(lesson, self._held_stamps)
        if self.options.objective == 'sgp':
            pairs = known.labelled(pairs)
        # Neighbours share their references, so that few images are encoded for many pairs
        frames = sorted({pair.target for pair in pairs})
        first = draw.randrange(max(len(frames) - self.options.targets, 0) + 1)
        pairs = [
            pair for pair in pairs if pair.target in frames[first:first + self.options.targets]
        ]
        if self.options.objective == 'sgp':
            fine, rows = sgp.student_loss(self._candidate, lesson, known, pairs)
            coarse = torch.zeros(())
        else:
            matches = match(self._candidate, lesson, pairs)
            fine, coarse, rows = objective(
                lesson, known, pairs, matches, self.bundle.adjust.kernel
            )
        if rows == 0:
            return None
        loss = fine / rows + self.options.coarse * coarse
        if self.options.anchor > 0:
            loss = loss + self.options.anchor * known_warp_loss(
                self._candidate, draw.choice(self._anchors)
            )
        for group in self._optimiser.param_groups:
            group['lr'] = self.options.rate
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
        self._note_trained(
            {stamps[index] for pair in pairs for index in (pair.reference, pair.target)}
        )
        return StepResult(self.step_count, float(fine.detach()) / rows, rows, self._took(started))

    def verdict(self, now: bool = False) -> Verdict | None:
        """
        Return the gate's word on the candidate, every ``verdict_every`` steps, or ``now``.

        None where no word is due.
        """
        steps = self.step_count - self._judged
        if (
            not len(self._held_out)
            or steps == 0
            or (steps < self.options.verdict_every and not now)
        ):
            return None
        started = time.monotonic()
        self._judged = self.step_count
        if self._evidence is None or self._evidence[0] != self._windows:
            incumbent, _ = weights.loads(self._history[-1][0])
            self._evidence = (self._windows, self._gather(incumbent.to(self._device)))
        candidate = self._average.module
        evidence = self._gather(candidate)
        mark, reason, figures = gate.judge(evidence, self._evidence[1])
        self._worse = self._worse + 1 if mark < 0 else 0
        self._idle = 0 if mark > 0 else self._idle + 1
        if mark > 0:
            self._use(candidate, parent=self._version)
            self._evidence = (self._windows, evidence)
            self.promotions += 1
        rolled_back = (
            self._worse >= self.options.patience or self._idle >= 2 * self.options.patience
        )
        if rolled_back:
            self._start_candidate(weights.loads(self._history[-1][0])[0])
            self.rollbacks += 1
            reason += '; the candidate goes back to the weights in use'
        self._took(started)
        self.last_verdict = Verdict(
            self.step_count, mark > 0, rolled_back, self._version, reason, figures
        )
        return self.last_verdict

    def weights(self) -> bytes:
        """Return the weights file of what is in use."""
        return self._history[-1][0]

    def rollback(self) -> int:
        """Go back to the weights that were in use before; the version still grows. Returns it."""
        before = self._history[max(len(self._history) - 2, 0)]
        del self._history[-2:]
        matcher, info = weights.loads(before[0])
        self._use(matcher, parent=info.version)
        self._start_candidate(matcher)
        self.rollbacks += 1
        return self._version

    def reset(self) -> int:
        """Forget all and goes back to the first weights; the version still grows. Returns it."""
        matcher, info = weights.loads(self._history[0][0])
        self._images.clear()
        self._messages.clear()
        for memory in (self._train, self._held_out, self._anchors):
            memory.clear()
        self._trained_stamps.clear()
        self._last_stamps = set()
        self._use(matcher, parent=info.version)
        self._start_candidate(matcher)
        return self._version

    # What lasts: see checkpoints.py --------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """
        Candidate, average and optimiser as named tensors.

        Counters and what was seen, for JSON.
        """
        tensors = {
            f'candidate.{name}': tensor for name, tensor in self._candidate.state_dict().items()
        }
        tensors |= {
            f'average.{name}': tensor for name, tensor in self._average.state_dict().items()
        }
        for name, parameter in self._candidate.named_parameters():
            for key, value in self._optimiser.state.get(parameter, {}).items():
                tensors[f'adam.{key}.{name}'] = value
        facts = {name.lstrip('_'): getattr(self, name) for name in _COUNTERS}
        facts['verdict'] = asdict(self.last_verdict) if self.last_verdict else None
        facts['data'] = {
            'windows': self._windows, 'images': self.images_seen, 'last_stamp': self.last_stamp,
        }
        return {
            name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()
        }, facts

    def history(self) -> list[tuple[bytes, weights.WeightsInfo]]:
        """Weights files that were in use, oldest first: the first ones, and the last ten."""
        return list(self._history)

    def restore(
        self,
        tensors: dict[str, Tensor],
        facts: dict[str, Any],
        history: list[tuple[bytes, weights.WeightsInfo]],
    ) -> None:
        """
        Go on from what :meth:`state` and :meth:`history` gave; lessons that are remembered stay.

        Raises ValueError, and leaves all as it was, where the state does not fit this learner's
        network.
        """
        matcher, info = weights.loads(history[-1][0])
        before = dict(vars(self))
        try:
            self._start_candidate(matcher)
            for part, module in (('candidate.', self._candidate), ('average.', self._average)):
                module.load_state_dict(
                    {k.removeprefix(part): v for k, v in tensors.items() if k.startswith(part)}
                )
            for name, parameter in self._candidate.named_parameters():
                state = {
                    key: tensors[f'adam.{key}.{name}']
                    for key in _ADAM
                    if f'adam.{key}.{name}' in tensors
                }
                if state:
                    for key in ('exp_avg', 'exp_avg_sq'):
                        # in the parameter's own layout
                        state[key] = torch.zeros_like(parameter).copy_(state[key])
                    self._optimiser.state[parameter] = state
            counters = {name: int(facts[name.lstrip('_')]) for name in _COUNTERS}
            verdict = Verdict(**facts['verdict']) if facts['verdict'] else None
            seen = facts['data']
        except (RuntimeError, KeyError, TypeError):
            vars(self).update(before)
            raise ValueError(
                f"the learner's state does not fit the {info.family} network of this version"
            ) from None
        for name, value in counters.items():
            setattr(self, name, value)
        self.last_verdict = verdict
        self.images_seen, self.last_stamp = (
            max(self.images_seen, seen['images']),
            seen['last_stamp'],
        )
        self._windows = max(self._windows, seen['windows'])
        self._history, self._version = list(history), info.version
        self._evidence = None

    # ---------------------------------------------------------------------------------------------

    def _start_candidate(self, matcher: nn.Module) -> None:
        self._candidate = copy.deepcopy(matcher).to(self._device)
        self._optimiser = torch.optim.Adam(self._candidate.parameters(), lr=self.options.rate)
        self._average = AveragedModel(
            self._candidate, multi_avg_fn=get_ema_multi_avg_fn(self.options.average)
        )
        self._lesson = None
        self._steps_left = self._worse = self._idle = 0
        self._judged = self._started = self.step_count

    def _use(self, matcher: nn.Module, parent: int) -> None:
        self._version += 1
        self._evidence = None
        self._history.append(weights.dumps(matcher, self._version, parent))
        del self._history[1:-10]  # the first and the last ten

    def _probe(self, lesson: Lesson, k: int) -> Probe:
        """Return a known warp of the k-th image of a lesson."""
        others = [
            image[0].numpy()
            for image in list(self._images.values())[:: 1 + len(self._images) // 32]
        ]
        return make_probe(lesson.images[k][0].numpy(), others, int(lesson.window.stamps[k]))

    def _gather(self, matcher: nn.Module) -> Evidence:
        held_out = [(held.lesson, held.pairs) for held in self._held_out]
        probes = [probe for held in self._held_out for probe in held.probes]
        return gate.gather(matcher, held_out, probes, self.bundle)

    def _next_lesson(self, draw: random.Random) -> tuple[Lesson, Survivors | sgp.Labels] | None:
        """
        Return a window, and what is known of it, as the candidate sees it now.

        Its rows matched again, the lower level solved again, and its survivors; or the teacher's
        labels.
        """
        fallen = []
        while len(self._train):
            index = draw.randrange(len(self._train))
            lesson = self._train[index]
            if pairs := _pairs_without(lesson, self._held_stamps):
                if self.options.objective == 'sgp':
                    labels = sgp.teach(self._candidate, lesson, pairs)
                    if labels.T:
                        return lesson, labels
                else:
                    lesson = requery(lesson, self.bundle.prune_px)
                    lesson = resolve(rematch(self._candidate, lesson), self.bundle)
                    if lesson is not None:
                        return lesson, survivors_of(lesson, self.bundle.prune_px)
                fallen.append(self._train[index])
            # No stationary point with enough survivors, or nothing but held-out images: nothing to
            # be learned
            self._train.remove(index)
            self.skipped += 1
        # one after the other: the fault is the candidate's
        if fallen and self.step_count > self._started:
            for lesson in fallen:
                self._train.add(lesson)
            self._start_candidate(weights.loads(self._history[-1][0])[0])
            self.rollbacks += 1
        return None

    @property
    def _held_stamps(self) -> set[int]:
        return {stamp for held in self._held_out for stamp in held.lesson.window.stamps.tolist()}

    def _note_trained(self, stamps: Iterable[int]) -> None:
        for stamp in stamps:
            _remember(self._trained_stamps, stamp, None, TRAINED)

    def _took(self, started: float) -> float:
        """Seconds since then; the rest that they call for begins now."""
        now = time.monotonic()
        seconds = now - started
        self._rest_until = (
            max(self._rest_until, now) + seconds * (1 - self.options.duty) / self.options.duty
        )
        return seconds


@dataclass(frozen=True)
class _Held:
    """A window that never trains, and what to measure in it."""

    lesson: Lesson
    pairs: list[Pair]  # of which neither image had trained
    probes: list[Probe]  # known warps of two of its images


def _pairs_without(lesson: Lesson, stamps: Collection[int]) -> list[Pair]:
    """Return the pairs of which neither image has one of these stamps."""
    free = [stamp not in stamps for stamp in lesson.window.stamps.tolist()]
    return [pair for pair in lesson.pairs if free[pair.reference] and free[pair.target]]


def _remember(buffer: OrderedDict, key: int, value: object, most: int) -> None:
    buffer[key] = value
    while len(buffer) > most:
        buffer.popitem(last=False)
