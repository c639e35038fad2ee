"""
Absolute trajectory error after Sim(3) alignment, by evo.

One camera alone knows neither its scale nor where, and how, the world's frame lies.
"""

from __future__ import annotations

from dataclasses import dataclass

from evo.core.geometry import GeometryException
from evo.core.metrics import APE, PoseRelation, StatisticsType
from evo.core.sync import matching_time_indices
from evo.core.trajectory import PosePath3D
import numpy as np

TOLERANCE_NS = 10_000_000  # a third of a frame at 30 Hz: never the neighbouring frame's pose


@dataclass(frozen=True)
class TrajectoryAccuracy:
    """The error of an estimated path; what cannot be had is None."""

    ate_m: float | None  #: RMSE of position after Sim(3) alignment (Umeyama 1991), metres
    path_m: float | None  #: length of the true path through the matched stamps, metres
    ate_percent: float | None  #: 100 ate_m / path_m
    poses: int  #: estimated poses that have a true one
    #: (poses, 3) aligned positions, metres; empty where alignment is impossible
    estimate: np.ndarray
    truth: np.ndarray  #: (poses, 3) true positions of the same stamps, metres


def associate(
    stamps: np.ndarray, others: np.ndarray, tolerance_ns: int
) -> tuple[np.ndarray, np.ndarray]:
    """
    Return which stamps (N,) have one among ``others`` (M,) within the tolerance, and which.

    All are int64, ns; the result is two arrays of indices of the same length.
    """
    stamps, others = np.asarray(stamps, np.int64), np.asarray(others, np.int64)
    if not len(others):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    order = np.argsort(others, kind='stable')  # evo searches what is in order
    # evo adds its offset in place: a float would not go into whole nanoseconds
    index, nearest = matching_time_indices(stamps, others[order], tolerance_ns, offset_2=0)
    return np.array(index, np.int64), order[nearest]


def trajectory_accuracy(
    stamps: np.ndarray,
    T_world_camera: np.ndarray,
    ground_truth: tuple[np.ndarray, np.ndarray] | None,
    tolerance_ns: int = TOLERANCE_NS,
) -> TrajectoryAccuracy:
    """
    Return how far an estimated path is from the true one.

    The estimate is T_world_camera (N, 7) ``tx ty tz qx qy qz qw`` at ``stamps`` (N,), int64 ns, in
    order of time; ``ground_truth`` is (stamps (M,), T_world_camera (M, 7)), or None where the
    recording has none; arrays or tensors. Without at least three poses that have a true one, on a
    path that fixes a Sim(3), the error is None.
    """
    nothing = np.empty((0, 3))
    if ground_truth is None:
        return TrajectoryAccuracy(None, None, None, 0, nothing, nothing)
    i, j = associate(stamps, ground_truth[0], tolerance_ns)
    poses = len(i)
    if poses < 2:
        return TrajectoryAccuracy(None, None, None, poses, nothing, nothing)
    estimate, truth = _path(T_world_camera, i), _path(ground_truth[1], j)
    path_m = float(truth.path_length)
    try:
        if poses < 3:
            raise GeometryException('two points do not fix a rotation')
        estimate.align(truth, correct_scale=True)
    except GeometryException:
        return TrajectoryAccuracy(None, path_m, None, poses, nothing, truth.positions_xyz)
    metric = APE(PoseRelation.translation_part)
    metric.process_data((truth, estimate))
    ate_m = float(metric.get_statistic(StatisticsType.rmse))
    percent = 100 * ate_m / path_m if path_m > 0 else None
    return TrajectoryAccuracy(
        ate_m, path_m, percent, poses, estimate.positions_xyz, truth.positions_xyz
    )


def _path(poses: np.ndarray, index: np.ndarray) -> PosePath3D:
    poses = np.asarray(poses, np.float64).reshape(-1, 7)[index]
    return PosePath3D(positions_xyz=poses[:, :3], orientations_quat_wxyz=poses[:, [6, 3, 4, 5]])
