"""Pictures of what ours, XFeat and SIFT keep of ten hard pairs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
import tempfile
from typing import Any

import cv2
from imatching_ros.data.recording import open_recording, Recording
from imatching_ros.data.synthetic import render_recording, Sensor
from imatching_ros.evaluation.matching import evaluation_pairs, Pair, true_matches
from imatching_ros.geometry import lie
import numpy as np
from peers import Method, SHARED
import torch
from torch import Tensor

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
}


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
