"""What a step minimises: the bundle's own objective, or, to compare with, that of SGP."""

from __future__ import annotations

from dataclasses import dataclass
import random
from typing import Protocol

import torch
from torch import Tensor

from . import sgp
from .corners import with_corners
from .lesson import (
    encode,
    Lesson,
    match,
    objective,
    Pair,
    rematch,
    requery,
    resolve,
    Survivors,
    survivors_of,
)
from ..bundle.options import BundleOptions
from ..bundle.solver.robust import Kernel
from ..matching.protocol import Matcher


class Objective(Protocol):
    """A window as the candidate sees it now, ready for some steps."""

    lesson: Lesson

    @classmethod
    def of(
        cls, matcher: Matcher, lesson: Lesson, pairs: list[Pair], options: BundleOptions,
        draw: random.Random,
    ) -> Objective | None:
        """
        Return the objective on a lesson's pairs; None where there is nothing to learn.

        What it chooses by chance, it draws.
        """

    def usable(self, pairs: list[Pair]) -> list[Pair]:
        """Return those of the pairs that it says something about."""

    def loss(self, matcher: Matcher, pairs: list[Pair]) -> tuple[Tensor, Tensor, int]:
        """
        Return the loss of some pairs, differentiable.

        That is the sum over their rows for the fine matches, the mean for the coarse ones, and
        the number of rows.
        """


@dataclass(frozen=True)
class BundleObjective:
    """The upper level at the optimum of a window that is solved for the candidate's rows."""

    lesson: Lesson
    survivors: Survivors
    kernel: Kernel

    @classmethod
    def of(
        cls, matcher: Matcher, lesson: Lesson, pairs: list[Pair], options: BundleOptions,
        draw: random.Random,
    ) -> BundleObjective | None:
        """
        Match the rows again, and new corners, and solve again.

        None without enough survivors at an optimum.
        """
        with torch.no_grad():
            features = encode(matcher, lesson, lesson.pairs)
        lesson = rematch(matcher, requery(lesson, options.prune_px), features)
        lesson = resolve(with_corners(matcher, lesson, pairs, features, draw), options)
        if lesson is None:
            return None
        return cls(lesson, survivors_of(lesson, options.prune_px), options.adjust.kernel)

    def usable(self, pairs: list[Pair]) -> list[Pair]:
        """Return the pairs that have a survivor."""
        return [pair for pair in pairs if len(self.survivors.of(pair)[0])]

    def loss(self, matcher: Matcher, pairs: list[Pair]) -> tuple[Tensor, Tensor, int]:
        """Return the loss of some pairs by equation 7."""
        matches = match(matcher, self.lesson, pairs)
        return objective(self.lesson, self.survivors, pairs, matches, self.kernel)


@dataclass(frozen=True)
class TeacherObjective:
    """The student's loss under the labels of a teacher: two views, RANSAC, no bundle."""

    lesson: Lesson
    labels: sgp.Labels

    @classmethod
    def of(
        cls, matcher: Matcher, lesson: Lesson, pairs: list[Pair], options: BundleOptions,
        draw: random.Random,
    ) -> TeacherObjective | None:
        """Ask the teacher; None where it believes no pose."""
        labels = sgp.teach(matcher, lesson, pairs)
        return cls(lesson, labels) if labels.T else None

    def usable(self, pairs: list[Pair]) -> list[Pair]:
        """Return the pairs whose pose the teacher believes."""
        return self.labels.labelled(pairs)

    def loss(self, matcher: Matcher, pairs: list[Pair]) -> tuple[Tensor, Tensor, int]:
        """Return the student's loss, of both stages in one."""
        both, rows = sgp.student_loss(matcher, self.lesson, self.labels, pairs)
        return both, torch.zeros(()), rows


#: What ``LearnerOptions.objective`` may name.
OBJECTIVES: dict[str, type[Objective]] = {'imatching': BundleObjective, 'sgp': TeacherObjective}
