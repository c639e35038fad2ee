"""
Matching accuracy and time beside XFeat, SIFT, ORB and KLT.

The same pairs, the same truth, the same pose solver.

    python benchmarks/matching.py [--quick] [--weights FILE] [--data NAME ...] [--json PATH]
    python benchmarks/matching.py --pictures FOLDER
    python benchmarks/matching.py --speed [--data NAME ...] [--threads N]

Data: three scenes that the program renders here (of seeds that no training uses) and, where they
stand beside the project, the recordings redkitchen and kitti_street. Every method may propose up
to 1000 points per image and keeps what its usual check keeps: ours what the tracker keeps, KLT
what comes back within a pixel, SIFT what is mutual and passes a ratio test, ORB and XFeat mutual
nearest neighbours. ``mma`` is the share of the *kept* matches of visible points that lie within 1,
2, 5 px of the truth, averaged over pairs, so who keeps little has it easier: ``matches`` is how
many were kept per pair, ``right`` how many of them lie within 2 px. ``auc`` is of the relative
pose (PoseLib for all). ``ms`` is what one new image costs in video, median and 95th percentile:
describing it (points included, for all) and matching it with one cached image; ``peak_mb`` the
memory of a process that does nothing else. redkitchen's depth and poses are themselves some px
off: there mma says little, auc says more. A summary says on which figures ours is behind whom.

``--pictures`` draws ten hard pairs instead: what ours, XFeat and SIFT keep of each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from pathlib import Path
import statistics
import tempfile
import time
from typing import Any

import cv2
from hard_pairs import HARD, pictures
from imatching_ros import files
from imatching_ros.data.recording import open_recording, Recording
from imatching_ros.data.synthetic import render_recording, Sensor
from imatching_ros.evaluation.matching import (
    evaluation_pairs,
    Pair,
    pose_auc,
    pose_errors,
    true_matches,
)
from imatching_ros.matching import weights
from imatching_ros.matching.tracker import keypoints
from imatching_ros.nodes.diagnostics import peak_memory_mb
import numpy as np
from peers import imatching, Method, methods, POINTS, SHARED
from rich.console import Console
from rich.progress import track
from rich.table import Table
import torch

STEPS = (1, 5, 10, 20)
RENDERED = {
    'room': {'seed': 1001, 'path': 'handheld'},
    'street': {'seed': 1002, 'path': 'driving'},
    'dark_room': {'seed': 1003, 'path': 'handheld', 'sensor': Sensor.low_light(0.5)},
}
FIGURES = ('mma_1px', 'mma_2px', 'auc_5', 'auc_10', 'auc_20')  # to be ahead in, and in `ms`


def measure(
    recording: Recording, pairs: list[Pair], images: dict[int, np.ndarray], method: Method
) -> dict[str, Any]:
    """Measure one method on the pairs of one step."""
    describe, match = method
    described, mma, errors, counts, right = {}, [], [], [], []
    seconds: list[tuple[float, float]] = []
    for pair in pairs:
        for stamp in (pair.reference, pair.target):
            if stamp not in described:
                start = time.perf_counter()
                described[stamp] = describe(images[stamp]), time.perf_counter() - start
        start = time.perf_counter()
        uv_i, uv_j = match(described[pair.reference][0], described[pair.target][0])
        seconds.append((described[pair.target][1], time.perf_counter() - start))
        counts.append(len(uv_i))
        uv_i, uv_j = torch.from_numpy(uv_i).float(), torch.from_numpy(uv_j).float()
        truth, visible = true_matches(
            recording.camera, pair, uv_i, recording.depth(pair.reference),
            recording.depth(pair.target),
        )
        if recording.depth(pair.reference) is not None:
            off = (uv_j - truth).norm(dim=-1)[visible].numpy()
            right.append(int((off <= 2).sum()))
            # Where nothing was kept of what can be seen, none of it is right
            mma.append([100 * (off <= t).mean() if len(off) else 0.0 for t in (1, 2, 5)])
        if pair.baseline:
            errors.append(max(pose_errors(recording.camera, pair, uv_i, uv_j)))
    means = np.mean(mma, axis=0).tolist() if mma else [None] * 3
    areas = [pose_auc(errors, degrees) if errors else None for degrees in (5, 10, 20)]
    names = ('mma_1px', 'mma_2px', 'mma_5px', 'auc_5', 'auc_10', 'auc_20')
    ms = 1e3 * np.array(seconds)
    return {
        **dict(zip(names, (*means, *areas), strict=True)),
        'matches': statistics.mean(counts), 'right': statistics.mean(right) if right else None,
        'ms': float(np.median(ms.sum(1))), 'ms_p95': float(np.percentile(ms.sum(1), 95)),
        'ms_describe': float(np.median(ms[:, 0])), 'ms_match': float(np.median(ms[:, 1])),
        'pairs': len(pairs),
    }


def peak_mb(file: Path, threads: int, images: list[np.ndarray]) -> float:
    """Return the memory of a process that matches two images with ours and nothing else."""
    context = multiprocessing.get_context('spawn')
    with context.Pool(1) as pool:
        return pool.apply(_alone, (file, threads, images))


def _alone(file: Path, threads: int, images: list[np.ndarray]) -> float:
    torch.set_num_threads(threads)
    describe, match = imatching(file)
    with torch.inference_mode():
        for _ in range(3):
            match(*map(describe, images))
    return peak_memory_mb()


def speed(file: Path, recording: Recording) -> dict[str, tuple[float, float]]:
    """Return median and 95th percentile, ms, of what a node does with each image of a video."""
    matcher, _ = weights.load(file)
    times: dict[str, list[float]] = {'encode': [], 'match 1000': []}
    keyframe, queries = None, None
    for index, (_, image) in enumerate(recording):
        start = time.perf_counter()
        features = matcher.encode(torch.tensor(image)[None, None].float() / 255)
        times['encode'].append(1e3 * (time.perf_counter() - start))
        if keyframe is not None:
            start = time.perf_counter()
            matcher.match(keyframe, features, queries, queries)
            times['match 1000'].append(1e3 * (time.perf_counter() - start))
        if index % 10 == 0:
            keyframe, queries = features, keypoints(matcher, image, features, POINTS)[None]
    return {name: tuple(np.percentile(ms[5:], (50, 95))) for name, ms in times.items()}


def recordings(names: list[str], frames: int, folder: Path) -> dict[str, Recording]:
    """Those of the wanted names that are at hand; the rendered ones are made in ``folder``."""
    found = {}
    for name in names:
        if name in RENDERED:

            def progress(done, of, name=name):
                if done == of:
                    print(f'rendered {name}: {of} frames')

            found[name] = open_recording(
                render_recording(
                    folder / name, frames=frames, depth_every=1, progress=progress,
                    **RENDERED[name],
                )
            )
        elif (SHARED / 'recordings' / name).is_dir():
            found[name] = open_recording(SHARED / 'recordings' / name)
        else:
            print(f'{name} is left out: it is not at {SHARED / "recordings" / name}')
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table for people."""
    table = Table(title='Matching: ours and the peers on the same pairs')
    for column in rows[0]:
        table.add_column(column, justify='left' if column in ('data', 'method') else 'right')
    for before, row in zip([None, *rows], rows, strict=False):
        if before and (before['data'], before['step']) != (row['data'], row['step']):
            table.add_section()
        table.add_row(
            *(
                '-' if v is None else f'{v:.1f}' if isinstance(v, float) else str(v)
                for v in row.values()
            )
        )
    Console(width=170).print(table)


def standing(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Return where ours stands: a row for each data set, step, peer and figure that both have.

    ``ahead`` is how much better ours is, in the figure's unit; a tie is no lead, and no lag.
    """
    ours = {(row['data'], row['step']): row for row in rows if row['method'] == 'imatching'}
    found = []
    for row in rows:
        own = ours.get((row['data'], row['step']))
        if own is None or row['method'].startswith('imatching'):
            continue
        for figure in (*FIGURES, 'ms'):
            if own[figure] is not None and row[figure] is not None:
                lead = (own[figure] - row[figure]) * (-1 if figure == 'ms' else 1)
                found.append(
                    {
                        **{key: row[key] for key in ('data', 'step', 'method')}, 'figure': figure,
                        'ahead': lead,
                    }
                )
    return found


def show_standing(rows: list[dict[str, Any]]) -> None:
    """Print whom ours is ahead of and behind: of each data set and step, then over all."""
    found = standing(rows)
    peers = list(dict.fromkeys(row['method'] for row in found))
    for data, step in dict.fromkeys((row['data'], row['step']) for row in found):
        here = [row for row in found if (row['data'], row['step']) == (data, step)]
        behind = {
            peer: [
                f'{row["figure"]} {row["ahead"]:+.1f}'
                for row in here
                if row['method'] == peer and row['ahead'] < 0
            ]
            for peer in peers
        }
        ahead = [peer for peer in peers if not behind[peer]]
        print(f'{data}, step {step}: ahead of: {", ".join(ahead) or "nobody in everything"}')
        for peer in peers:
            if behind[peer]:
                print(f'    behind {peer}: {", ".join(behind[peer])}')
    table = Table(title='Data sets and steps at which ours is not behind')
    table.add_column('')
    for peer in peers:
        table.add_column(peer, justify='right')
    for figure in (*FIGURES, 'ms'):
        mine = [row for row in found if row['figure'] == figure]
        leads = [[row['ahead'] >= 0 for row in mine if row['method'] == peer] for peer in peers]
        table.add_row(figure, *(f'{sum(lead)} of {len(lead)}' for lead in leads))
    Console(width=140).print(table)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    everything = [*RENDERED, 'redkitchen', 'kitti_street']
    parser.add_argument('--data', nargs='+', choices=everything, default=everything)
    parser.add_argument(
        '--weights', type=Path, default=weights.default_path(), help='the weights of ours'
    )
    parser.add_argument(
        '--speed', action='store_true',
        help='only time encoding, and matching 1000 points with one keyframe, over a video each',
    )
    parser.add_argument('--quick', action='store_true', help='a few pairs of each step')
    parser.add_argument('--slow', action='store_true', help='DISK + LightGlue too: 2 s per pair')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--json', type=Path, help='write all rows to this file')
    parser.add_argument(
        '--pictures', type=Path, metavar='FOLDER', help='draw hard pairs there, measure nothing'
    )
    parser.add_argument(
        '--pair', nargs='+', choices=HARD, default=[*HARD], help='of the hard ones (default: all)'
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(options.threads)
    per_step, frames = (3, 24) if options.quick else (20, 60)
    rows = []
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        if options.speed:
            for name, recording in recordings(options.data, frames, Path(folder)).items():
                for what, (half, most) in speed(options.weights, recording).items():
                    print(f'{name}: {what} {half:.1f} ms, 95 % below {most:.1f} ms')
            return
        peers = methods(options.weights, options.slow)
        if options.pictures:
            pictures(options.pictures, options.pair, peers)
            return
        for name, recording in recordings(options.data, frames, Path(folder)).items():
            memory = None
            for step in STEPS:
                pairs = evaluation_pairs(recording, 0, len(recording) - 1, (step,), per_step)
                if not pairs:
                    continue
                needed = {stamp for pair in pairs for stamp in (pair.reference, pair.target)}
                images = {stamp: image for stamp, image in recording if stamp in needed}
                two = [images[pairs[0].reference], images[pairs[0].target]]
                memory = memory or peak_mb(options.weights, options.threads, two)
                for describe, match in peers.values():  # what is set up or compiled only once
                    match(*map(describe, two))
                for method in track(peers, description=f'{name}, step {step}', transient=True):
                    figures = measure(recording, pairs, images, peers[method])
                    mine = memory if method == 'imatching' else None
                    rows.append(
                        {'data': name, 'step': step, 'method': method, **figures, 'peak_mb': mine}
                    )
    if rows:
        show(rows)
        show_standing(rows)
    if options.json:
        files.write(options.json, json.dumps(rows, indent=1) + '\n')


if __name__ == '__main__':
    main()
