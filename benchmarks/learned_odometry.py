"""
The bundle's trajectory with the weights before learning and after, on images that did not train.

    python benchmarks/odometry.py learning [--scenes NAME…] [--seeds N…] [--steps N]
                                           [--weights DIR] [--cache DIR] [--json FILE]

The learner sees the first part of a scene (`learning.py`'s scenes and recordings), then tracker
and bundle run over the last, after a gap, with the shipped weights and with those that the gate
let through. `--weights` takes what `learning.py compare --keep DIR` tuned instead of tuning anew.
`ate_m` is the RMSE of all poses that the bundle gave online, after Sim(3) alignment, `posed` how
many percent of the images have one. The published rival of this kind (ViBA, 2026) reports 12 to
18 % less error.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
import tempfile

from imatching_ros.bundle.bundle import Bundle
from imatching_ros.data.recording import Recording
from imatching_ros.evaluation.trajectory import trajectory_accuracy
from imatching_ros.learning.options import LearnerOptions
from imatching_ros.learning.tune import TooFewWindowsError, tune
from imatching_ros.matching import weights
from imatching_ros.matching.tracker import Tracker
from imatching_ros.pipeline import track_and_solve
from rich.console import Console
from rich.table import Table
from scenes import GAP, opened, Part, REAL, RENDERED, Rows, TRAINED
import torch

console = Console(width=120)


def learned(
    scene: str, seed: int, recording: Recording, steps: int, folder: Path | None
) -> torch.nn.Module | None:
    """Return the weights that the gate let through; None where there was nothing to learn from."""
    kept = folder / f'{scene}-imatching-{seed}.safetensors' if folder else None
    if kept is not None and kept.is_file():
        return weights.load(kept)[0]
    first = Part(recording, round(TRAINED * len(recording)))
    try:
        learner, _ = tune(
            *weights.load(weights.default_path()), [(recording.camera, first)], steps, epochs=1,
            options=LearnerOptions(seed=seed),
        )
    except TooFewWindowsError:
        return None
    return weights.loads(learner.weights())[0]


def trajectory(matcher: torch.nn.Module, recording: Recording) -> dict:
    """Return the error of the last part's trajectory, and how much of it has a pose."""
    first = round(TRAINED * len(recording)) + GAP
    tracker, bundle = Tracker(matcher, 0, recording.camera), Bundle(recording.camera)
    poses, images = {}, 0
    for frame in track_and_solve(recording, tracker, bundle, first):
        images += 1
        poses |= frame.estimate.earlier
        if frame.estimate.T_world_camera is not None:
            poses[frame.stamp] = frame.estimate.T_world_camera
    poses |= bundle.trajectory  # by now known better
    stamps = sorted(poses)
    error = trajectory_accuracy(
        stamps, [poses[stamp].numpy() for stamp in stamps], recording.ground_truth
    )
    return {'ate_m': error.ate_m, 'posed': 100 * len(poses) / images}


def measure(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    rows = Rows(options.json, ('scene', 'seed'), console)
    shipped, _ = weights.load(weights.default_path())
    with tempfile.TemporaryDirectory() as folder:
        for scene in options.scenes or (*RENDERED, *REAL):
            for seed in options.seeds:
                if rows.has(scene, seed):
                    continue
                cache = options.cache or Path(folder)
                recording = opened(scene, seed, options.frames or 300, cache, console)
                if recording is None or recording.ground_truth is None:
                    continue
                tuned = learned(scene, seed, recording, options.steps, options.weights)
                before = trajectory(shipped, recording)
                after = trajectory(tuned, recording) if tuned is not None else before
                if None in (before['ate_m'], after['ate_m']):
                    console.print(f'{scene} {seed}: too few poses for a trajectory')
                    continue
                change = 100 * (after['ate_m'] / before['ate_m'] - 1)
                rows.add({
                    'scene': scene, 'seed': seed, 'before_m': before['ate_m'],
                    'after_m': after['ate_m'], 'change_percent': change,
                    'posed_before': before['posed'], 'posed_after': after['posed'],
                })
    show(rows)


def show(rows: list[dict]) -> None:
    table = Table(title='Trajectory error with the weights before and after learning')
    for name in ('scene', 'before, cm', 'after, cm', 'change, %', 'posed before, %', 'after, %'):
        table.add_column(name, justify='left' if name == 'scene' else 'right')
    scenes = list(dict.fromkeys(row['scene'] for row in rows))
    for scene in scenes:
        ours = [row for row in rows if row['scene'] == scene]
        before, after, posed, posed_after = (
            mean(row[name] for row in ours)
            for name in ('before_m', 'after_m', 'posed_before', 'posed_after')
        )
        table.add_row(
            scene, f'{100 * before:.2f}', f'{100 * after:.2f}',
            f'{100 * (after / before - 1):+.1f}', f'{posed:.1f}', f'{posed_after:.1f}',
        )
    console.print(table)
    rendered = [row['change_percent'] for row in rows if row['scene'] in RENDERED]
    if rendered:
        console.print(f'rendered scenes: {mean(rendered):+.1f} % on average')
