"""``imatching evaluate``: weights side by side, on a recording with ground truth."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table
from rich.text import Text

from . import Nothing
from .common import console, open_given, warn_of
from .. import kernels
from ..data.recording import Recording
from ..evaluation.figures import ACCURACY, number
from ..evaluation.matching import evaluate_matching, evaluation_pairs
from ..evaluation.measure import odometry_accuracy
from ..matching import weights


def run(options: argparse.Namespace) -> None:
    """Measure matching accuracy, pose accuracy and trajectory error of weights, side by side."""
    recording = open_given(options.data, options)
    first = round(len(recording) * options.first)
    pairs = evaluation_pairs(recording, first, len(recording) - 1, per_step=options.pairs)
    if not pairs:
        raise Nothing(_why_no_pairs(recording, first))
    kernels.show()
    title = f'{options.data}, images {first} to {len(recording) - 1}, {len(pairs)} pairs'
    table = Table('', title=Text(title))
    columns = []
    for path in options.weights or [weights.default_path()]:
        matcher, info = weights.load(path)
        accuracy = evaluate_matching(matcher, recording, pairs)
        ate = odometry_accuracy(recording, matcher, info.version).ate_percent
        columns.append([*(getattr(accuracy, key) for key in ACCURACY), ate])
        header = Text(f'{Path(path).stem}\nversion {info.version}')
        table.add_column(header, justify='right')
    for label, *row in zip((*ACCURACY.values(), 'ATE, % of path'), *columns, strict=True):
        table.add_row(label, *(number(value, 2) for value in row))
    console.print(table)
    warn_of(recording)


def _why_no_pairs(recording: Recording, first: int) -> str:
    if recording.ground_truth is None:
        return (
            f'{recording.bag} has no ground truth, so there is nothing to measure against; '
            'put groundtruth.txt (TUM) beside it, or record a PoseStamped topic with '
            '"ground_truth" in its name'
        )
    return (
        f'no two images of {recording.bag}, from number {first} on and 5, 10 or 20 apart, have '
        'a true pose within a millisecond of their stamps; choose another --first, or check the '
        "ground truth's stamps"
    )
