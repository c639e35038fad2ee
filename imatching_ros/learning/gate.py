"""New weights reach the robot only where evidence that no training step saw is for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .lesson import encode, Lesson, match, Pair, rematch, resolve
from .probe import Probe, probe_error
from ..bundle.options import BundleOptions
from ..geometry import lie
from ..geometry.two_view import sampson_error
from ..matching.detector import detect
from ..matching.protocol import Matcher

CORNERS = 200  # per image
TRUNCATE_PX = 5.0  # an error beyond counts as this: how wrong a wrong match is says nothing
Z = 1.64  # one-sided 95 %
MARGIN = 0.05  # of the mean error in the held-out windows, by which new weights must be better
# the same where the known warps agree, better by MARGIN themselves: two witnesses, less of each;
# of errors truncated here, px, for what a good matcher gains drowns in its few gross ones
AGREED, CLOSE_PX = 0.02, 2.0
TOLERANCE = 0.005  # share of the points within 1 px


@dataclass(frozen=True)
class Evidence:
    """Errors of one model on the held-out windows and on the known warps, each truncated."""

    #: (M,) px, of the held-out windows' rows, each window at its own optimum. Told, not judged
    reprojection: Tensor
    #: by: the rows are those that the weights in use found consistent, which favours these
    #: weights.
    epipolar: Tensor  #: (N,) px, of all corners, at the same poses
    probe: Tensor  #: (P,) px, distance from the truth
    target: Tensor  #: (N,) int64, which image the point of ``epipolar`` was sought in
    image: Tensor  #: (P,) int64, which image the point of ``probe`` is of
    #: (L,) int64, observations of each landmark of the held-out windows. Told, not judged by
    length: Tensor


@dataclass(frozen=True)
class Verdict:
    """What the gate said of a candidate."""

    step: int
    promoted: bool
    rolled_back: bool
    version: int  #: of the weights in use after the verdict
    reason: str
    figures: dict[str, float]


def gather(
    matcher: Matcher,
    held_out: list[tuple[Lesson, list[Pair]]],
    probes: list[Probe],
    options: BundleOptions,
) -> Evidence:
    """
    Return the evidence of one model on windows, each with the pairs to measure, and known warps.

    The lower level is solved for each model anew: T*, p* are its own.
    """
    reprojection, epipolar, target, length = [], [], [], []
    for window, (lesson, pairs) in enumerate(held_out):
        with torch.no_grad():
            features = encode(matcher, lesson, lesson.pairs)
        matched = rematch(matcher, lesson, features)
        solved = resolve(matched, options)
        measured = replace(solved or matched, pairs=pairs)
        distances, sought = epipolar_error(matcher, measured, features)
        errors = measured.error_px(), distances
        if solved is None:  # a model under which the window falls apart is wrong everywhere in it
            errors = tuple(torch.full_like(error, torch.inf) for error in errors)
        reprojection.append(errors[0])
        epipolar.append(errors[1])
        length.append(measured.window.observations * (solved is not None))
        target.append(sought + window * len(lesson.images))
    probe = [probe_error(matcher, known) for known in probes]
    image = [torch.full((len(error),), k) for k, error in enumerate(probe)]
    errors = (
        torch.cat(errors).clamp(max=TRUNCATE_PX) for errors in (reprojection, epipolar, probe)
    )
    return Evidence(*errors, torch.cat(target), torch.cat(image), torch.cat(length))


@torch.no_grad()
def epipolar_error(
    matcher: Matcher, lesson: Lesson, features: Mapping[int, Any]
) -> tuple[Tensor, Tensor]:
    """
    Return how far the corners of each pair's reference are matched from their epipolar lines.

    That is the Sampson distance (N,), undistorted px, at the window's poses, and the index (N,) of
    the image that each corner was sought in. The rows of a window are matches that were kept; a
    matcher that fails half of the time has a fair half of rows. Corners are the frozen detector's:
    they ask the matcher everywhere.
    """
    camera, window = lesson.camera, lesson.window
    references = {pair.reference for pair in lesson.pairs}
    corners = {
        i: torch.from_numpy(detect(lesson.images[i][0].numpy(), CORNERS)) for i in references
    }
    errors, sought = [], []
    for pair, matches in zip(
        lesson.pairs, match(matcher, lesson, lesson.pairs, corners, features), strict=True
    ):
        T = lie.compose(
            lie.inverse(window.T_world_camera[pair.target]), window.T_world_camera[pair.reference]
        )
        xy_i = camera.normalise(corners[pair.reference].double())
        xy_j = camera.normalise(matches.uv[0].cpu().double())
        errors.append(sampson_error(T, xy_i, xy_j) * camera.focal)
        sought.append(torch.full((len(xy_i),), pair.target))
    return torch.cat(errors), torch.cat(sought)


def judge(candidate: Evidence, incumbent: Evidence) -> tuple[int, str, dict[str, float]]:
    """
    Return +1 to promote, 0 where undecided, -1 where worse; the reason; and the figures.

    Models are paired on the same points, with a certainty of 95 % (one-sided). Promoted is what
    explains the held-out windows better, their mean error falls by more than ``MARGIN`` and more
    of their points, by more than ``TOLERANCE``, lie within 1 px; and what is no worse at the known
    warps: neither with certainty, nor so that, as a best guess, more than ``TOLERANCE`` and a
    standard error of their points within 1 px are lost. A sure gain of ``AGREED`` in the windows
    is enough where the known warps are matched better by ``MARGIN``. Known warps alone are no
    ground for promotion: in good light a matcher became 10 % better at them while its matches of
    true motion became worse, and the windows hardly moved. Points of one image err together: what
    counts as independent is the image, not the point.
    """
    window_mean, window_error = _mean_and_error(
        candidate.epipolar - incumbent.epipolar, incumbent.target
    )
    probe_mean, probe_error = _mean_and_error(candidate.probe - incumbent.probe, incumbent.image)
    figures = {}
    for name, evidence in (('', candidate), ('_before', incumbent)):
        figures[f'reprojection_px{name}'] = float(evidence.reprojection.mean())
        figures[f'reprojection_1px{name}'] = _share(evidence.reprojection)
        figures[f'track_length{name}'] = float(evidence.length.double().mean())
        figures[f'epipolar_px{name}'] = float(evidence.epipolar.mean())
        figures[f'epipolar_1px{name}'] = _share(evidence.epipolar)
        figures[f'probe_px{name}'] = float(evidence.probe.mean())
        figures[f'probe_1px{name}'] = _share(evidence.probe)
    if probe_mean - Z * probe_error > 0:
        return -1, f'known warps are matched worse by {probe_mean:.3f} px', figures
    hits_mean, hits_error = _mean_and_error(
        _hits(candidate.probe, incumbent.probe), incumbent.image
    )
    if hits_mean + Z * hits_error < 0:
        return (
            -1, f'{-100 * hits_mean:.1f} points fewer of the known warps are matched within 1 px',
            figures,
        )
    if window_mean - Z * window_error > 0:
        return -1, f'held-out windows are explained worse by {window_mean:.3f} px', figures
    if -hits_mean > max(TOLERANCE, hits_error):
        return (
            0,
            f'{-100 * hits_mean:.1f} points fewer of the known warps are within 1 px, though '
            'not surely',
            figures,
        )
    near_mean, near_error = _mean_and_error(
        _hits(candidate.epipolar, incumbent.epipolar), incumbent.target
    )
    error = max(float(incumbent.epipolar.mean()), 1e-9)
    gain, least = -window_mean / error, -(window_mean + Z * window_error) / error
    sure = near_mean - Z * near_error
    clear = least > MARGIN and sure > TOLERANCE
    close_mean, close_error = _mean_and_error(
        candidate.epipolar.clamp(max=CLOSE_PX) - incumbent.epipolar.clamp(max=CLOSE_PX),
        incumbent.target,
    )
    close = -(close_mean + Z * close_error)
    known = -probe_mean / max(float(incumbent.probe.mean()), 1e-9)
    agreed = (
        close > AGREED * float(incumbent.epipolar.clamp(max=CLOSE_PX).mean())
        and sure > 0 and known > MARGIN
    )
    if clear or agreed:
        warps = 'no worse' if clear else f'better by {100 * known:.1f} %'
        return (
            1,
            f'held-out windows are explained better by {100 * gain:.1f} %, known warps {warps}',
            figures,
        )
    return (
        0, f'held-out windows are not explained better by a clear margin ({100 * gain:+.1f} %)',
        figures,
    )


def _hits(candidate: Tensor, incumbent: Tensor) -> Tensor:
    return (candidate < 1).float() - (incumbent < 1).float()


def _mean_and_error(x: Tensor, group: Tensor) -> tuple[float, float]:
    """
    Return the mean of x (N,) and its standard error.

    What lies in one ``group`` (N,) of points errs together.
    """
    if len(x) < 2:
        return 0.0, float('inf')
    mean = x.mean()
    alone = x.std() / len(x) ** 0.5
    _, index = torch.unique(group, return_inverse=True)
    sums = torch.zeros(int(index.max()) + 1).index_add_(0, index, (x - mean).float())
    together = (sums.square().sum() * len(sums) / max(len(sums) - 1, 1)).sqrt() / len(x)
    return float(mean), float(torch.maximum(alone, together))


def _share(error: Tensor) -> float:
    return float((error < 1).float().mean() * 100)
