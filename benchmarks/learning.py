"""
Measure the learner: against SGP, under faults, and for what it forgets.

    python benchmarks/learning.py [compare] [--scenes NAME…] [--methods M…] [--seeds N…]
                                  [--steps N] [--json PATH]
    python benchmarks/learning.py faults [--faults NAME…] [--light L] [--seeds N…] [--json PATH]
    python benchmarks/learning.py forgetting [--seeds N…] [--steps N] [--json PATH]

Rows that `--json` has already are kept and not measured again: what was interrupted goes on, and
what is asked for piece by piece adds up.

`compare` trains on the first part of each scene and measures the last, after a gap: `base` is the
shipped weights, `imatching` and `sgp` are the learner's two objectives from these weights on the
same frames (SGP: RANSAC as teacher, epipolar and cycle loss), `truth` is the room: the same
network trained with the exact matches of the first part (rendered scenes only; not among the
default methods). Rendered scenes are seen by a small camera in dim light with a fixed pattern,
which the shipped weights do not know; a seed is of the scene and of the training, for recordings
of the training alone. Rows: scene, method, seed, mma_1px, mma_2px, mma_5px, auc_5, auc_10, auc_20,
steps, seconds, cpu_seconds (all threads together, whatever else the machine does).

`faults` plays, after some good images, images that teach nothing true, and measures the weights in
use afterwards on other images of the same place, against exact depth and poses. `forgetting`
learns at one place, then at another, and measures at the first.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
import math
from pathlib import Path
from statistics import mean, stdev
import sys
import tempfile
import time

from imatching_ros import files
from imatching_ros.data.recording import Recording
from imatching_ros.data.synthetic import Sensor
from imatching_ros.evaluation.matching import (
    evaluate_matching,
    evaluation_pairs,
    MIN_POINTS,
    Pair,
    true_matches,
)
from imatching_ros.learning.candidate import Candidate
from imatching_ros.learning.learner import Learner
from imatching_ros.learning.options import LearnerOptions
from imatching_ros.learning.probe import robust_distance
from imatching_ros.learning.tune import tune
from imatching_ros.matching import weights
from imatching_ros.matching.detector import detect
from imatching_ros.matching.encoder import COARSE
import numpy as np
from rich.console import Console
from rich.table import Table
from scenes import (
    DIM,
    FAULTS,
    GAP,
    live,
    opened,
    Part,
    Place,
    REAL,
    RENDERED,
    Rows,
    short,
    TRAINED,
)
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'training'))
from losses import cross_entropy  # noqa: E402

METHODS = ('base', 'sgp', 'imatching')
FIGURES = ('mma_1px', 'mma_2px', 'mma_5px', 'auc_5', 'auc_10', 'auc_20')
NEAR_PX = 8.0  # of the truth: a match farther away has it outside of its fine window
COARSE_WEIGHT = 0.1  # of the truth's coarse loss

console = Console(width=130)


# Against no learning, and against learning without bundle adjustment -----------------------------


def compare(options: argparse.Namespace) -> list[dict]:
    rows = Rows(options.json, ('scene', 'method', 'seed'), console)
    with tempfile.TemporaryDirectory() as cache:
        for scene in options.scenes or (*RENDERED, *REAL):
            for seed in options.seeds:
                missing = [
                    method for method in options.methods or METHODS
                    if not rows.has(scene, method, seed)
                    # nothing of the base depends on the seed
                    and not (method == 'base' and scene in REAL and seed)
                ]
                recording = (
                    opened(scene, seed, options.frames, Path(options.cache or cache), console)
                    if missing else None
                )
                if recording is None:
                    continue
                for method in missing:
                    row = _measured(recording, scene, method, seed, options)
                    if row is not None:
                        rows.add(row)
    _summary(rows)
    return rows


def _measured(
    recording: Recording, scene: str, method: str, seed: int, options: argparse.Namespace
) -> dict | None:
    steps = options.steps
    count = round(TRAINED * len(recording))
    matcher, info = weights.load(weights.default_path())
    done, notes = 0, {}
    started, begun = time.perf_counter(), time.process_time()
    if method == 'truth':
        if recording.depth(recording.ground_truth[0][0].item()) is None:
            return None
        done = steps
        matcher = _train_with_truth(matcher, recording, count, steps, seed)
    elif method != 'base':
        try:
            learner, history = tune(
                matcher, info, [(recording.camera, Part(recording, count))], steps, epochs=1,
                options=LearnerOptions(seed=seed, objective=method),
            )
        except ValueError as error:  # no window to learn from: the weights stay
            notes = {'promotions': 0, 'stopped': str(error)}
        else:
            matcher, _ = weights.loads(learner.weights())
            if options.keep:
                kept = options.keep / f'{scene}-{method}-{seed}.safetensors'
                files.write(kept, learner.weights())
            done = learner.step_count
            notes = {'promotions': learner.promotions, 'stopped': history.stopped}
    seconds = time.perf_counter() - started if method != 'base' else 0.0
    cpu_seconds = time.process_time() - begun if method != 'base' else 0.0
    pairs = evaluation_pairs(recording, count + GAP, len(recording) - 1)
    accuracy = asdict(evaluate_matching(matcher, recording, pairs))
    figures = {key: accuracy[key] for key in FIGURES}
    return {
        'scene': scene, 'method': method, 'seed': seed, **figures, 'steps': done,
        'seconds': seconds, 'cpu_seconds': cpu_seconds, **notes,
    }


def _train_with_truth(
    matcher: torch.nn.Module, recording: Recording, count: int, steps: int, seed: int
) -> torch.nn.Module:
    """Return the same network after training with exact matches: what there is to be gained."""
    pairs = np.array(evaluation_pairs(recording, 0, count - 1, per_step=60), dtype=object)
    images = dict(Part(recording, count))
    rng, options = np.random.default_rng(seed), LearnerOptions()
    candidate = Candidate(matcher, options, torch.device('cpu'))
    for _ in range(steps):
        pair = rng.choice(pairs)
        queries, truth = _truth(recording, pair, images)
        if len(queries) < MIN_POINTS:
            continue
        i, j = (candidate.matcher.encode(_batch(images[k])) for k in (pair.reference, pair.target))
        matches = candidate.matcher.match(i, j, queries[None])
        # Farther than its window reaches a match has no gradient that leads to the truth: the fine
        # loss leaves it out, and the coarse one counts every cell of the image, not a window's
        near = (matches.uv[0].detach() - truth).norm(dim=-1) < NEAR_PX
        similarity = candidate.matcher.coarse_similarity(i, j, queries[None])
        cell = (truth[None] - (COARSE - 1) / 2) / COARSE
        loss = COARSE_WEIGHT * cross_entropy(similarity, cell, *j.coarse.shape[-2:]).mean()
        if bool(near.any()):
            loss = loss + robust_distance(matches.uv[0, near], truth[near])
        candidate.descend(loss, options.rate, options.clip)
    return candidate.average.module


def _truth(
    recording: Recording, pair: Pair, images: dict[int, np.ndarray]
) -> tuple[torch.Tensor, torch.Tensor]:
    queries = torch.from_numpy(detect(images[pair.reference], 500))
    depths = recording.depth(pair.reference), recording.depth(pair.target)
    truth, visible = true_matches(recording.camera, pair, queries, *depths)
    return queries[visible], truth[visible]


def _batch(*images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)[:, None]).float() / 255


def _summary(rows: list[dict]) -> None:
    """Print means over the seeds, their spread, and the gain over each base."""
    table = Table(title='Mean over the seeds ± standard deviation; gain over base, relative')
    for name in (
        'scene', 'method', 'mma_1px', 'mma_2px', 'auc_5', 'auc_10', 'gain mma_1px', 'gain auc_5',
        'CPU s',
    ):
        table.add_column(name, justify='left' if name in ('scene', 'method') else 'right')

    def spread(values: list[float | None], form: str = '.1f') -> str:
        values = [value for value in values if value is not None]
        if not values:
            return '–'
        return f'{mean(values):{form}}' + (f' ± {stdev(values):{form}}' if len(values) > 1 else '')

    for scene in dict.fromkeys(row['scene'] for row in rows):
        base = {
            row['seed']: row for row in rows if row['scene'] == scene and row['method'] == 'base'
        }
        for method in dict.fromkeys(row['method'] for row in rows):
            ours = [row for row in rows if (row['scene'], row['method']) == (scene, method)]

            def gain(key: str, ours=ours, base=base) -> str:
                pairs = [
                    (row[key], base.get(row['seed'], base.get(0, {})).get(key)) for row in ours
                ]
                return spread([100 * (a / b - 1) for a, b in pairs if a is not None and b])

            if ours:
                figures = [
                    spread([row[key] for row in ours])
                    for key in ('mma_1px', 'mma_2px', 'auc_5', 'auc_10')
                ]
                gains = gain('mma_1px'), gain('auc_5')
                table.add_row(
                    scene, method, *figures, *gains,
                    spread([row.get('cpu_seconds') for row in ours], '.0f'),
                )
    console.print(table)


# Faults ------------------------------------------------------------------------------------------

def faults(options: argparse.Namespace) -> list[dict]:
    rows = Rows(options.json, ('light', 'fault', 'seed'), console)
    with tempfile.TemporaryDirectory() as cache:
        for light, sensor in (('dim', DIM), ('day', Sensor())):
            if options.light not in (light, 'both'):
                continue
            for seed in options.seeds:
                missing = [n for n in options.faults or FAULTS if not rows.has(light, n, seed)]
                if not missing:
                    continue
                place = Place(Path(options.cache or cache) / f'{light}-{seed}', sensor, seed)
                matcher, info = weights.load(weights.default_path())
                before = place.mma(matcher)
                for name in missing:
                    result = _under_fault(place, name, matcher, info, options.steps, before)
                    rows.add({
                        'light': light, 'fault': name, 'seed': seed, 'before': before, **result,
                    })
    _show(rows, 'mma_1px of the weights in use, after learning through a fault')
    worst = min(row['change'] for row in rows)
    console.print(f'worst change {worst:+.2f} points; the bound is -0.5')
    return rows


def _under_fault(place: Place, name: str, matcher, info, steps: int, before: float) -> dict:
    camera = (
        replace(place.camera, fx=1.1 * place.camera.fx, fy=1.1 * place.camera.fy)
        if name == 'focal'
        else None
    )
    options = LearnerOptions(
        verdict_every=10, rate=LearnerOptions.rate * (100 if name == 'rate' else 1)
    )
    learner = live(
        Learner(matcher, info, camera or place.camera, options), FAULTS[name](place), steps
    )
    after = place.mma(weights.loads(learner.weights())[0]) if learner.version else before
    candidate = place.mma(learner.candidate.average.module) if learner.step_count else before
    verdict = learner.last_verdict.reason if learner.last_verdict else ''
    return {
        'after': after, 'change': after - before, 'candidate': candidate - before,
        'steps': learner.step_count, 'windows': learner.windows,
        'promotions': learner.promotions, 'rollbacks': learner.rollbacks, 'verdict': verdict,
    }


# Forgetting --------------------------------------------------------------------------------------


def forgetting(options: argparse.Namespace) -> list[dict]:
    rows = Rows(options.json, ('seed',), console)
    with tempfile.TemporaryDirectory() as cache:
        for seed in options.seeds:
            if rows.has(seed):
                continue
            folder = Path(options.cache or cache)
            first = Place(folder / f'dim-{seed}', DIM, seed)
            # another place, another light
            other = replace(Sensor.low_light(0.2), fixed_pattern=20.0)
            second = Place(folder / f'other-{seed}', other, seed + 20)
            matcher, info = weights.load(weights.default_path())
            learner = Learner(
                matcher, info, first.camera, LearnerOptions(verdict_every=15, seed=seed)
            )
            row = {
                'seed': seed, 'first_before': first.mma(matcher),
                'second_before': second.mma(matcher),
            }
            live(learner, first.images, options.steps)
            row['first_learned'] = first.mma(weights.loads(learner.weights())[0])
            learner.start_recording(second.camera)
            live(
                learner, [(stamp + 10**12, image) for stamp, image in second.images], options.steps
            )
            after = weights.loads(learner.weights())[0]
            row |= {'first_after': first.mma(after), 'second_after': second.mma(after)}
            gained = row['first_learned'] - row['first_before']
            row['kept'] = (
                (row['first_after'] - row['first_before']) / gained if gained > 0 else math.nan
            )
            rows.add(row)
    _show(
        rows,
        'mma_1px at two places, learned one after the other; the part of the first gain that '
        'is kept',
    )
    return rows


def _show(rows: list[dict], title: str) -> None:
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name)
    for row in rows:
        table.add_row(*(str(short(value)) for value in row.values()))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument(
        'what', nargs='?', choices=('compare', 'faults', 'forgetting'), default='compare'
    )
    parser.add_argument('--scenes', nargs='+', choices=(*RENDERED, *REAL), help='default: all')
    parser.add_argument(
        '--methods', nargs='+', choices=(*METHODS, 'truth'), help='default: base, sgp, imatching'
    )
    parser.add_argument('--faults', nargs='+', choices=tuple(FAULTS), help='default: all')
    parser.add_argument(
        '--light', choices=('dim', 'day', 'both'), default='both', help='of faults (default: both)'
    )
    parser.add_argument(
        '--seeds', type=int, nargs='+', default=[0, 1, 2], help='which (default: 0 1 2)'
    )
    parser.add_argument(
        '--steps', type=int, help='default: 90 of forgetting, else 60'
    )
    parser.add_argument(
        '--frames', type=int, default=300, help='of a rendered scene of compare (default: 300)'
    )
    parser.add_argument(
        '--cache', type=Path, help='folder that keeps rendered scenes for the next time'
    )
    parser.add_argument('--keep', type=Path, help='folder for the weights that compare tuned')
    parser.add_argument('--threads', type=int, default=2, help='of torch (default: 2)')
    parser.add_argument('--json', type=Path, help='write all rows to this file')
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.steps = options.steps or {'compare': 60, 'faults': 60, 'forgetting': 90}[options.what]
    {'compare': compare, 'faults': faults, 'forgetting': forgetting}[options.what](options)


if __name__ == '__main__':
    sys.exit(main())
