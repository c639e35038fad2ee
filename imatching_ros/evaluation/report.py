"""A run's report: report.json for programs, report.html to look at, tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from .figures import ACCURACY, change, complete, metres, NO_POSES, NO_TRUTH, number, sign
from .page import page
from .pictures import Pictures
from .. import files


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
    Write report.json and report.html into ``run_dir`` and return the latter's path.

    ``figures`` is a nested mapping with the keys of ``FIGURES``, ``SCALARS`` and ``matching
    {before, after}``; any may be missing. ``title`` names the run, ``command`` is what made it,
    ``versions`` those of the packages that it was made with.
    """
    figures = complete({**figures, 'command': command or None, 'versions': dict(versions or {})})
    run_dir = Path(run_dir)
    text = json.dumps(figures, indent=2, allow_nan=False, ensure_ascii=False) + '\n'
    files.write(run_dir / 'report.json', text)
    path = run_dir / 'report.html'
    files.write(path, page(figures, pictures or Pictures(), title))
    return path


def console_table(figures: Mapping[str, Any]) -> Group:
    """Return the result for a terminal of 80 columns: accuracy before and after, then the run."""
    figures = complete(figures)
    before, after = figures['matching']['before'], figures['matching']['after']
    matching = Table(
        box=box.SIMPLE_HEAD, padding=(0, 2), title='Matching accuracy, %', title_justify='left'
    )
    matching.add_column('')
    for name in ('before', 'after', 'change'):
        matching.add_column(name, justify='right')
    for key, label in ACCURACY.items():
        colour = {1: 'green', -1: 'red'}.get(sign(before[key], after[key]), 'dim')
        changed = Text(change(before[key], after[key]), style=colour)
        matching.add_row(label, number(before[key]), Text(number(after[key]), 'bold'), changed)
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
        share = number(path['ate_percent'], 2)
        error = f'{metres(path["ate_m"])} over {metres(path["path_m"])} ({share} %)'
    return [
        ('Frames matched', f'{number(frames["frames_matched"])} of {number(frames["frames"])}'),
        ('Keyframes', number(frames['keyframes'])),
        ('Frames dropped', number(frames['dropped'])),
        ('Trajectory error', error),
        ('Gradient steps', number(learning['steps'])),
        ('Learned for', number(learning['seconds'], unit=' s')),
        ('Versions promoted', number(learning['promotions'])),
        ('Rolled back', number(learning['rollbacks'])),
        ('Matcher, median', number(latency['matcher_p50'], unit=' ms')),
        ('Bundle, median', number(latency['bundle_p50'], unit=' ms')),
        ('Gradient step, median', number(latency['learner_step_p50'], unit=' ms')),
        ('Throughput', number(figures['throughput_hz'], unit=' Hz')),
    ]
