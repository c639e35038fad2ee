"""``imatching demo``: a rendered recording, played through the nodes and measured."""

from __future__ import annotations

import argparse
from dataclasses import replace

from rich.progress import Progress

from .common import console, run_folder
from .replay import play_and_report
from ..data.recording import open_recording
from ..data.synthetic import render_recording, Sensor

FRAMES = 300


def run(options: argparse.Namespace) -> None:
    """Render a recording, play it through the nodes, and measure before and after."""
    run_dir = run_folder(options.out, 'demo')
    with Progress(console=console) as progress:
        task = progress.add_task('Rendering', total=FRAMES)
        folder = render_recording(
            run_dir / 'recording',
            seed=options.seed,
            frames=FRAMES,
            sensor=replace(Sensor.low_light(0.5), fixed_pattern=12.0),
            depth_every=5,
            progress=lambda done, total: progress.update(task, completed=done),
        )
    title = 'a room rendered with a low-light camera'
    play_and_report(open_recording(folder), run_dir, options, title)
