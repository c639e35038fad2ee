"""The files of a map: a trajectory in TUM's form, landmarks as PLY, each written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from imatching_ros.bundle.window import Window
from imatching_ros.matching.weights import write


class Map:
    """The latest pose of every keyframe and the latest position of every landmark, over all windows."""

    def __init__(self) -> None:
        self._poses: dict[int, np.ndarray] = {}
        self._landmarks: dict[int, np.ndarray] = {}

    def add(self, window: Window) -> None:
        """A later window overrules an earlier one."""
        self._poses.update(zip(window.stamps.tolist(), window.T_world_camera.numpy().copy(), strict=True))
        self._landmarks.update(zip(window.track.tolist(), window.points.numpy().copy(), strict=True))

    def clear(self) -> None:
        self._poses.clear()
        self._landmarks.clear()

    def trajectory(self) -> tuple[np.ndarray, np.ndarray]:
        """Keyframes: stamps (K,) int64 ns in order, T_world_camera (K, 7)."""
        stamps = np.array(sorted(self._poses), np.int64)
        return stamps, np.array([self._poses[stamp] for stamp in stamps.tolist()]).reshape(-1, 7)

    def points(self) -> np.ndarray:
        """Landmarks (L, 3) float64, world."""
        return np.array(list(self._landmarks.values())).reshape(-1, 3)

    def save(self, folder: Path) -> tuple[Path, Path]:
        """Writes trajectory.txt and landmarks.ply."""
        trajectory, landmarks = folder / "trajectory.txt", folder / "landmarks.ply"
        write_trajectory(trajectory, *self.trajectory())
        write_points(landmarks, self.points())
        return trajectory, landmarks


def write_trajectory(path: Path, stamps: np.ndarray, T_world_camera: np.ndarray) -> None:
    """TUM's form: seconds and tx ty tz qx qy qz qw on each line."""
    lines = [
        f"{stamp // 10**9}.{stamp % 10**9:09d} " + " ".join(f"{value:.9f}" for value in pose)
        for stamp, pose in zip(stamps.tolist(), T_world_camera.tolist(), strict=True)
    ]
    write(path, ("# timestamp tx ty tz qx qy qz qw\n" + "".join(line + "\n" for line in lines)).encode())


def write_points(path: Path, points: np.ndarray) -> None:
    """Binary PLY of points (L, 3)."""
    head = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n"
    head += "".join(f"property float {axis}\n" for axis in "xyz") + "end_header\n"
    write(path, head.encode() + points.astype("<f4").tobytes())
