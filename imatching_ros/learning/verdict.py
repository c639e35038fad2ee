"""New weights reach the robot only where evidence that no training step saw is for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn, Tensor

from .candidate import interpolated
from .evidence import Clip, Evidence, gather
from ..bundle.options import BundleOptions

NEAR_PX = 1.0  # a match this close is right
Z = 2.5  # standard errors that a word must be sure by
LOOKED = 2  # clips that a word needs, where there are so many
PART = 0.5  # of the way to a candidate that is not surely better: what lies there may be
#: Of the known warps that the weights in use match, a model that has not collapsed matches this
#: share. True gains cost up to a third of them, for a homography of a noisy image is no motion of
#: a noisy camera. Whoever finds all where it was, in one place, or in the sensor's pattern
#: matches next to none.
COLLAPSED = 0.5
WORDS = {1: 'better', 0: 'not surely better', -1: 'worse'}

#: Evidence of one model, by the stamps of the clip that it is of.
Known = dict[tuple[int, ...], Evidence]


@dataclass(frozen=True)
class Verdict:
    """What the gate said of a candidate."""

    step: int
    promoted: bool
    rolled_back: bool
    version: int  #: of the weights in use after the verdict
    reason: str
    figures: dict[str, float]


@dataclass(frozen=True)
class Judgement:
    """What the evidence so far says of one model beside another."""

    mark: int  #: +1 where surely better, -1 where surely worse, 0 where not sure
    reason: str
    figures: dict[str, float]
    share: float = 1.0  #: of the way to the candidate that was judged
    evidence: Known = field(default_factory=dict)


def consider(
    candidate: nn.Module, incumbent: nn.Module, clips: Sequence[Clip], options: BundleOptions,
    known: Known,
) -> tuple[Judgement, nn.Module]:
    """
    Say whether to take a candidate, whole or in part, and return what would be taken.

    Part of a gain that is not sure may be: the mean of two sets of weights is often better than
    either, and it is nearer to the weights in use, so that fewer matches differ by chance.
    ``known``, the evidence of the weights in use, is brought up to date.
    """
    for name in known.keys() - {tuple(clip.stamps) for clip in clips}:
        del known[name]
    judgement = weigh(candidate, incumbent, clips, options, known)
    if judgement.mark != 0:
        return judgement, candidate
    halfway = interpolated(incumbent, candidate, PART)
    again = weigh(halfway, incumbent, clips, options, known)
    if again.mark <= 0:
        return judgement, candidate
    reason = f'{again.reason}, with {100 * PART:.0f} % of the way to the candidate'
    return replace(again, reason=reason, share=PART), halfway


def weigh(
    candidate: nn.Module, incumbent: nn.Module, clips: Sequence[Clip], options: BundleOptions,
    known: Known,
) -> Judgement:
    """
    Say whether a candidate is better, after as many clips as a sure word needs.

    The newest comes first, for the robot is there, then the oldest, lest it forgets where it came
    from, and so on inwards.
    """
    left, ours = list(clips), {}
    while left:
        clip = left.pop(-1 if len(ours) % 2 == 0 else 0)
        name = tuple(clip.stamps)
        if name not in known:
            known[name] = gather(incumbent, clip, options)
        ours[name] = gather(candidate, clip, options)
        judgement = judge([*ours.values()], [known[name] for name in ours])
        if judgement.mark and len(ours) >= LOOKED:
            break
    return replace(judgement, evidence=ours)


def judge(candidate: Sequence[Evidence], incumbent: Sequence[Evidence]) -> Judgement:
    """
    Say whether a candidate is better than the weights in use, by the evidence of both.

    They are paired on the same points of the same clips. Better is a model of whose matches more
    lie within ``NEAR_PX`` of where the other views have the point, by ``Z`` standard errors, and
    which has not collapsed on the known warps.
    """
    gain, error = mean_and_error(
        torch.cat([
            hits(ours.error) - hits(theirs.error)
            for ours, theirs in zip(candidate, incumbent, strict=True)
        ]),
        torch.cat([evidence.view for evidence in incumbent]),
        torch.cat([evidence.corner - (k << 32) for k, evidence in enumerate(incumbent)]),
    )
    gain, error = 100 * gain, 100 * error
    figures = {'gain': gain, 'gain_error': error}
    for name, evidences in (('', candidate), ('_before', incumbent)):
        figures[f'reprojection_1px{name}'] = _share([e.error for e in evidences])
        figures[f'known_1px{name}'] = _share([e.known for e in evidences])
        figures[f'track_length{name}'] = sum(e.track_length for e in evidences) / len(evidences)
    figures['images'] = float(len(torch.cat([e.view for e in incumbent]).unique()))
    if figures['known_1px'] < COLLAPSED * figures['known_1px_before']:
        return Judgement(
            -1,
            f'collapsed: {figures["known_1px"]:.0f} % of the known warps are matched within '
            f'{NEAR_PX:g} px, {figures["known_1px_before"]:.0f} % before',
            figures,
        )
    mark = (gain > Z * error) - (gain < -Z * error)
    return Judgement(
        mark,
        f'{WORDS[mark]}: {figures["reprojection_1px"]:.1f} % of the corners agree in '
        f'{figures["images"]:.0f} held-out images, {figures["reprojection_1px_before"]:.1f} % '
        f'before ({gain:+.1f} ± {Z * error:.1f})',
        figures,
    )


def hits(error: Tensor) -> Tensor:
    """Return 1 where an error (N,) px is small, else 0."""
    return (error < NEAR_PX).float()


def mean_and_error(x: Tensor, *groups: Tensor) -> tuple[float, float]:
    """
    Return the mean of x (N,) and its standard error.

    What lies in one group errs together, by each of ``groups`` (N,): their variances add up.
    """
    if len(x) < 2:
        return 0.0, float('inf')
    mean, variance = x.mean(), 0.0
    for group in groups:
        _, index = torch.unique(group, return_inverse=True)
        count = int(index.max()) + 1
        if count < 2:
            return float(mean), float('inf')
        sums = torch.zeros(count).index_add_(0, index, x - mean)
        variance += float(sums.square().sum()) * count / (count - 1)
    return float(mean), variance**0.5 / len(x)


def _share(errors: list[Tensor]) -> float:
    error = torch.cat(errors)
    return float(100 * hits(error).mean()) if len(error) else 0.0
