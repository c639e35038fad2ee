"""Matching and bundle adjustment of a recording in one process, as the nodes do it in two."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from torch import Tensor

from .bundle.bundle import Bundle, Estimate
from .geometry.camera import Camera
from .geometry.correspondences import Correspondences
from .matching.tracker import Tracker


@dataclass(frozen=True)
class Frame:
    """One image of a recording, and what came of it."""

    stamp: int  #: ns
    image: np.ndarray  #: (H, W) uint8
    camera: Camera
    correspondences: Correspondences
    estimate: Estimate
    is_keyframe: bool


@dataclass
class SolvedMap:
    """The keyframes and the landmarks that a recording gave so far."""

    keyframes: list[Correspondences] = field(default_factory=list)  #: in the order of stamps
    landmarks: dict[int, Tensor] = field(default_factory=dict)  #: (3,) by track, world

    def add(self, frame: Frame) -> None:
        """Take what an image brought: a later window's landmark replaces an earlier one's."""
        window = frame.estimate.window
        if window is not None:
            self.landmarks.update(zip(window.track.tolist(), window.points, strict=True))
        if frame.is_keyframe:
            self.keyframes.append(frame.correspondences)


def track_and_solve(
    images: Iterable[tuple[int, np.ndarray]], tracker: Tracker, bundle: Bundle,
    first: int = 0, last: int | None = None,
) -> Iterator[Frame]:
    """
    Yield each image, from ``first`` to before ``last``, once it is tracked and solved.

    images: a recording's, (stamp ns, (H, W) uint8). Where they know their cameras (``camera_of``)
    tracker and bundle go on with the camera of each; else theirs is that of all.
    """
    camera_of = getattr(images, 'camera_of', None)
    for stamp, image in islice(images, first, last):
        camera = tracker.camera if camera_of is None else camera_of(stamp)
        tracker.recalibrate(camera)
        bundle.recalibrate(camera)
        correspondences = tracker.track(stamp, image)
        estimate = bundle.add(correspondences)
        is_keyframe = tracker.keyframes[-1:] == [stamp]
        yield Frame(stamp, image, camera, correspondences, estimate, is_keyframe)
