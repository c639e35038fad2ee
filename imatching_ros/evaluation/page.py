"""report.html: one page that needs nothing from outside, with pictures that a person looks at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .figures import ACCURACY, change, metres, MMA, NO_POSES, NO_TRUTH, number, sign
from .pictures import (
    ERROR_CLASSES,
    error_counts,
    Event,
    learning_svg,
    matches_svg,
    Pictures,
    trajectory_svg,
)
from .trajectory import TrajectoryAccuracy

NO_DEPTH = 'not available: no depth in the recording'
NO_PAIRS = (
    'not available: no two of the images that were measured, 5, 10 or 20 apart, have true poses'
)
NO_LEARNING = 'not available: no gradient step in this run'


def page(figures: Mapping[str, Any], pictures: Pictures, title: str) -> str:
    """Return the page of a run's figures, each of them there or None, and its pictures."""
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
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<title>{escape(title)}: {escape(headline)}</title><style>{CSS}</style></head>'
        f'<body><main>{body}</main></body></html>\n'
    )


def _section(title: str, body: str) -> str:
    return f'<section><h2>{title}</h2>{body}</section>'


def _missing(reason: str) -> str:
    return f'<p class="missing">{escape(reason)}</p>'


def _plot(svg: str) -> str:
    return f'<div class="scroll">{svg}</div>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose cells are HTML already, the first of each row a heading."""
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
        (f'{number(counts["frames_matched"])} / {number(counts["frames"])}', 'frames matched'),
        (number(path['ate_percent'], 2, ' %'), 'trajectory error'),
        (number(learning['promotions']), 'versions promoted'),
        (number(figures['throughput_hz'], unit=' Hz'), 'throughput'),
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
        look = {1: 'better', -1: 'worse'}.get(sign(before[key], after[key]), '')
        values = (number(value, unit=' %') for value in (before[key], after[key]))
        rows.append(
            (label, *values, f'<span class="{look}">{change(before[key], after[key])}</span>')
        )
    note = (
        'MMA: share of all queries visible in both images that are matched within so many '
        'pixels, mean over pairs. '
        'AUC: area under the recall of relative poses up to so many degrees.'
    )
    if all(section[key] is None for section in (before, after) for key in MMA):
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
    end = 'its true place' if rows[0][1].visible.any() else "the query's pixel in the reference"
    note = (
        f'Left the reference with its query points, right the target {seconds:.2f} s later. '
        f'A line leads from each match to {end}.'
    )
    return ''.join(parts) + f'<p class="note">{note}</p>'


def _trajectory(figures: Mapping[str, Any], trajectory: TrajectoryAccuracy | None) -> str:
    error = figures['trajectory']
    if error['ate_m'] is None:
        return _missing(NO_POSES if figures['input']['true_poses'] else NO_TRUTH)
    share = number(error['ate_percent'], 2)
    text = (
        f'RMSE {metres(error["ate_m"])} over a path of {metres(error["path_m"])}, {share} % of '
        'it, after Sim(3) alignment.'
    )
    picture = ''
    if trajectory is not None and len(trajectory.estimate):
        picture = _plot(trajectory_svg(trajectory))
    return f'<p>{text}</p>{picture}'


def _learning(figures: Mapping[str, Any], pictures: Pictures) -> str:
    if not figures['steps'] and not pictures.loss and not pictures.events:
        return _missing(NO_LEARNING)
    picture = ''
    if pictures.loss or pictures.events:
        picture = _plot(learning_svg(pictures.loss, pictures.events))
    totals = _table((), [
        ('Gradient steps', number(figures['steps'])),
        ('Windows learned from', number(figures['windows'])),
        ('Versions promoted', number(figures['promotions'])),
        ('Rollbacks', number(figures['rollbacks'])),
        ('Time, s', number(figures['seconds'])),
        ('Version at the end', number(figures['model_version'])),
    ])
    return picture + totals + _verdicts([event for event in pictures.events if event.reason])


def _verdicts(events: Sequence[Event]) -> str:
    if not events:
        return ''
    rows = [
        (str(event.step), escape(event.kind), _version(event.version), escape(event.reason))
        for event in events
    ]
    table = _table(('step', 'verdict', 'version', 'reason'), rows)
    summary = f'<summary>{len(rows)} verdicts and why</summary>'
    return f'<details>{summary}<div class="verdicts">{table}</div></details>'


def _version(version: int | None) -> str:
    return '–' if version is None else f'v{version}'


def _run(figures: Mapping[str, Any]) -> str:
    latency, counts = figures['latency_ms'], figures['input']
    times = [
        ('Matcher, per image', number(latency['matcher_p50']), number(latency['matcher_p95'])),
        ('Bundle, per image', number(latency['bundle_p50']), number(latency['bundle_p95'])),
        ('Learner, per step', number(latency['learner_step_p50']), '–'),
    ]
    totals = [
        ('Frames', number(counts['frames'])),
        ('Frames matched', number(counts['frames_matched'])),
        ('Frames dropped', number(counts['dropped'])),
        ('Keyframes', number(counts['keyframes'])),
        ('Throughput, Hz', number(figures['throughput_hz'])),
        ('Peak memory, MB', number(figures['peak_memory_mb'])),
    ]
    columns = _table(('ms', 'median', '95 %'), times) + _table((), totals)
    return f'<div class="columns">{columns}</div>'


def _origin(figures: Mapping[str, Any]) -> str:
    command = f'<pre>{escape(figures["command"])}</pre>' if figures['command'] else ''
    rows = [(escape(name), escape(str(version))) for name, version in figures['versions'].items()]
    return command + (_table((), rows) if rows else '') or _missing('not available: not recorded')


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
    return f'{number(counts["frames_matched"])} of {number(counts["frames"])} frames matched'


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
