"""The gate: new weights reach the robot only where they are better, on evidence that no training step saw."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..bundle.options import BundleOptions
from ..matching.protocol import Matcher
from .lesson import Lesson, rematch, resolve
from .probe import Probe, probe_error

TRUNCATE_PX = 5.0  # an error beyond counts as this: how wrong a wrong match is says nothing
Z = 1.64  # one-sided 95 %


@dataclass(frozen=True)
class Evidence:
    """Errors of one model on the held-out windows and on the known warps, each truncated."""

    windows: list[Tensor]  #: per window (M,) px, reprojection error of all rows at the window's own optimum
    probes: list[Tensor]  #: per probe (N,) px, distance from the truth


@dataclass(frozen=True)
class Verdict:
    """What the gate said of a candidate."""

    step: int
    promoted: bool
    rolled_back: bool
    version: int  #: of the weights in use after the verdict
    reason: str
    figures: dict[str, float]


def gather(matcher: Matcher, lessons: list[Lesson], probes: list[Probe], options: BundleOptions) -> Evidence:
    """The evidence of one model. The lower level is solved for each model anew: T*, p* are its own."""
    windows = []
    for lesson in lessons:
        matched = rematch(matcher, lesson)
        solved = resolve(matched, options)
        error = solved.error_px() if solved else torch.full_like(matched.error_px(), torch.inf)
        windows.append(error.clamp(max=TRUNCATE_PX))
    return Evidence(windows, [probe_error(matcher, probe).clamp(max=TRUNCATE_PX) for probe in probes])


def judge(candidate: Evidence, incumbent: Evidence) -> tuple[int, str, dict[str, float]]:
    """+1 promote, 0 undecided, -1 worse; the reason; the figures. Paired on the same rows and the same points."""
    window = torch.cat([c - i for c, i in zip(candidate.windows, incumbent.windows, strict=True)])
    probe = torch.cat([c - i for c, i in zip(candidate.probes, incumbent.probes, strict=True)])
    window_mean, window_error = _mean_and_error(window)
    probe_mean, probe_error_ = _mean_and_error(probe)
    figures = {
        "reprojection_px": float(torch.cat(candidate.windows).mean()),
        "reprojection_px_before": float(torch.cat(incumbent.windows).mean()),
        "inliers": _share(candidate.windows, 2.0),
        "inliers_before": _share(incumbent.windows, 2.0),
        "probe_px": float(torch.cat(candidate.probes).mean()),
        "probe_px_before": float(torch.cat(incumbent.probes).mean()),
        "probe_1px": _share(candidate.probes, 1.0),
        "probe_1px_before": _share(incumbent.probes, 1.0),
    }
    if probe_mean - Z * probe_error_ > 0 or figures["probe_1px"] < figures["probe_1px_before"] - 0.5:
        return -1, f"known warps are matched worse by {probe_mean:+.3f} px", figures
    if window_mean - Z * window_error > 0:
        return -1, f"held-out windows are explained worse by {window_mean:+.3f} px", figures
    if window_mean + Z * window_error < 0:
        return 1, f"held-out windows are explained better by {-window_mean:.3f} px, known warps no worse", figures
    return 0, f"no certain difference on held-out windows ({window_mean:+.3f} px)", figures


def _mean_and_error(x: Tensor) -> tuple[float, float]:
    if len(x) < 2:
        return 0.0, float("inf")
    return float(x.mean()), float(x.std() / len(x) ** 0.5)


def _share(errors: list[Tensor], px: float) -> float:
    return float((torch.cat(errors) < px).float().mean() * 100)
