"""
Files that several rooms write or read: trajectories in TUM's form, point clouds as PLY.

All of them are written whole or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
import contextlib
from decimal import Decimal, DecimalException
import os
from pathlib import Path

import numpy as np

TRAJECTORY, LANDMARKS = 'trajectory.txt', 'landmarks.ply'  #: the two files of a map


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """
    Yield where to write what takes the place of ``path`` when the block ends without an error.

    The folder is made. A reader, or a crash, sees the old file or the new one whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{path.name}.{os.getpid()}')
    part.unlink(missing_ok=True)  # of a process that was killed: in a container all have one id
    try:
        yield part
        with open(part, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write(path: str | Path, data: bytes | str) -> None:
    """Write a file so that a reader, or a crash, sees the old one or the new one whole."""
    with replacing(path) as part:
        part.write_bytes(data.encode() if isinstance(data, str) else data)


def write_tum(
    path: str | Path, stamps: Iterable[int], T: Iterable[Iterable[float]], of: str = ''
) -> None:
    """
    Write poses (N, 7) ``tx ty tz qx qy qz qw`` at stamps (N,), ns, as TUM's text.

    The first line names the columns and, in brackets, what the poses are ``of``.
    """
    lines = ['# timestamp tx ty tz qx qy qz qw' + (f' ({of})' if of else '')]
    for stamp, pose in zip(stamps, T, strict=True):
        seconds, ns = divmod(int(stamp), 10**9)
        values = (f'{float(value):.12g}' for value in pose)
        lines.append(' '.join([f'{seconds}.{ns:09d}', *values]))
    write(path, '\n'.join([*lines, '']))


def read_tum(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """
    Return stamps (N,) int64, ns, and poses (N, 7) float64 of a text file in TUM's form.

    evo's reader takes the stamps for floats, and so a stamp of today loses its last 200 ns; here
    none is lost. Raises ValueError, one sentence, that names the line that is not of this form.
    """
    stamps, rows = [], []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith('#'):
            continue
        try:
            stamps.append(int(Decimal(words[0]) * 10**9))
            row = [float(word) for word in words[1:]]
            if len(row) != 7:
                raise ValueError
        except (ValueError, OverflowError, DecimalException):
            raise ValueError(
                f"{path}, line {number}: 'seconds tx ty tz qx qy qz qw' is expected"
            ) from None
        rows.append(row)
    return np.array(stamps, np.int64), np.array(rows, np.float64).reshape(-1, 7)


def write_ply(path: str | Path, points: np.ndarray) -> None:
    """Write points (N, 3) as a binary PLY of float32, which any viewer of point clouds opens."""
    points = np.asarray(points, '<f4').reshape(-1, 3)
    head = ['ply', 'format binary_little_endian 1.0', f'element vertex {len(points)}']
    head += [*(f'property float {axis}' for axis in 'xyz'), 'end_header', '']
    write(path, '\n'.join(head).encode() + points.tobytes())


def write_map(
    folder: Path, T_world_camera: Mapping[int, Sequence[float]],
    landmarks: Mapping[int, Sequence[float]],
) -> None:
    """
    Write trajectory.txt and landmarks.ply into ``folder``.

    ``T_world_camera`` are poses (7,) by stamp, ns; ``landmarks`` points (3,) by track.
    """
    stamps = sorted(T_world_camera)
    write_tum(folder / TRAJECTORY, stamps, [T_world_camera[stamp] for stamp in stamps])
    points = [np.asarray(landmarks[track]) for track in sorted(landmarks)]
    write_ply(folder / LANDMARKS, np.array(points))
