"""What comes in: images, correspondences and windows become lessons, anchors and evidence."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable

import numpy as np
import torch
from torch import Tensor

from .evidence import Clip, some_between
from .lesson import Lesson, make_lesson, Pair
from .memory import Memory
from .options import LearnerOptions
from .probe import make_probe, Probe
from ..bundle.window import Window
from ..geometry.camera import Camera
from ..geometry.correspondences import Correspondences

CLIP = 4  #: fresh keyframes that a clip grows to, at least
TRAINED = 4000  #: newest stamps that trained, so that no window with one of them becomes evidence


class Inputs:
    """
    What a robot has seen, joined by stamp, and kept in bounded memories.

    Images, correspondences and windows may come in any order that a robot's messages come in. Of
    the windows, most are lessons with an anchor each, the others are held out.
    """

    def __init__(self, camera: Camera, options: LearnerOptions) -> None:
        self.camera, self.options = camera, options
        self.images: OrderedDict[int, Tensor] = OrderedDict()  #: (1, H, W) uint8, by stamp
        self.messages: OrderedDict[int, Correspondences] = OrderedDict()
        self.lessons: Memory[Lesson] = Memory(options.lessons)
        self.anchors: Memory[Probe] = Memory(options.lessons)
        self.held_out: Memory[Clip] = Memory(options.judged)
        self.windows = 0  #: remembered so far, held-out ones included
        self.images_seen = 0
        self.last_stamp: int | None = None  #: of the newest window, ns
        self._trained: OrderedDict[int, None] = OrderedDict()
        self._last_stamps: set[int] = set()

    def start_recording(self, camera: Camera) -> None:
        """
        Take another camera, or another recording, from now on.

        What was learned and remembered stays.
        """
        self.camera = camera
        self.images.clear()
        self.messages.clear()
        self._last_stamps = set()

    def forget(self) -> None:
        """Forget all that was seen."""
        self.start_recording(self.camera)
        for memory in (self.lessons, self.anchors, self.held_out, self._trained):
            memory.clear()

    @property
    def complete(self) -> bool:
        """Whether there is something to learn from, and something to judge by."""
        return all(map(len, (self.lessons, self.anchors, self.held_out)))

    def add_image(self, stamp: int, image: np.ndarray) -> None:
        """Take an image (H, W) uint8."""
        self.images_seen += 1
        _remember(self.images, stamp, torch.tensor(image).unsqueeze(0), self.options.images)

    def add_correspondences(self, correspondences: Correspondences) -> None:
        """Take the rows of an image."""
        _remember(self.messages, correspondences.stamp, correspondences, self.options.images)

    def is_new(self, window: Window, held_out: bool | None) -> bool:
        """
        Return whether a window shows enough keyframes that the last one did not.

        A clip that is to judge by grows by whatever is new.
        """
        stamps = window.stamps.tolist()
        fresh = set(stamps) - self._last_stamps
        enough = 1 if held_out and self._grows(stamps) else self.options.new_keyframes
        return len(fresh) >= enough

    def oldest_model(self, window: Window) -> int | None:
        """Return the oldest weights that made rows of a window, None where no rows are known."""
        stamps = window.stamps.tolist()
        known = (self.messages[stamp].model for stamp in stamps if stamp in self.messages)
        return min(known, default=None)

    def add_window(self, window: Window, held_out: bool | None) -> bool:
        """
        Take a solved window, and return whether it was remembered.

        ``held_out`` says whether it is to judge by, not to learn from; where None, one of
        ``LearnerOptions.held_out`` is.
        """
        lesson = make_lesson(window, self.messages, self.images, self.camera)
        if lesson is None:
            return False
        stamps = window.stamps.tolist()
        grows = self._grows(stamps)
        if held_out is None:
            # On a robot a clip grows little: the next windows are to learn from
            grows = grows and len(self.held_out[-1].fresh) < max(
                2 * self.options.new_keyframes, CLIP
            )
        # Windows overlap: an image trains or judges, by which of them it came with first
        judged = {s for clip in self._others(grows) for s in clip.stamps}
        taken = judged.union(self._trained)
        fresh = [k for k, stamp in enumerate(stamps) if stamp not in taken]
        if held_out is None:
            due = not len(self.held_out) or (self.windows - 1) % self.options.held_out == 0
            enough = len(fresh) >= self.options.new_keyframes
            held_out = bool(len(self.lessons)) and (due or grows) and enough
        if held_out and not fresh:
            return False
        self._last_stamps, self.last_stamp = set(stamps), max(stamps)
        self.windows += 1
        if held_out:
            probes = [self._probe(lesson, k) for k in (fresh[0], fresh[len(fresh) // 2])]
            # One that trained may lie there: where the robot only turned, it left the window
            free = {stamp: image for stamp, image in self.images.items() if stamp not in taken}
            between = some_between(free, stamps, fresh)
            self.held_out.add(Clip(lesson, fresh, between, probes), instead=grows)
            return True
        self.lessons.add(lesson)
        held = self._held_stamps()
        free = [k for k, stamp in enumerate(stamps) if stamp not in held]
        if free:
            self.anchors.add(self._probe(lesson, free[0]))
            self._note(stamps[k] for k in free)
        return True

    def trainable(self, lesson: Lesson) -> list[Pair]:
        """Return the pairs of a lesson of which neither image is held out."""
        return pairs_without(lesson, self._held_stamps())

    def note_trained(self, lesson: Lesson, pairs: list[Pair]) -> None:
        """Remember that some pairs of a lesson have trained."""
        stamps = lesson.window.stamps.tolist()
        self._note({stamps[k] for pair in pairs for k in (pair.reference, pair.target)})

    def _note(self, stamps: Iterable[int]) -> None:
        for stamp in stamps:
            _remember(self._trained, stamp, None, TRAINED)

    def _held_stamps(self) -> set[int]:
        return {stamp for clip in self.held_out for stamp in clip.stamps}

    def _grows(self, stamps: list[int]) -> bool:
        """Return whether a window of these keyframes shows all of the newest clip, and more."""
        return bool(len(self.held_out)) and set(self.held_out[-1].keyframes) < set(stamps)

    def _others(self, grows: bool) -> list[Clip]:
        """Return the clips, without the newest where another one takes its place."""
        return list(self.held_out)[:-1 if grows else None]

    def _probe(self, lesson: Lesson, k: int) -> Probe:
        """Return a known warp of the k-th image of a lesson."""
        some = list(self.images.values())[::1 + len(self.images) // 32]
        others = [image[0].numpy() for image in some]
        return make_probe(lesson.images[k][0].numpy(), others, int(lesson.window.stamps[k]))


def pairs_without(lesson: Lesson, stamps: Collection[int]) -> list[Pair]:
    """Return the pairs of which neither image has one of these stamps."""
    free = [stamp not in stamps for stamp in lesson.window.stamps.tolist()]
    return [pair for pair in lesson.pairs if free[pair.reference] and free[pair.target]]


def _remember(buffer: OrderedDict, key: int, value: object, most: int) -> None:
    buffer[key] = value
    while len(buffer) > most:
        buffer.popitem(last=False)
