"""
The files of a map: a trajectory in TUM's form, landmarks as PLY.

Each written whole or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..matching.weights import write

TRAJECTORY, LANDMARKS = 'trajectory.txt', 'landmarks.ply'


def write_map(
    folder: Path, T_world_camera: dict[int, np.ndarray], landmarks: dict[int, Sequence[float]]
) -> None:
    """
    Write trajectory.txt and landmarks.ply.

    The former from poses (7,) by stamp in ns, the latter from points (3,) by track.
    """
    lines = [
        f'{stamp // 10**9}.{stamp % 10**9:09d} '
        + ' '.join(f'{value:.9f}' for value in T_world_camera[stamp])
        for stamp in sorted(T_world_camera)
    ]
    write(
        folder / TRAJECTORY, '\n'.join(['# timestamp tx ty tz qx qy qz qw', *lines, '']).encode()
    )
    points = np.array([landmarks[track] for track in sorted(landmarks)], '<f4').reshape(-1, 3)
    head = f'ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n'
    head += ''.join(f'property float {axis}\n' for axis in 'xyz') + 'end_header\n'
    write(folder / LANDMARKS, head.encode() + points.tobytes())


def read_trajectory(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """
    Return what ``write_map`` wrote.

    Stamps (K,) int64 ns in order, T_world_camera (K, 7) float64.
    """
    rows = [
        line.split()
        for line in (folder / TRAJECTORY).read_text().splitlines()
        if not line.startswith('#')
    ]
    stamps = np.array([int(row[0].replace('.', '')) for row in rows], np.int64)
    return stamps, np.array([row[1:] for row in rows], np.float64).reshape(-1, 7)
