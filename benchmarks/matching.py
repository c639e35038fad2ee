"""
Matching accuracy and time beside XFeat, SIFT, ORB and KLT.

The same pairs, the same truth, the same pose solver.

    python benchmarks/matching.py [--quick] [--weights FILE] [--data NAME ...] [--json PATH]

Data: three scenes that the program renders here (of seeds that no training uses) and, where they
stand beside the project, the recordings redkitchen and kitti_street. Every method may propose up
to 1000 points per image and keeps what its usual check keeps: ours and KLT what comes back within
a pixel or two, SIFT what is mutual and passes a ratio test, ORB and XFeat mutual nearest
neighbours. ``mma`` is the share of the *kept* matches of visible points that lie within 1, 2, 5 px
of the truth, averaged over pairs; ``matches`` how many were kept per pair; ``auc`` is of the
relative pose (PoseLib for all). ``ms`` is what one new image costs in video, median: describing it
and matching it with one cached image. redkitchen's depth and poses are themselves some px off:
there mma says little, auc says more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import json
import os
from pathlib import Path
import statistics
import tempfile
import time
from typing import Any

import cv2
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
from imatching_ros.matching.detector import detect
from imatching_ros.matching.tracker import round_trip, TrackerOptions
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
import torch

SHARED = Path(__file__).resolve().parent.parent.parent / 'shared'
POINTS = 1000
STEPS = (1, 5, 10, 20)
RENDERED = {
    'room': {'seed': 1001, 'path': 'handheld'},
    'street': {'seed': 1002, 'path': 'driving'},
    'dark_room': {'seed': 1003, 'path': 'handheld', 'sensor': Sensor.low_light(0.5)},
}

#: A method: describes an image (H, W) uint8, and matches two descriptions to (N, 2) px in each.
Method = tuple[Callable[[np.ndarray], Any], Callable[[Any, Any], tuple[np.ndarray, np.ndarray]]]


def imatching(file: Path) -> Method:
    """Return this package's matcher, with the tracker's round-trip check."""
    matcher, _ = weights.load(file)

    def describe(image):
        features = matcher.encode(torch.tensor(image)[None, None].float() / 255)
        return features, torch.from_numpy(detect(image, POINTS)), image.shape

    def match(reference, target):
        matches, back = round_trip(matcher, reference[0], target[0], reference[1][None])
        uv = matches.uv[0]
        height, width = target[2]
        inside = ((uv >= 0) & (uv <= uv.new_tensor([width - 1, height - 1]))).all(-1)
        kept = inside & (back[0] < TrackerOptions.round_trip_px)
        return reference[1][kept].numpy(), uv[kept].numpy()

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


def methods(file: Path) -> dict[str, Method]:
    """All that can run here."""
    found = {
        'imatching': imatching(file),
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
    return found


def measure(
    recording: Recording, pairs: list[Pair], images: dict[int, np.ndarray], method: Method
) -> dict[str, Any]:
    """One method on the pairs of one step."""
    describe, match = method
    described, mma, errors, counts, ms = {}, [], [], [], []
    for pair in pairs:
        for stamp in (pair.reference, pair.target):
            if stamp not in described:
                start = time.perf_counter()
                described[stamp] = describe(images[stamp]), time.perf_counter() - start
        start = time.perf_counter()
        uv_i, uv_j = match(described[pair.reference][0], described[pair.target][0])
        ms.append(1e3 * (time.perf_counter() - start + described[pair.target][1]))
        counts.append(len(uv_i))
        uv_i, uv_j = torch.from_numpy(uv_i).float(), torch.from_numpy(uv_j).float()
        truth, visible = true_matches(
            recording.camera, pair, uv_i, recording.depth(pair.reference),
            recording.depth(pair.target),
        )
        if visible.any():
            off = (uv_j - truth).norm(dim=-1)[visible]
            mma.append([100 * float((off <= threshold).float().mean()) for threshold in (1, 2, 5)])
        elif recording.depth(pair.reference) is not None:
            mma.append([0.0] * 3)  # nothing was kept of what can be seen
        if pair.baseline:
            errors.append(max(pose_errors(recording.camera, pair, uv_i, uv_j)))
    means = np.mean(mma, axis=0).tolist() if mma else [None] * 3
    areas = [pose_auc(errors, degrees) if errors else None for degrees in (5, 10, 20)]
    names = ('mma_1px', 'mma_2px', 'mma_5px', 'auc_5', 'auc_10', 'auc_20')
    figures = dict(zip(names, (*means, *areas), strict=True))
    return {
        **figures, 'matches': statistics.mean(counts), 'ms': statistics.median(ms),
        'pairs': len(pairs),
    }


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
    """Return the table for people."""
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
    parser.add_argument('--quick', action='store_true', help='a few pairs of each step')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--json', type=Path, help='write all rows to this file')
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(options.threads)
    per_step, frames = (3, 24) if options.quick else (20, 60)
    rows = []
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        peers = methods(options.weights)
        for name, recording in recordings(options.data, frames, Path(folder)).items():
            for step in STEPS:
                pairs = evaluation_pairs(recording, 0, len(recording) - 1, (step,), per_step)
                needed = {stamp for pair in pairs for stamp in (pair.reference, pair.target)}
                images = {stamp: image for stamp, image in recording if stamp in needed}
                for method in track(peers, description=f'{name}, step {step}', transient=True):
                    if pairs:
                        figures = measure(recording, pairs, images, peers[method])
                        rows.append({'data': name, 'step': step, 'method': method, **figures})
    if rows:
        show(rows)
    if options.json:
        partial = options.json.with_suffix('.partial')
        partial.write_text(json.dumps(rows, indent=1) + '\n')
        os.replace(partial, options.json)


if __name__ == '__main__':
    main()
