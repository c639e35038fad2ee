"""
New corners of a window's keyframes, matched into all the others.

A tracker hands on what it finds again: after a while its survivors are points that the matcher
finds anyway. What there is to learn from are the corners that it lost, and views farther apart
than those that it compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
import random
from typing import Any

import torch
from torch import Tensor

from .lesson import Lesson, match, Pair
from ..geometry.camera import Camera
from ..geometry.correspondences import Correspondences
from ..matching.detector import detect
from ..matching.protocol import FAILED, Matcher, Matches

CORNERS = 400  # per reference
# Keyframes whose corners are sought at a time: with eight in the window, 21 pairs beside the
# tracker's 13
REFERENCES = 3


@torch.no_grad()
def with_corners(
    matcher: Matcher, lesson: Lesson, pairs: list[Pair], features: Mapping[int, Any],
    draw: random.Random, count: int = CORNERS,
) -> Lesson:
    """
    Return the lesson with rows and pairs for corners of some of its keyframes.

    Each corner is a track of its own, sought in every other keyframe that ``pairs`` show. Its
    landmark is for the lower level to find: whoever takes the lesson solves it again. A match
    without confidence is no row.
    """
    shown = sorted({k for pair in pairs for k in (pair.reference, pair.target)})
    messages, added = list(lesson.messages), []
    track = 1 + max(int(message.track.max()) for message in messages if len(message))
    for reference in draw.sample(shown, min(REFERENCES, len(shown))):
        corners = torch.from_numpy(detect(lesson.images[reference][0].numpy(), count))
        asked = [
            Pair(reference, target, torch.arange(len(corners)))
            for target in shown if target != reference
        ]
        found = match(matcher, lesson, asked, {reference: corners}, features)
        for target, matches in zip((pair.target for pair in asked), found, strict=True):
            rows = (matches.score[0].cpu() >= FAILED).nonzero().squeeze(-1)
            before = len(messages[target])
            if not len(rows):
                continue
            messages[target] = _with_rows(
                messages[target], rows, matches, corners, int(lesson.window.stamps[reference]),
                track, lesson.camera,
            )
            added.append(Pair(reference, target, torch.arange(before, before + len(rows))))
        track += len(corners)
    return replace(lesson, messages=messages, pairs=lesson.pairs + added)


def _with_rows(
    message: Correspondences, rows: Tensor, matches: Matches, corners: Tensor, ref_stamp: int,
    track: int, camera: Camera,
) -> Correspondences:
    """Return the message with some of the corners' matches; ``track`` is the first corner's."""
    uv, score, cov = (x[0].cpu()[rows] for x in (matches.uv, matches.score, matches.cov))
    new = {
        'uv': uv, 'xy': camera.normalise(uv.double()).to(message.xy.dtype),
        'ref_stamp': torch.full_like(rows, ref_stamp), 'ref_uv': corners[rows],
        'track': track + rows, 'score': score, 'cov': cov[:, (0, 0, 1), (0, 1, 1)],
    }
    return replace(
        message, **{name: torch.cat((getattr(message, name), x)) for name, x in new.items()}
    )
