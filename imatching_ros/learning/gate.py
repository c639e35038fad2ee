"""The gate: new weights reach the robot only where they are better, on evidence that no training step saw."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..bundle.options import BundleOptions
from ..geometry import lie
from ..geometry.two_view import sampson_error
from ..matching.detector import detect
from ..matching.protocol import Matcher
from .lesson import Lesson, Pair, match, rematch, resolve
from .probe import Probe, probe_error

CORNERS = 200  # per image
TRUNCATE_PX = 5.0  # an error beyond counts as this: how wrong a wrong match is says nothing
Z = 1.64  # one-sided 95 %


@dataclass(frozen=True)
class Evidence:
    """Errors of one model on the held-out windows and on the known warps, each truncated."""

    reprojection: Tensor  #: (M,) px, of the held-out windows' rows, each window at its own optimum. Told, not judged
    #: by: the rows are those that the weights in use found consistent, which favours these weights.
    epipolar: Tensor  #: (N,) px, of all corners, at the same poses
    probe: Tensor  #: (P,) px, distance from the truth


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
    matcher: Matcher, held_out: list[tuple[Lesson, list[Pair]]], probes: list[Probe], options: BundleOptions
) -> Evidence:
    """The evidence of one model on windows, each with the pairs to measure, and on known warps.

    The lower level is solved for each model anew: T*, p* are its own.
    """
    reprojection, epipolar = [], []
    for lesson, pairs in held_out:
        matched = rematch(matcher, lesson)
        solved = resolve(matched, options)
        measured = replace(solved or matched, pairs=pairs)
        errors = measured.error_px(), epipolar_error(matcher, measured)
        if solved is None:  # a model under which the window falls apart is wrong everywhere in it
            errors = tuple(torch.full_like(error, torch.inf) for error in errors)
        reprojection.append(errors[0])
        epipolar.append(errors[1])
    probe = [probe_error(matcher, known) for known in probes]
    return Evidence(*(torch.cat(errors).clamp(max=TRUNCATE_PX) for errors in (reprojection, epipolar, probe)))


@torch.no_grad()
def epipolar_error(matcher: Matcher, lesson: Lesson) -> Tensor:
    """Sampson distances (N,), undistorted px, of the corners of each pair's reference at the window's poses.

    The rows of a window are matches that were kept; a matcher that fails half of the time has a fair half of rows.
    Corners are the frozen detector's: they ask the matcher everywhere.
    """
    camera, window = lesson.camera, lesson.window
    references = {pair.reference for pair in lesson.pairs}
    corners = {i: torch.from_numpy(detect(lesson.images[i, 0].numpy(), CORNERS)) for i in references}
    errors = []
    for pair, matches in zip(lesson.pairs, match(matcher, lesson, lesson.pairs, corners), strict=True):
        T = lie.compose(lie.inverse(window.T_world_camera[pair.target]), window.T_world_camera[pair.reference])
        xy_i = camera.normalise(corners[pair.reference].double())
        xy_j = camera.normalise(matches.uv[0].cpu().double())
        errors.append(sampson_error(T, xy_i, xy_j) * camera.focal)
    return torch.cat(errors)


def judge(candidate: Evidence, incumbent: Evidence) -> tuple[int, str, dict[str, float]]:
    """+1 promote, 0 undecided, -1 worse; the reason; the figures. Paired on the same rows and the same points."""
    window_mean, window_error = _mean_and_error(candidate.epipolar - incumbent.epipolar)
    probe_mean, probe_error = _mean_and_error(candidate.probe - incumbent.probe)
    figures = {}
    for name, evidence in (("", candidate), ("_before", incumbent)):
        figures[f"reprojection_px{name}"] = float(evidence.reprojection.mean())
        figures[f"epipolar_px{name}"] = float(evidence.epipolar.mean())
        figures[f"epipolar_1px{name}"] = _share(evidence.epipolar)
        figures[f"probe_px{name}"] = float(evidence.probe.mean())
        figures[f"probe_1px{name}"] = _share(evidence.probe)
    if probe_mean - Z * probe_error > 0:
        return -1, f"known warps are matched worse by {probe_mean:.3f} px", figures
    hits_mean, hits_error = _mean_and_error((candidate.probe < 1).float() - (incumbent.probe < 1).float())
    if hits_mean + Z * hits_error < 0:
        return -1, f"{-100 * hits_mean:.1f} points fewer of the known warps are matched within 1 px", figures
    if window_mean - Z * window_error > 0:
        return -1, f"held-out windows are explained worse by {window_mean:.3f} px", figures
    if window_mean + Z * window_error < 0:
        return 1, f"held-out windows are explained better by {-window_mean:.3f} px, known warps no worse", figures
    if probe_mean + Z * probe_error < 0:
        return 1, f"known warps are matched better by {-probe_mean:.3f} px, held-out windows no worse", figures
    return 0, f"no certain difference on held-out windows ({window_mean:+.3f} px)", figures


def _mean_and_error(x: Tensor) -> tuple[float, float]:
    if len(x) < 2:
        return 0.0, float("inf")
    return float(x.mean()), float(x.std() / len(x) ** 0.5)


def _share(error: Tensor) -> float:
    return float((error < 1).float().mean() * 100)
