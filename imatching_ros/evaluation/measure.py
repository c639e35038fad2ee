"""What weights are worth on a recording: side by side, before and after, and as an odometry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .matching import accuracy, evaluation_pairs, match_pairs, MatchingAccuracy, PairMatches
from .trajectory import trajectory_accuracy, TrajectoryAccuracy
from ..bundle.bundle import Bundle
from ..matching.protocol import Matcher
from ..matching.tracker import Tracker
from ..pipeline import track_and_solve

if TYPE_CHECKING:
    from ..data.recording import Recording

GAP = 5  #: images between the last that trained and the first that is measured


@dataclass(frozen=True)
class Comparison:
    """Two matchers on the same pairs of images that did not train; None where there are none."""

    before: MatchingAccuracy | None = None
    after: MatchingAccuracy | None = None
    typical: tuple[PairMatches | None, PairMatches | None] = None, None  #: of one pair, by each


def compare(
    recording: Recording, train_frames: int, before: Matcher, after: Matcher,
    on_start: Callable[[str, int], None] = lambda when, pairs: None,
) -> Comparison:
    """
    Return what two matchers make of the images that come after those that trained.

    ``on_start`` is told ``"before"`` and ``"after"`` with the number of pairs as the work begins.
    """
    first = train_frames + GAP if train_frames else 0
    pairs = evaluation_pairs(recording, first, len(recording) - 1)
    if not pairs:
        return Comparison()
    matched = []
    for when, matcher in (('before', before), ('after', after)):
        on_start(when, len(pairs))
        matched.append(list(match_pairs(matcher, recording, pairs)))
    return Comparison(accuracy(matched[0]), accuracy(matched[1]), _typical(*matched))


def _typical(
    before: Sequence[PairMatches], after: Sequence[PairMatches]
) -> tuple[PairMatches, PairMatches]:
    """Return the pair whose matches changed the median way, not the prettiest or worst."""
    changes = [_share(new) - _share(old) for old, new in zip(before, after, strict=True)]
    middle = sorted(range(len(changes)), key=changes.__getitem__)[len(changes) // 2]
    return before[middle], after[middle]


def _share(matches: PairMatches) -> float:
    """Return the share of the visible queries that are matched within a pixel."""
    return float((matches.error_px[matches.visible] < 1).float().mean())


def odometry_accuracy(
    recording: Recording, matcher: Matcher, version: int
) -> TrajectoryAccuracy:
    """Return the error of the keyframes' path where a matcher tracks the whole recording."""
    tracker, bundle = Tracker(matcher, version, recording.camera), Bundle(recording.camera)
    for _ in track_and_solve(recording, tracker, bundle):
        pass
    stamps = sorted(bundle.trajectory)
    poses = [bundle.trajectory[stamp] for stamp in stamps]
    path = torch.stack(poses) if poses else torch.empty(0, 7)
    return trajectory_accuracy(stamps, path, recording.ground_truth)
