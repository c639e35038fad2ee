"""The learner: takes images, correspondences and solved windows, gives weights (paper 3.2)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
import random
import time
from typing import Any

import numpy as np
from torch import nn, Tensor

from .candidate import Candidate
from .evidence import Evidence, gather
from .inputs import Inputs
from .objectives import Objective, OBJECTIVES
from .options import LearnerOptions
from .probe import known_warp_loss
from .verdict import consider, Known, Verdict
from ..bundle.options import BundleOptions
from ..bundle.window import Window
from ..geometry.camera import Camera
from ..geometry.correspondences import Correspondences
from ..matching import weights

#: What a checkpoint keeps of a learner, beside tensors and the last verdict.
_COUNTERS = (
    'step_count', 'promotions', 'rollbacks', 'skipped', 'stale',
    '_turn', '_worse', '_idle', '_judged', '_started',
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

    The incumbent is what the robot uses, the candidate is what trains; the gate decides what the
    robot gets. All inputs may come in any order that a robot's messages come in.
    """

    def __init__(
        self,
        matcher: nn.Module,
        info: weights.WeightsInfo,
        camera: Camera,
        options: LearnerOptions | None = None,
        bundle: BundleOptions | None = None,
    ) -> None:
        self.options = options or LearnerOptions()
        self.bundle = bundle or BundleOptions()
        self.inputs = Inputs(camera, self.options)
        self.enabled = True
        self.last_verdict: Verdict | None = None
        self.step_count = self.promotions = self.rollbacks = self.skipped = 0
        self.stale = 0  #: windows that older weights made than ``max_age`` allows
        self.version = info.version  #: of the weights in use
        # What was in use, oldest first
        self._history = [weights.dumps(matcher, info.version, info.parent)]
        self._known: Known = {}  # of the weights in use
        self._turn = 0
        self._rest_until = 0.0
        self._device = next(matcher.parameters()).device
        self._start(self._copy(matcher))

    # What comes in -------------------------------------------------------------------------------

    @property
    def camera(self) -> Camera:
        """The camera that what comes in now was seen by."""
        return self.inputs.camera

    @property
    def windows(self) -> int:
        """How many windows were remembered so far, held-out ones included."""
        return self.inputs.windows

    def start_recording(self, camera: Camera) -> None:
        """Take another camera, or another recording; what was learned and remembered stays."""
        self.inputs.start_recording(camera)

    def recalibrate(self, camera: Camera) -> None:
        """Go on with a camera that was focused anew; with another one, as another recording."""
        if not camera.goes_on_from(self.camera):
            self.start_recording(camera)
        self.inputs.camera = camera

    def add_image(self, stamp: int, image: np.ndarray) -> None:
        """Take an image (H, W) uint8."""
        if self.enabled:
            self.inputs.add_image(stamp, image)

    def add_correspondences(self, correspondences: Correspondences) -> None:
        """Take the rows of an image."""
        if self.enabled:
            self.inputs.add_correspondences(correspondences)

    def add_window(self, window: Window, held_out: bool | None = None) -> bool:
        """
        Take a solved window, and return whether it was remembered.

        ``held_out`` says whether it is to judge by, not to learn from; where None, one of
        ``LearnerOptions.held_out`` is.
        """
        if not self.enabled or not self.inputs.is_new(window, held_out):
            return False
        made_by = self.inputs.oldest_model(window)
        if made_by is not None and made_by < self.version - self.options.max_age:
            self.stale += 1
            return False
        return self.inputs.add_window(window, held_out)

    # A step --------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether there is something to learn from, and something to judge by."""
        return self.enabled and self.inputs.complete

    @property
    def settled(self) -> bool:
        """Whether the next step takes a new window, so that :meth:`state` is all that it needs."""
        return self._steps_left == 0

    def rest(self) -> float:
        """Return the seconds that ``LearnerOptions.duty`` asks to wait before the next step."""
        return max(self._rest_until - time.monotonic(), 0.0)

    def step(self) -> StepResult | None:
        """Take one step of the gradient (equation 7); None where there is nothing to learn."""
        if not self.ready:
            return None
        started = time.monotonic()
        self._turn += 1
        # No state: a run that is taken up again draws alike
        draw = random.Random(f'{self.options.seed} {self._turn}')
        if self._steps_left == 0:
            self._objective = self._next_objective(draw)
            if self._objective is None:
                return None
            self._steps_left = self.options.steps_per_solve
        self._steps_left -= 1
        objective, candidate = self._objective, self.candidate
        pairs = objective.usable(self.inputs.trainable(objective.lesson))
        # Few images, for they are what costs: a pair teaches nearly what six do
        pairs = draw.sample(pairs, min(self.options.pairs, len(pairs)))
        fine, coarse, rows = objective.loss(candidate.matcher, pairs)
        if rows == 0:
            return None
        loss = fine / rows + self.options.coarse * coarse
        if self.options.anchor > 0 and self._turn % self.options.anchor_every == 0:
            anchor = draw.choice(self.inputs.anchors)
            loss = loss + self.options.anchor * known_warp_loss(candidate.matcher, anchor)
        if not candidate.descend(loss, self.options.rate, self.options.clip):
            self.skipped += 1
            return None
        self.step_count += 1
        self.inputs.note_trained(objective.lesson, pairs)
        return StepResult(self.step_count, float(fine.detach()) / rows, rows, self._took(started))

    def _next_objective(self, draw: random.Random) -> Objective | None:
        """
        Return the objective on a window, as the candidate sees it now.

        None where no window that is remembered gives one.
        """
        lessons, fallen = self.inputs.lessons, []
        while len(lessons):
            index = draw.randrange(len(lessons))
            lesson = lessons[index]
            if pairs := self.inputs.trainable(lesson):
                kind = OBJECTIVES[self.options.objective]
                objective = kind.of(self.candidate.matcher, lesson, pairs, self.bundle, draw)
                if objective is not None:
                    return objective
                fallen.append(lesson)
            # Nothing but held-out images, or no objective: nothing to be learned
            lessons.remove(index)
            self.skipped += 1
        # One after the other: the fault is the candidate's
        if fallen and self.step_count > self._started:
            for lesson in fallen:
                lessons.add(lesson)
            self._go_back()
        return None

    # A verdict -----------------------------------------------------------------------------------

    def verdict(self, now: bool = False) -> Verdict | None:
        """
        Return the gate's word on the candidate, every ``verdict_every`` steps, or ``now``.

        None where no word is due.
        """
        steps = self.step_count - self._judged
        due = steps >= self.options.verdict_every or now
        if not len(self.inputs.held_out) or steps == 0 or not due:
            return None
        started = time.monotonic()
        self._judged = self.step_count
        incumbent = weights.loads(self.weights())[0].to(self._device)
        judgement, taken = consider(
            self.candidate.average.module, incumbent, list(self.inputs.held_out), self.bundle,
            self._known
        )
        mark, reason = judgement.mark, judgement.reason
        self._worse = self._worse + 1 if mark < 0 else 0
        self._idle = 0 if mark > 0 else self._idle + 1
        if mark > 0:
            self.use(taken, parent=self.version)
            self._known = judgement.evidence
            self.promotions += 1
        patience = self.options.patience
        rolled_back = self._worse >= patience or self._idle >= 2 * patience
        if rolled_back:
            self._go_back()
            reason += '; the candidate goes back to the weights in use'
        self._took(started)
        self.last_verdict = Verdict(
            self.step_count, mark > 0, rolled_back, self.version, reason, judgement.figures
        )
        return self.last_verdict

    def gather(self, matcher: nn.Module) -> list[Evidence]:
        """Return the evidence of a model on all that is held out."""
        return [gather(matcher, clip, self.bundle) for clip in self.inputs.held_out]

    def weights(self) -> bytes:
        """Return the weights file of what is in use."""
        return self._history[-1][0]

    def use(self, matcher: nn.Module, parent: int) -> None:
        """Let the robot use a matcher from now on; the version grows."""
        self.version += 1
        self._known = {}
        self._history.append(weights.dumps(matcher, self.version, parent))
        del self._history[1:-10]  # the first and the last ten

    def rollback(self) -> int:
        """Go back to the weights in use before; return the version, which still grows."""
        before = self._history[max(len(self._history) - 2, 0)]
        del self._history[-2:]
        matcher, info = weights.loads(before[0])
        self.use(matcher, parent=info.version)
        self._go_back()
        return self.version

    def reset(self) -> int:
        """Forget all and go back to the first weights; return the version, which still grows."""
        matcher, info = weights.loads(self._history[0][0])
        self.inputs.forget()
        self.use(matcher, parent=info.version)
        self._start(self._copy(matcher))
        return self.version

    # What lasts: see checkpoints.py --------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """
        Return candidate, average and optimiser as named tensors, and what else lasts, for JSON.

        The latter are the counters, the last verdict, and how much was seen.
        """
        facts: dict[str, Any] = {name.lstrip('_'): getattr(self, name) for name in _COUNTERS}
        facts['verdict'] = asdict(self.last_verdict) if self.last_verdict else None
        facts['data'] = {
            'windows': self.windows, 'images': self.inputs.images_seen,
            'last_stamp': self.inputs.last_stamp,
        }
        return self.candidate.tensors(), facts

    def history(self) -> list[tuple[bytes, weights.WeightsInfo]]:
        """Return the weights files that were in use, oldest first: the first, and the last ten."""
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
        try:
            candidate = self._copy(matcher)
            candidate.load(tensors)
            counters = {name: int(facts[name.lstrip('_')]) for name in _COUNTERS}
            verdict = Verdict(**facts['verdict']) if facts['verdict'] else None
            windows, images, last_stamp = (
                facts['data'][name] for name in ('windows', 'images', 'last_stamp')
            )
        except (RuntimeError, KeyError, TypeError):
            raise ValueError(
                f"the learner's state does not fit the {info.family} network of this version"
            ) from None
        self._start(candidate)
        vars(self).update(counters)
        self.last_verdict = verdict
        self.inputs.images_seen = max(self.inputs.images_seen, images)
        self.inputs.windows = max(self.inputs.windows, windows)
        self.inputs.last_stamp = last_stamp
        self._history, self.version = list(history), info.version
        self._known = {}

    # ---------------------------------------------------------------------------------------------

    def _copy(self, matcher: nn.Module) -> Candidate:
        return Candidate(matcher, self.options, self._device)

    def _start(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self._objective: Objective | None = None
        self._steps_left = self._worse = self._idle = 0
        self._judged = self._started = self.step_count

    def _go_back(self) -> None:
        """Let the candidate begin again with the weights in use."""
        self._start(self._copy(weights.loads(self.weights())[0]))
        self.rollbacks += 1

    def _took(self, started: float) -> float:
        """Return the seconds since then; the rest that they call for begins now."""
        now = time.monotonic()
        seconds = now - started
        asked = seconds * (1 - self.options.duty) / self.options.duty
        self._rest_until = max(self._rest_until, now) + asked
        return seconds
