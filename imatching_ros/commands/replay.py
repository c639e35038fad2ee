"""``imatching replay``: a recording, played through the nodes and measured."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import compare, open_given, report, run_folder, true_poses, warn, warn_of
from ..data.recording import Recording
from ..evaluation.pictures import Event, EVIDENCE, Pictures
from ..evaluation.trajectory import trajectory_accuracy
from ..matching import weights
from ..replay import replay, ReplayResult


def run(options: argparse.Namespace) -> None:
    """Play a recording through the three nodes without loss and write a run folder."""
    recording = open_given(options.bag, options)
    play_and_report(recording, run_folder(options.out, 'replay'), options, str(options.bag))


def play_and_report(
    recording: Recording, run_dir: Path, options: argparse.Namespace, title: str
) -> None:
    """Play a recording, measure the weights before and after, and write the report."""
    result = replay(
        recording,
        run_dir,
        learn=options.learn,
        train_fraction=options.train_fraction,
        learn_seconds=options.learn_seconds,
        weights=options.weights,
    )
    for note in result.notes:
        warn(note)
    trajectory = trajectory_accuracy(
        result.keyframe_stamps, result.keyframe_poses, recording.ground_truth
    )
    before, after = (
        weights.load(path)[0] for path in (result.weights_before, result.weights_after)
    )
    compared = compare(recording, result.train_frames, before, after)
    warn_of(recording)
    figures = _figures(result) | {
        'trajectory': trajectory,
        'matching': {'before': compared.before, 'after': compared.after},
    }
    figures['input']['true_poses'] = true_poses(recording)
    steps = [event.values for event in result.learning if event.kind == 'step']
    verdicts = [event.values for event in result.learning if event.kind == 'verdict']
    pictures = Pictures(
        *compared.typical,
        trajectory=trajectory,
        loss=[(int(values['step']), float(values['loss'])) for values in steps],
        events=[_event(values) for values in verdicts],
    )
    report(run_dir, figures, pictures, title)


def _figures(result: ReplayResult) -> dict[str, Any]:
    """Return what the nodes said of their work, as report.json has it."""

    def count(node: str, key: str) -> int | None:
        value = result.figure(node, key)
        return None if value is None else int(value)

    learned = any(event.kind == 'step' for event in result.learning)
    return {
        'input': {
            'frames': result.sent,
            'frames_matched': result.matched,
            'keyframes': count('bundle', 'keyframes'),
            'keyframes_posed': len(result.keyframe_stamps),
            'dropped': result.dropped,
        },
        'learning': {
            'steps': count('learner', 'steps'),
            'windows': count('learner', 'windows'),
            'promotions': count('learner', 'promotions'),
            'rollbacks': count('learner', 'rollbacks'),
            'seconds': result.learning_seconds if learned else None,
            'model_version': int(result.frame_models.max()),
        },
        'latency_ms': {
            'matcher_p50': result.figure('matcher', 'latency_p50_ms'),
            'matcher_p95': result.figure('matcher', 'latency_p95_ms'),
            'bundle_p50': result.figure('bundle', 'latency_p50_ms'),
            'bundle_p95': result.figure('bundle', 'latency_p95_ms'),
            'learner_step_p50': result.figure('learner', 'step_p50_ms'),
        },
        'throughput_hz': result.throughput_hz,
        'peak_memory_mb': result.peak_memory_mb,
    }


def _event(values: dict[str, str]) -> Event:
    return Event.of_verdict(
        step=int(values['step']),
        promoted=values['promoted'] == 'true',
        rolled_back=values['rolled_back'] == 'true',
        version=int(values['version']),
        reason=values['reason'],
        figures={name: float(values[name]) for name in EVIDENCE if name in values},
    )
