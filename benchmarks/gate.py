"""
Measure the gate: what it says of candidates whose true worth is known.

    python benchmarks/gate.py [--scenes NAME…] [--seeds N…] [--lights L…] [--json PATH]
                              [--cache DIR] [--against OTHER.json] [--plot PATH]

For each scene and seed it makes candidates from the shipped weights: some that learned for a few
steps or many, at the learner's rate or at three and ten times of it, from labels with 3 px of
noise, under a focal length that is 15 % off; weights beyond, or on the way to, what was learned;
and weights with noise. Besides, at rendered places, candidates that learned through a fault (still
or turning camera, covered or blank lens, a crowd, flickering light). The gate judges each once, as
at its first verdict, by the held-out images of that recording. What it is worth is measured on
images that neither saw, with exact depth and poses, and so is what was promoted of it, where that
is a part.

Rows: scene, seed, candidate, true_gain (points of mma_1px; null without depth), auc_gain (points
of auc_5), promoted, share (of the way to the candidate that was judged), taken_gain (true_gain of
what was promoted), gain and gain_error (as the gate saw them), evidence (images), seconds
(processor time of the verdict), reason. Candidates are kept in the cache, rows in the JSON file,
and not made or judged again. `--against` compares the words with those of another run, say of
another processor.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
import copy
from dataclasses import dataclass, replace
import json
from pathlib import Path
import sys
import tempfile
import time

from imatching_ros.data.recording import Recording
from imatching_ros.data.synthetic import Sensor
from imatching_ros.evaluation.matching import evaluate_matching, evaluation_pairs
from imatching_ros.evaluation.pictures import BLUE, GREY, RED
from imatching_ros.geometry.camera import Camera
from imatching_ros.learning import objectives
from imatching_ros.learning.candidate import interpolated
from imatching_ros.learning.learner import Learner
from imatching_ros.learning.options import LearnerOptions
from imatching_ros.learning.tune import Showing
from imatching_ros.learning.verdict import consider
from imatching_ros.matching import weights
from imatching_ros.matching.tracker import TrackerOptions
from matplotlib.figure import Figure
import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from scenes import DIM, FAULTS, GAP, live, opened, Part, Place, REAL, RENDERED, Rows, TRAINED
import torch

NOISE_PX = 3.0  # of wrong labels
#: What learns: options of the learner, and the steps after which a candidate is taken.
RUNS = {
    'learn': ({}, (3, 10, 25, 60)),
    'rate3': ({'rate': 3 * LearnerOptions.rate}, (20, 60)),
    'rate10': ({'rate': 10 * LearnerOptions.rate}, (5, 15, 30)),
    'noisy': ({'objective': 'noisy'}, (20, 60)),
    'focal': ({}, (20, 60)),
}
MIXES = (0.3, 0.6, 1.5, 2.5)  # shares of the way to what learned longest
NOISES = (0.02, 0.05, 0.1)  # relative, of each weight
LIGHTS = {'dim': DIM, 'day': Sensor()}
GAIN, LOSS = 3.0, -0.5  # points of mma_1px: what must be promoted, what must not

console = Console(width=130)


@dataclass(frozen=True)
class NoisyObjective(objectives.BundleObjective):
    """The bundle's objective on landmarks that are not where they should be."""

    @classmethod
    def of(cls, *arguments) -> NoisyObjective | None:
        made = super().of(*arguments)
        if made is None:
            return None
        posed = made.survivors.problem
        g = torch.Generator().manual_seed(int(made.lesson.window.stamps[0]) % 2**31)
        distance = (posed.points - posed.T_world_camera[:, :3].mean(0)).norm(dim=-1, keepdim=True)
        noise = torch.randn(posed.points.shape, generator=g, dtype=torch.float64)
        moved = posed.points + noise * distance * NOISE_PX / posed.focal.mean()
        problem = replace(posed, points=moved)
        return replace(made, survivors=replace(made.survivors, problem=problem))


objectives.OBJECTIVES['noisy'] = NoisyObjective


class Bank:
    """The candidates of one scene, kept in a folder with what they are truly worth."""

    def __init__(self, folder: Path, recording: Recording, pairs: list) -> None:
        self.folder, self.recording, self.pairs = folder, recording, pairs
        self.shipped, self.info = weights.load(weights.default_path())
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / 'truth.json'
        self._truth = json.loads(self._file.read_text()) if self._file.is_file() else {}

    def __contains__(self, name: str) -> bool:
        return (self.folder / f'{name}.safetensors').is_file()

    def add(self, name: str, matcher: torch.nn.Module) -> None:
        tensors = {key: value.contiguous() for key, value in matcher.state_dict().items()}
        save_file(tensors, self.folder / f'{name}.safetensors')

    def __getitem__(self, name: str) -> torch.nn.Module:
        matcher = copy.deepcopy(self.shipped)
        matcher.load_state_dict(load_file(self.folder / f'{name}.safetensors'))
        return matcher

    def worth(self, name: str, matcher: torch.nn.Module) -> dict:
        """Return the accuracy of a matcher on images that nobody saw."""
        if name not in self._truth:
            accuracy = evaluate_matching(matcher, self.recording, self.pairs)
            self._truth[name] = {'mma_1px': accuracy.mma_1px, 'auc_5': accuracy.auc_5}
            self._file.write_text(json.dumps(self._truth, indent=1) + '\n')
        return self._truth[name]

    def learner(self, camera: Camera, **options) -> Learner:
        return Learner(self.shipped, self.info, camera, LearnerOptions(**options))


def seen(bank: Bank, count: int, camera: Camera, seed: int) -> Learner:
    """Return a learner that saw the first images of a recording, and judges by some of them."""
    showing = Showing([(camera, Part(bank.recording, count))], TrackerOptions(), 1)
    return showing.first(bank.shipped, bank.info, LearnerOptions(seed=seed))


def of_a_recording(bank: Bank, seed: int) -> Iterator[tuple[str, Learner]]:
    """Yield the names of a recording's candidates, each with a learner that judges it."""
    count = round(TRAINED * len(bank.recording))
    camera = bank.recording.camera
    learner = seen(bank, count, camera, seed)
    wrong = seen(bank, count, replace(camera, fx=1.15 * camera.fx, fy=1.15 * camera.fy), seed)
    for run, (options, taken) in RUNS.items():
        judge = wrong if run == 'focal' else learner
        if any(f'{run}{steps}' not in bank for steps in taken):
            pupil = bank.learner(judge.camera, seed=seed, **options)
            pupil.inputs = copy.deepcopy(judge.inputs)
            for _ in range(2 * max(taken)):
                if pupil.step() and pupil.step_count in taken:
                    bank.add(f'{run}{pupil.step_count}', pupil.candidate.average.module)
                if pupil.step_count == max(taken):
                    break
        yield from ((f'{run}{steps}', judge) for steps in taken if f'{run}{steps}' in bank)
    longest = f'learn{max(RUNS["learn"][1])}'
    for share in MIXES if longest in bank else ():
        bank.add(f'mix{share}', interpolated(bank.shipped, bank[longest], share))
        yield f'mix{share}', learner
    g = torch.Generator().manual_seed(seed)
    for noise in NOISES:
        shaken = copy.deepcopy(bank.shipped)
        for parameter in shaken.state_dict().values():
            parameter *= 1 + noise * torch.randn(parameter.shape, generator=g)
        bank.add(f'noise{noise}', shaken)
        yield f'noise{noise}', learner


def of_a_place(bank: Bank, place: Place, steps: int) -> Iterator[tuple[str, Learner]]:
    """Yield the names of the candidates that learned through a fault, each with its learner."""
    for fault, images in FAULTS.items():
        if fault in ('focal', 'rate'):
            continue
        never = 10**9  # the verdict is asked for here
        learner = bank.learner(place.camera, verdict_every=never)
        live(learner, images(place), 0 if fault in bank else steps)
        if fault not in bank and learner.step_count:
            bank.add(fault, learner.candidate.average.module)
        if fault in bank:
            yield fault, learner


def judged(bank: Bank, scene: str, seed: int, name: str, learner: Learner, known: dict) -> dict:
    """Return what the gate says of a candidate, beside what it is worth."""
    candidate = bank[name]
    before, after = bank.worth('base', bank.shipped), bank.worth(name, candidate)
    started = time.process_time()
    said, taken = consider(
        candidate, bank.shipped, list(learner.inputs.held_out), learner.bundle, known
    )
    seconds = time.process_time() - started

    def gain(worth: dict, figure: str) -> float | None:
        measured = None not in (worth[figure], before[figure])
        return worth[figure] - before[figure] if measured else None

    true = gain(after, 'mma_1px')
    part = said.mark > 0 and said.share < 1
    taken = gain(bank.worth(f'{name}, {said.share}', taken), 'mma_1px') if part else true
    return {
        'scene': scene, 'seed': seed, 'candidate': name, 'true_gain': true,
        'auc_gain': gain(after, 'auc_5'), 'promoted': said.mark > 0, 'share': said.share,
        'taken_gain': taken if said.mark > 0 else None, 'gain': said.figures['gain'],
        'gain_error': said.figures['gain_error'], 'evidence': int(said.figures['images']),
        'seconds': seconds, 'reason': said.reason,
    }


def measure(options: argparse.Namespace, rows: Rows, cache: Path) -> None:
    for scene in options.scenes:
        for seed in options.seeds if scene in RENDERED else options.seeds[:1]:
            recording = opened(scene, seed, options.frames, cache, console)
            if recording is None:
                continue
            first = round(TRAINED * len(recording)) + GAP
            pairs = evaluation_pairs(recording, first, len(recording) - 1)
            bank = Bank(cache / 'candidates' / f'{scene}-{seed}', recording, pairs)
            take(bank, scene, seed, of_a_recording(bank, seed), rows)
    for light in options.lights:
        for seed in options.seeds:
            place = Place(cache / f'{light}-{seed}', LIGHTS[light], seed)
            bank = Bank(cache / 'candidates' / f'{light}-{seed}', place.recording, place.pairs)
            take(bank, f'faults, {light}', seed, of_a_place(bank, place, options.steps), rows)


def take(
    bank: Bank, scene: str, seed: int, candidates: Iterator[tuple[str, Learner]], rows: Rows
) -> None:
    known: dict[int, dict] = {}
    for name, learner in candidates:
        if rows.has(scene, seed, name):
            continue
        if not len(learner.inputs.held_out):
            console.print(f'{scene} {seed} {name}: no window to judge by')
            continue
        rows.add(judged(bank, scene, seed, name, learner, known.setdefault(id(learner), {})))


def summary(rows: list[dict]) -> None:
    """Print the gate's power and its errors, scene by scene and together."""
    table = Table(title='What the gate said of candidates whose worth is known')
    for name in (
        'scene', 'candidates', f'gain ≥ {GAIN:g}', 'promoted', f'loss ≥ {-LOSS:g}', 'promoted',
        'worst promoted', 'images', 'CPU s',
    ):
        table.add_column(name, justify='left' if name == 'scene' else 'right')
    known = [row for row in rows if row['true_gain'] is not None]
    for scene in (*dict.fromkeys(row['scene'] for row in known), None):
        ours = [row for row in known if scene in (row['scene'], None)]
        good = [row for row in ours if row['true_gain'] >= GAIN]
        bad = [row for row in ours if row['true_gain'] <= LOSS]
        promoted = [row['taken_gain'] for row in ours if row['promoted']]
        table.add_row(
            scene or 'all', str(len(ours)), str(len(good)), _share(good), str(len(bad)),
            _share(bad), f'{min(promoted):+.1f}' if promoted else '–',
            f'{np.mean([row["evidence"] for row in ours]):.0f}',
            f'{np.mean([row["seconds"] for row in ours]):.1f}',
            end_section=scene is not None,
        )
    console.print(table)
    gains = np.array([(row['true_gain'], row['gain']) for row in known]).T
    console.print(
        f'{len(rows)} candidates, {len(known)} of known worth; correlation of the gain that the '
        f'gate saw with the true one {np.corrcoef(gains)[0, 1]:.3f}'
    )
    for row in rows:
        if row['promoted'] and row['taken_gain'] is not None and row['taken_gain'] <= LOSS:
            console.print(f'[red]promoted: {row["scene"]} {row["seed"]} {row["candidate"]}, '
                          f'{row["taken_gain"]:+.2f} points[/]')


def _share(rows: list[dict]) -> str:
    return f'{100 * np.mean([row["promoted"] for row in rows]):.1f} %' if rows else '–'


def agreement(rows: list[dict], others: list[dict]) -> None:
    """Print how often another run said the same of the same candidate."""
    def name(row: dict) -> tuple:
        return row['scene'], row['seed'], row['candidate']

    theirs = {name(row): row for row in others}
    pairs = [(row, theirs[name(row)]) for row in rows if name(row) in theirs]
    same = [one['promoted'] == other['promoted'] for one, other in pairs]
    console.print(f'the same word on {sum(same)} of {len(pairs)} candidates '
                  f'({100 * np.mean(same):.1f} %)')


def plot(rows: list[dict], path: Path) -> None:
    """Draw what the gate saw over what is true, and the share that it promotes."""
    known = [row for row in rows if row['true_gain'] is not None]
    true = np.array([row['true_gain'] for row in known])
    promoted = np.array([row['promoted'] for row in known])
    figure = Figure(figsize=(9.6, 4.0), layout='constrained')
    left, right = figure.subplots(1, 2)
    for said, colour, label in ((True, BLUE, 'promoted'), (False, GREY, 'not promoted')):
        ours = [row for row in known if row['promoted'] == said]
        left.errorbar(
            [row['true_gain'] for row in ours], [row['gain'] for row in ours],
            yerr=[2 * row['gain_error'] for row in ours], fmt='o', markersize=3, linewidth=0.6,
            color=colour, label=label, alpha=0.7,
        )
    left.axhline(0, color=GREY, linewidth=0.8)
    left.axvline(0, color=GREY, linewidth=0.8)
    left.set(
        xlabel='true gain, points of mma_1px', ylabel='gain that the gate saw, points ± 2 errors'
    )
    left.legend(frameon=False)
    edges = np.array([-np.inf, -6, -2, -0.5, 0.5, 1, 2, 3, 6, 10, np.inf])
    labels, shares, colours = [], [], []
    for low, high in zip(edges, edges[1:], strict=False):
        inside = (true > low) & (true <= high)
        if inside.any():
            labels.append(f'{low:g}…{high:g}\n({inside.sum()})')
            shares.append(100 * promoted[inside].mean())
            colours.append(RED if high <= LOSS else BLUE)
    right.bar(labels, shares, color=colours)
    right.tick_params(axis='x', labelsize=7, rotation=45)
    right.set(
        xlabel='true gain, points of mma_1px (candidates)', ylabel='promoted, %', ylim=(0, 100)
    )
    for axes in (left, right):
        axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument(
        '--scenes', nargs='*', default=(*RENDERED, *REAL), choices=(*RENDERED, *REAL),
        help='default: all',
    )
    parser.add_argument('--lights', nargs='*', default=tuple(LIGHTS), choices=tuple(LIGHTS),
                        help='of the faults (default: all)')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], help='default: 0 1 2')
    parser.add_argument('--steps', type=int, default=60, help='through a fault (default: 60)')
    parser.add_argument('--frames', type=int, default=300, help='rendered (default: 300)')
    parser.add_argument('--cache', type=Path, help='folder that keeps scenes and candidates')
    parser.add_argument('--threads', type=int, default=1, help='of torch (default: 1)')
    parser.add_argument('--json', type=Path, help='write all rows to this file')
    parser.add_argument('--against', type=Path, help='rows of another run to compare with')
    parser.add_argument('--plot', type=Path, help='draw the curve to this file')
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = Rows(options.json, ('scene', 'seed', 'candidate'), console)
    with tempfile.TemporaryDirectory() as folder:
        measure(options, rows, options.cache or Path(folder))
    if not rows:
        return
    summary(rows)
    if options.against:
        agreement(rows, json.loads(options.against.read_text()))
    if options.plot:
        plot(rows, options.plot)


if __name__ == '__main__':
    sys.exit(main())
