"""The report's pictures, as inline SVG that follows the page's light or dark colours."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
import io
import re

import cv2
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from .matching import PairMatches
from .trajectory import TrajectoryAccuracy

#: Upper limit of the error, px, with its colour and name.
ERROR_CLASSES = (
    (1.0, '#35c46a', 'under 1 px'),
    (2.0, '#f2d43d', '1 to 2 px'),
    (5.0, '#ff9130', '2 to 5 px'),
    (np.inf, '#ff3b4e', 'over 5 px'),
)
NEUTRAL = '#4db8ff'
BLUE, GREEN, RED, GREY = '#3f83f0', '#1fa35b', '#e0475b', '#8a8f98'
#: Of a verdict's figures, those that ``Event.evidence`` holds.
EVIDENCE = ('reprojection_1px_before', 'reprojection_1px', 'gain_error')
#: How verdicts are drawn: colour and line.
LOOKS = {'promoted': (GREEN, '-'), 'rollback': (RED, '--'), 'refused': (GREY, ':')}
INK = '#010203'  # stands for the page's own text colour in a matplotlib figure
STYLE = {
    'svg.fonttype': 'none', 'font.family': 'sans-serif', 'font.size': 10.5,
    'text.color': INK, 'axes.labelcolor': INK, 'axes.edgecolor': GREY, 'xtick.color': INK,
    'ytick.color': INK,
    'axes.spines.top': False, 'axes.spines.right': False, 'axes.linewidth': 0.8,
    'axes.grid': True, 'grid.color': GREY, 'grid.alpha': 0.25, 'grid.linewidth': 0.6,
    'legend.frameon': False, 'legend.fontsize': 10, 'axes.titlesize': 10.5,
    'axes.titlelocation': 'left',
}


@dataclass(frozen=True)
class Event:
    """A mark on the axis of gradient steps."""

    step: int
    kind: str  #: "promoted", "refused" (both verdicts of the gate) or "rollback"
    version: int | None = None  #: of the weights that were promoted or gone back to
    reason: str = ''
    #: the share of the corners in held-out images that agree, percent, with the weights in use and
    #: with the candidate; and the standard error of the difference
    evidence: tuple[float, float, float] | None = None

    @classmethod
    def of_verdict(
        cls, step: int, promoted: bool, rolled_back: bool, version: int, reason: str,
        figures: Mapping[str, float],
    ) -> Event:
        """Return the mark of what the gate decided after a step, by the figures that it gave."""
        kind = 'rollback' if rolled_back else 'promoted' if promoted else 'refused'
        known = all(np.isfinite(figures.get(name, np.nan)) for name in EVIDENCE)
        evidence = tuple(figures[name] for name in EVIDENCE) if known else None
        return cls(step, kind, version, reason, evidence)


@dataclass(frozen=True)
class Pictures:
    """What the report draws; of a piece that is missing it says so."""

    before: PairMatches | None = None  #: a pair matched with the first weights
    after: PairMatches | None = None  #: the same pair with the last weights
    trajectory: TrajectoryAccuracy | None = None
    loss: Sequence[tuple[int, float]] = ()  #: (step, loss)
    events: Sequence[Event] = ()  #: verdicts of the gate, and rollbacks


def error_counts(matches: PairMatches) -> list[int]:
    """Return how many visible queries fall into each of ``ERROR_CLASSES``."""
    error = matches.error_px[matches.visible].numpy()
    return np.bincount(_classes(error), minlength=len(ERROR_CLASSES)).tolist()


def matches_svg(matches: PairMatches) -> str:
    """
    Return reference and target side by side, each visible query coloured by its error.

    In the target a line leads from the match to where it truly lies. Without depth the truth is
    not known: then all matches have one colour, and the line leads to the query's pixel.
    """
    height, width = matches.reference.shape
    gap = round(width * 0.015)
    radius = width / 200
    uv, queries = matches.uv.numpy(), matches.queries.numpy()
    if matches.visible.any():
        index = np.flatnonzero(matches.visible.numpy())
        colour = [ERROR_CLASSES[c][1] for c in _classes(matches.error_px.numpy()[index])]
        origin = matches.true_uv.numpy()
        order = np.argsort(matches.error_px.numpy()[index], kind='stable')  # the worst on top
    else:
        index = np.flatnonzero(np.isfinite(uv).all(-1))
        colour, origin, order = [NEUTRAL] * len(index), queries, np.arange(len(index))
    left, right = [], []
    for k in order:
        i, c = index[k], colour[k]
        left.append(
            f'<circle cx="{queries[i, 0]:.1f}" cy="{queries[i, 1]:.1f}" r="{radius:.2f}" '
            f'fill="{c}"/>'
        )
        if not np.isfinite(uv[i]).all():
            continue
        ends = (*uv[i], *origin[i])
        right.append(
            '<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" stroke="{}"/>'.format(*ends, c)
        )
        right.append(
            f'<circle cx="{uv[i, 0]:.1f}" cy="{uv[i, 1]:.1f}" r="{radius:.2f}" fill="{c}"/>'
        )
    halves = ''.join(
        f'<svg x="{x}" y="0" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        f'<image width="{width}" height="{height}" href="data:image/jpeg;base64,{_jpeg(image)}"/>'
        f'<g stroke-width="{radius * 0.45:.2f}">{"".join(marks)}</g></svg>'
        for x, image, marks in ((0, matches.reference, left), (width + gap, matches.target, right))
    )
    return f'<svg class="photo" viewBox="0 0 {2 * width + gap} {height}" role="img">{halves}</svg>'


def trajectory_svg(trajectory: TrajectoryAccuracy) -> str:
    """Return the aligned path over the true one, in their longest axes, and its error."""
    truth, estimate = trajectory.truth, trajectory.estimate
    first, second = sorted(np.argsort(np.ptp(truth, axis=0))[1:])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 4.2), layout='constrained')
        path, error = figure.subplots(1, 2, width_ratios=(3, 2))
        path.plot(
            truth[:, first], truth[:, second], color=GREY, linewidth=2.5, label='ground truth'
        )
        path.plot(
            estimate[:, first],
            estimate[:, second],
            color=BLUE,
            linewidth=1.3,
            label='estimate, aligned',
        )
        path.plot(*truth[0, [first, second]], 'o', color=GREY, markersize=6, label='start')
        path.set_aspect('equal', adjustable='datalim')
        path.set(
            xlabel=f'{"xyz"[first]}, m',
            ylabel=f'{"xyz"[second]}, m',
            title='Path in its two longest axes',
        )
        path.legend(loc='best')
        distance = 100 * np.linalg.norm(estimate - truth, axis=1)
        error.plot(distance, color=BLUE, linewidth=1.3)
        error.axhline(100 * (trajectory.ate_m or 0.0), color=GREY, linewidth=1, linestyle='--')
        error.set(
            xlabel='pose', ylabel='cm', title='Position error (dashed: RMSE)', ylim=(0, None)
        )
        return _svg(figure, 'trajectory')


def learning_svg(loss: Sequence[tuple[int, float]], events: Sequence[Event]) -> str:
    """
    Return the loss over gradient steps, with verdicts and rollbacks where they fell.

    Below it, where verdicts tell, what each was judged by: the share of corners that agree with
    the weights in use and with the candidate, and how sure the difference is.
    """
    told = [event for event in events if event.evidence]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 5.8 if told else 3.4), layout='constrained')
        axes = figure.subplots(2 if told else 1, 1, sharex=True, squeeze=False)[:, 0]
        _draw_loss(axes[0], loss)
        for kind, (colour, line) in LOOKS.items():
            marks = [event for event in events if event.kind == kind]
            for k, event in enumerate(marks):
                axes[0].axvline(
                    event.step, color=colour, linestyle=line, linewidth=1.3, alpha=0.8,
                    label=None if k else kind,
                )
                if event.version is not None and kind != 'refused' and len(marks) <= 15:
                    axes[0].text(
                        event.step, 1.0, f'v{event.version}', color=colour, va='bottom',
                        ha='center', transform=axes[0].get_xaxis_transform(),
                    )
        if told:
            _draw_evidence(axes[1], told)
        axes[-1].set(xlabel='gradient step')
        for each in axes:
            each.legend(loc='upper left', bbox_to_anchor=(1.0, 1.0))
        return _svg(figure, 'learning')


def _draw_loss(axes: Axes, loss: Sequence[tuple[int, float]]) -> None:
    axes.set(ylabel='loss')
    if not loss:
        return
    steps, values = np.asarray(loss, np.float64).T
    axes.plot(steps, values, color=BLUE, linewidth=0.8, alpha=0.35)
    axes.plot(
        steps, _running_median(values), color=BLUE, linewidth=1.8, label='loss, running median'
    )
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, (5, 95)) if len(finite) else (0, 0)
    if finite.min(initial=1.0) > 0 and high > 20 * low:
        axes.set_yscale('log')


def _draw_evidence(axes: Axes, events: Sequence[Event]) -> None:
    """Draw what each verdict was judged by: in use, and the candidate ± 2 standard errors."""
    axes.set(ylabel='corners that agree, %')
    steps = [event.step for event in events]
    before, _, _ = zip(*(event.evidence for event in events), strict=True)
    axes.plot(
        steps, before, 'o', color=GREY, markerfacecolor='none', markersize=6,
        label='weights in use',
    )
    for kind, (colour, _) in LOOKS.items():
        ours = [event for event in events if event.kind == kind]
        if ours:
            _, after, error = np.array([event.evidence for event in ours]).T
            axes.errorbar(
                [event.step for event in ours], after, yerr=2 * error, fmt='o', color=colour,
                markersize=5, capsize=3, linewidth=1.2, label=f'candidate, {kind}',
            )


def _classes(error: np.ndarray) -> np.ndarray:
    return np.searchsorted([limit for limit, *_ in ERROR_CLASSES[:-1]], error, side='left')


def _running_median(values: np.ndarray) -> np.ndarray:
    half = max(len(values) // 40, 1)
    return np.array(
        [np.median(values[max(k - half, 0):k + half + 1]) for k in range(len(values))]
    )


def _jpeg(image: np.ndarray) -> str:
    data = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 80])[1]
    return base64.b64encode(data.tobytes()).decode()


def _svg(figure: Figure, name: str) -> str:
    """Return a figure as an SVG element of a page: no prolog, no namespace, the page's colour."""
    # the ids of two figures on one page must differ
    with matplotlib.rc_context({'svg.hashsalt': name}):
        buffer = io.StringIO()
        figure.savefig(buffer, format='svg', transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index('<svg'):]
    svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', '', svg)
    svg = re.sub(
        r'<svg ([^>]*?)width="[^"]*" height="[^"]*"|<svg height="[^"]*" ', r'<svg \1', svg, count=1
    )
    return (
        svg.replace(INK, 'currentColor')
        .replace('<svg ', '<svg class="plot" role="img" ', 1)
        .replace('xlink:', '')
    )
