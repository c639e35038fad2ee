"""
A run's figures as report.json, and report.html.

One file with pictures that a person would look at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from html import escape
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from .matching import PairMatches
from .pictures import ERROR_CLASSES, error_counts, Event, learning_svg, matches_svg, trajectory_svg
from .trajectory import TrajectoryAccuracy
from ..matching import weights

ACCURACY = {
    'mma_1px': 'MMA at 1 px', 'mma_2px': 'MMA at 2 px', 'mma_5px': 'MMA at 5 px',
    'auc_5': 'Pose AUC at 5°', 'auc_10': 'Pose AUC at 10°', 'auc_20': 'Pose AUC at 20°',
}  # fmt: skip
#: Every figure that report.json holds, whether it can be had or not.
FIGURES = {
    'input': ('frames', 'frames_matched', 'keyframes', 'dropped', 'true_poses'),
    'trajectory': ('ate_m', 'path_m', 'ate_percent'),
    'learning': ('steps', 'windows', 'promotions', 'rollbacks', 'seconds', 'model_version'),
    'latency_ms': ('matcher_p50', 'matcher_p95', 'bundle_p50', 'bundle_p95', 'learner_step_p50'),
}
SCALARS = ('throughput_hz', 'peak_memory_mb')

NO_TRUTH = 'not available: no ground truth in the recording'
NO_DEPTH = 'not available: no depth in the recording'
NO_POSES = (
    'not available: fewer than three poses with ground truth on a path that fixes the alignment'
)
NO_PAIRS = (
    'not available: no two of the images that were measured, 5, 10 or 20 apart, have true poses'
)
NO_LEARNING = 'not available: no gradient step in this run'


@dataclass(frozen=True)
class Pictures:
    """What the report draws; a piece that is missing is said to be missing."""

    before: PairMatches | None = None  #: a pair matched with the first weights
    after: PairMatches | None = None  #: the same pair with the last weights
    trajectory: TrajectoryAccuracy | None = None
    loss: Sequence[tuple[int, float]] = ()  #: (step, loss)
    events: Sequence[Event] = ()  #: verdicts of the gate, and rollbacks


def complete(figures: Mapping[str, Any]) -> dict[str, Any]:
    """
    ``figures`` with every key of report.json; what is missing or not finite is None.

    Sections may be mappings or dataclasses (MatchingAccuracy; TrajectoryAccuracy, without its
    arrays).
    """
    given = _plain(figures)
    whole: dict[str, Any] = {
        section: dict.fromkeys(keys) | _figures(given.pop(section, None))
        for section, keys in FIGURES.items()
    }
    matching = _figures(given.pop('matching', None))
    whole['matching'] = {
        when: dict.fromkeys(ACCURACY) | _figures(matching.get(when))
        for when in ('before', 'after')
    }
    return whole | {key: given.pop(key, None) for key in SCALARS} | given


def write_report(
    run_dir: str | Path,
    figures: Mapping[str, Any],
    pictures: Pictures | None = None,
    *,
    title: str = 'imatching',
    command: str = '',
    versions: Mapping[str, str] | None = None,
) -> Path:
    """
    Write report.json and report.html into ``run_dir``, each whole or not at all.

    Return the latter's path.

    ``figures`` is a nested mapping with the keys of ``FIGURES``, ``SCALARS`` and ``matching
    {before, after}``; any may be missing. ``title`` names the run, ``command`` is what made it,
    ``versions`` of what.
    """
    figures = complete({**figures, 'command': command or None, 'versions': dict(versions or {})})
    run_dir = Path(run_dir)
    text = json.dumps(figures, indent=2, allow_nan=False, ensure_ascii=False) + '\n'
    weights.write(run_dir / 'report.json', text.encode())
    path = run_dir / 'report.html'
    weights.write(path, _page(figures, pictures or Pictures(), title).encode())
    return path


def console_table(figures: Mapping[str, Any]) -> Group:
    """Return the result on a terminal of 80 columns: accuracy before and after, then the run."""
    figures = complete(figures)
    before, after = figures['matching']['before'], figures['matching']['after']
    matching = Table(
        box=box.SIMPLE_HEAD, padding=(0, 2), title='Matching accuracy, %', title_justify='left'
    )
    matching.add_column('')
    for name in ('before', 'after', 'change'):
        matching.add_column(name, justify='right')
    for key, label in ACCURACY.items():
        sign = _sign(before[key], after[key])
        colour = {1: 'green', -1: 'red'}.get(sign, 'dim')
        change = Text(_change(before[key], after[key]), style=colour)
        matching.add_row(label, _number(before[key]), Text(_number(after[key]), 'bold'), change)
    run = Table(
        box=box.SIMPLE_HEAD, padding=(0, 2), show_header=False, title='Run', title_justify='left'
    )
    for label, value in _run_rows(figures):
        run.add_row(label, value)
    return Group(matching, run)


def _run_rows(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    frames, path, learning, latency = (
        figures[key] for key in ('input', 'trajectory', 'learning', 'latency_ms')
    )
    error = NO_POSES if frames['true_poses'] else NO_TRUTH
    if path['ate_m'] is not None:
        error = (
            f'{_metres(path["ate_m"])} over {_metres(path["path_m"])} '
            f'({_number(path["ate_percent"], 2)} %)'
        )
    return [
        ('Frames matched', f'{_number(frames["frames_matched"])} of {_number(frames["frames"])}'),
        ('Keyframes', _number(frames['keyframes'])),
        ('Frames dropped', _number(frames['dropped'])),
        ('Trajectory error', error),
        ('Gradient steps', _number(learning['steps'])),
        ('Learned for', _number(learning['seconds'], unit=' s')),
        ('Versions promoted', _number(learning['promotions'])),
        ('Rolled back', _number(learning['rollbacks'])),
        ('Matcher, median', _number(latency['matcher_p50'], unit=' ms')),
        ('Bundle, median', _number(latency['bundle_p50'], unit=' ms')),
        ('Gradient step, median', _number(latency['learner_step_p50'], unit=' ms')),
        ('Throughput', _number(figures['throughput_hz'], unit=' Hz')),
    ]


# --- figures -------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Return what JSON can say: no NaN, no arrays, no numpy scalars."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {
            key: item for key, item in asdict(value).items() if not isinstance(item, np.ndarray)
        }
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _figures(section: Any) -> dict[str, Any]:
    return section if isinstance(section, dict) else {}


def _number(value: Any, digits: int = 1, unit: str = '') -> str:
    if value is None:
        return '–'
    return (f'{value:.{digits}f}' if isinstance(value, float) else str(value)) + unit


def _metres(value: float | None) -> str:
    if value is None:
        return '–'
    return f'{100 * value:.1f} cm' if value < 1 else f'{value:.2f} m'


def _change(before: float | None, after: float | None) -> str:
    return f'{100 * (after / before - 1):+.1f} %' if before and after is not None else '–'


def _sign(before: float | None, after: float | None) -> int:
    return 0 if before is None or after is None else (after > before) - (after < before)


def _headline(figures: Mapping[str, Any]) -> str:
    before, after = (figures['matching'][when]['mma_1px'] for when in ('before', 'after'))
    auc = tuple(figures['matching'][when]['auc_10'] for when in ('before', 'after'))
    if before is not None and after is not None:
        return f'mma@1px {before:.1f}\u00a0% → {after:.1f}\u00a0%'
    if None not in auc:
        return f'pose auc@10° {auc[0]:.1f}\u00a0% → {auc[1]:.1f}\u00a0%'
    if figures['trajectory']['ate_percent'] is not None:
        return f'trajectory error {figures["trajectory"]["ate_percent"]:.2f} % of the path'
    counts = figures['input']
    return f'{_number(counts["frames_matched"])} of {_number(counts["frames"])} frames matched'


# --- the page ------------------------------------------------------------------------------------


def _page(figures: Mapping[str, Any], pictures: Pictures, title: str) -> str:
    headline = _headline(figures)
    body = ''.join(
        (
            f'<header><p class="title">{escape(title)}</p>'
            f'<h1>{escape(headline)}</h1>{_tiles(figures)}</header>',
            _section('Matching accuracy', _accuracy(figures)),
            _section('The same pair before and after', _pair(pictures)),
            _section('Trajectory', _trajectory(figures, pictures.trajectory)),
            _section('Learning', _learning(figures['learning'], pictures)),
            _section('Latency, throughput, input', _run(figures)),
            _section('How it was made', _origin(figures)),
        )
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta '
        'name="color-scheme" '
        f'content="light dark"><title>{escape(title)}: '
        f'{escape(headline)}</title><style>{CSS}</style></head>'
        f'<body><main>{body}</main></body></html>\n'
    )


def _section(title: str, body: str) -> str:
    return f'<section><h2>{title}</h2>{body}</section>'


def _missing(reason: str) -> str:
    return f'<p class="missing">{escape(reason)}</p>'


def _plot(svg: str) -> str:
    return f'<div class="scroll">{svg}</div>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    top = ''.join(f'<th>{cell}</th>' for cell in head)
    lines = ''.join(
        f'<tr><th>{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<table>{f"<thead><tr>{top}</tr></thead>" if head else ""}<tbody>{lines}</tbody></table>'
    )


def _tiles(figures: Mapping[str, Any]) -> str:
    counts, path, learning = figures['input'], figures['trajectory'], figures['learning']
    tiles = [
        (f'{_number(counts["frames_matched"])} / {_number(counts["frames"])}', 'frames matched'),
        (_number(path['ate_percent'], 2, ' %'), 'trajectory error'),
        (_number(learning['promotions']), 'versions promoted'),
        (_number(figures['throughput_hz'], unit=' Hz'), 'throughput'),
    ]
    return (
        '<dl class="tiles">'
        + ''.join(f'<div><dd>{escape(value)}</dd><dt>{label}</dt></div>' for value, label in tiles)
        + '</dl>'
    )


def _accuracy(figures: Mapping[str, Any]) -> str:
    before, after = figures['matching']['before'], figures['matching']['after']
    if all(section[key] is None for section in (before, after) for key in ACCURACY):
        return _missing(NO_PAIRS if figures['input']['true_poses'] else NO_TRUTH)
    rows = []
    for key, label in ACCURACY.items():
        look = {1: 'better', -1: 'worse'}.get(_sign(before[key], after[key]), '')
        values = (_number(value, unit=' %') for value in (before[key], after[key]))
        rows.append(
            (label, *values, f'<span class="{look}">{_change(before[key], after[key])}</span>')
        )
    note = (
        'MMA: share of all queries visible in both images that are matched within so many '
        'pixels, mean over pairs. '
    )
    note += 'AUC: area under the recall of relative poses up to so many degrees.'
    if all(
        section[key] is None
        for section in (before, after)
        for key in ('mma_1px', 'mma_2px', 'mma_5px')
    ):
        note += f' MMA is {NO_DEPTH}.'
    counts = [(after.get(key) or before.get(key), key) for key in ('pairs', 'points')]
    note += ''.join(f' {value} {key}.' for value, key in counts if value)
    return _table(('', 'before', 'after', 'change'), rows) + f'<p class="note">{note}</p>'


def _pair(pictures: Pictures) -> str:
    rows = [
        (name, match)
        for name, match in (('Before', pictures.before), ('After', pictures.after))
        if match
    ]
    if not rows:
        return _missing('not available: no pair of images was evaluated')
    parts = []
    for name, match in rows:
        if total := int(match.visible.sum()):
            legend = ''.join(
                f'<span><i style="background:{colour}"></i>{label} <b>{count}</b> '
                f'({100 * count / total:.0f} %)</span>'
                for (_, colour, label), count in zip(
                    ERROR_CLASSES, error_counts(match), strict=True
                )
            )
        else:
            legend = f'<span>{len(match.uv)} matches; their error is {NO_DEPTH}</span>'
        caption = f'<figcaption><b class="when">{name}</b>{legend}</figcaption>'
        parts.append(f'<figure>{caption}{matches_svg(match)}</figure>')
    seconds = abs(rows[0][1].pair.target - rows[0][1].pair.reference) / 1e9
    note = f'Left the reference with its query points, right the target {seconds:.2f} s later. '
    note += 'A line leads from each match to '
    note += (
        'its true place.' if rows[0][1].visible.any() else "the query's pixel in the reference."
    )
    return ''.join(parts) + f'<p class="note">{note}</p>'


def _trajectory(figures: Mapping[str, Any], trajectory: TrajectoryAccuracy | None) -> str:
    error = figures['trajectory']
    if error['ate_m'] is None:
        return _missing(NO_POSES if figures['input']['true_poses'] else NO_TRUTH)
    text = f'RMSE {_metres(error["ate_m"])} over a path of {_metres(error["path_m"])}'
    text += f', {_number(error["ate_percent"], 2)} % of it, after Sim(3) alignment.'
    picture = (
        _plot(trajectory_svg(trajectory))
        if trajectory is not None and len(trajectory.estimate)
        else ''
    )
    return f'<p>{text}</p>{picture}'


def _learning(figures: Mapping[str, Any], pictures: Pictures) -> str:
    if not figures['steps'] and not pictures.loss and not pictures.events:
        return _missing(NO_LEARNING)
    labels = {
        'steps': 'Gradient steps', 'windows': 'Windows learned from', 'promotions': 'Versions '
                                                                                    'promoted',
        'rollbacks': 'Rollbacks', 'seconds': 'Time, s', 'model_version': 'Version at the end',
    }  # fmt: skip
    picture = (
        _plot(learning_svg(pictures.loss, pictures.events))
        if pictures.loss or pictures.events
        else ''
    )
    verdicts = ''
    if reasons := [event for event in pictures.events if event.reason]:
        rows = [
            (
                str(e.step), escape(e.kind), f'v{e.version}' if e.version is not None else '–',
                escape(e.reason),
            )
            for e in reasons
        ]
        verdicts = (
            f"<details><summary>{len(rows)} verdicts and why</summary><div class='verdicts'>"
            f'{_table(("step", "verdict", "version", "reason"), rows)}</div></details>'
        )
    return (
        picture
        + _table((), [(label, _number(figures[key])) for key, label in labels.items()])
        + verdicts
    )


def _run(figures: Mapping[str, Any]) -> str:
    latency, counts = figures['latency_ms'], figures['input']
    times = [
        ('Matcher, per image', _number(latency['matcher_p50']), _number(latency['matcher_p95'])),
        ('Bundle, per image', _number(latency['bundle_p50']), _number(latency['bundle_p95'])),
        ('Learner, per step', _number(latency['learner_step_p50']), '–'),
    ]
    totals = [
        ('Frames', _number(counts['frames'])), ('Frames matched',
                                                _number(counts['frames_matched'])),
        ('Frames dropped', _number(counts['dropped'])),
        ('Keyframes', _number(counts['keyframes'])),
        ('Throughput, Hz', _number(figures['throughput_hz'])),
        ('Peak memory, MB', _number(figures['peak_memory_mb'])),
    ]  # fmt: skip
    return (
        f'<div class="columns">{_table(("ms", "median", "95 %"), times)}{_table((), totals)}</div>'
    )


def _origin(figures: Mapping[str, Any]) -> str:
    command = f'<pre>{escape(figures["command"])}</pre>' if figures['command'] else ''
    rows = [(escape(name), escape(str(version))) for name, version in figures['versions'].items()]
    return command + (_table((), rows) if rows else '') or _missing('not available: not recorded')


CSS = """
:root { --paper: #fcfcfb; --ink: #1d2024; --soft: #646a73; --line: #dfe1e4; --tile: #f1f2f3;
  --better: #14804a;
  --worse: #c02a3e; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171a; --ink: #e8e9eb; --soft: #9ba1aa;
  --line: #31353b;
  --tile: #1f2226; --better: #4fce8a; --worse: #ff7585; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui,
  -apple-system, "Segoe UI",
  Roboto, "Noto Sans", "DejaVu Sans", sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1040px; margin: 0 auto; padding: 48px 24px 80px; }
.title { margin: 0; color: var(--soft); overflow-wrap: anywhere; }
h1 { margin: 4px 0 28px; font-size: clamp(28px, 5vw, 46px); line-height: 1.15;
  letter-spacing: -0.02em;
  font-weight: 650; }
h2 { margin: 0 0 16px; font-size: 20px; font-weight: 650; letter-spacing: -0.01em; }
section { margin-top: 56px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 12px;
  margin: 0; }
.tiles div { background: var(--tile); border-radius: 10px; padding: 14px 18px; }
.tiles dd { margin: 0; font-size: 24px; font-weight: 600; line-height: 1.3; }
.tiles dt { color: var(--soft); font-size: 14px; }
table { border-collapse: collapse; width: 100%; max-width: 640px; }
th, td { padding: 7px 12px 7px 0; border-bottom: 1px solid var(--line); text-align: right;
  font-weight: 400; }
th:first-child { text-align: left; }
td:last-child, th:last-child { padding-right: 0; }
thead th { color: var(--soft); font-size: 14px; }
.better { color: var(--better); font-weight: 600; }
.worse { color: var(--worse); font-weight: 600; }
.note, .missing { color: var(--soft); font-size: 14px; max-width: 720px; }
.missing { border-left: 3px solid var(--line); padding: 2px 0 2px 12px; font-size: 16px; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr));
  gap: 16px 56px;
  align-items: start; }
figure { margin: 0 0 20px; }
figcaption { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 20px;
  margin-bottom: 8px;
  font-size: 14px; }
.when { font-size: 16px; min-width: 56px; }
figcaption i { display: inline-block; width: 10px; height: 10px; border-radius: 50%;
  margin-right: 6px; }
svg { display: block; width: 100%; height: auto; }
.photo > svg { height: 100%; }
.photo circle { stroke: #000b; stroke-width: 0.5; }
.scroll { overflow-x: auto; margin: 8px 0 16px; }
.plot { min-width: 600px; }
.plot text { font-family: inherit !important; }
details { margin-top: 16px; color: var(--soft); }
summary { cursor: pointer; }
.verdicts { max-height: 360px; overflow: auto; }
.verdicts table { max-width: none; }
.verdicts td:last-child { text-align: left; padding-left: 20px; }
pre { background: var(--tile); border-radius: 10px; padding: 14px 18px; overflow-x: auto;
  font-size: 14px;
  white-space: pre-wrap; overflow-wrap: anywhere; }
"""
