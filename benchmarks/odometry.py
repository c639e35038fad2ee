"""
The bundle on real recordings beside COLMAP's incremental mapping.

The same keyframes, the same matches, one thread.

    python benchmarks/odometry.py [--json FILE] [--frames N] [--tracks sift|imatching] [RECORDING…]
    python benchmarks/odometry.py learning …

The second is another question, of what learning does to the trajectory: `learned_odometry.py`.
By default the recordings `redkitchen` and `kitti_street` of `../shared`. Two kinds of tracks: SIFT
(OpenCV; mutual nearest neighbours that pass the ratio test), and the package's own matcher. Every
image is matched with the past keyframes; one rule decides for both what becomes a keyframe. Three
solvers:

- `imatching`: the online bundle over every image. Later windows correct its keyframes, as long as
  they hold them.
- `imatching_batch`: all keyframes adjusted together afterwards, begun at the online result.
- `colmap` (optional: pip install pycolmap): incremental mapping of the keyframes alone, with the
  pairs of keyframes that the images were matched with, and one keypoint per track and image.
  COLMAP verifies these matches itself, which is not timed. Intrinsics held, one model; forward
  motion may begin it, from 4 degrees (COLMAP's defaults find no model in a car's drive); all other
  options are its defaults.

Seconds are processor time on one core without finding matches: for `imatching` all of
`Bundle.add`, images between keyframes too; for `imatching_batch` that and the batch; for `colmap`
its `incremental_mapping`. `keyframe_seconds` is the part of it that keyframes took, for a
comparison of the same work: COLMAP is given nothing else. `ate_m` (RMSE of positions after Sim(3)
alignment) is over the keyframes that all solvers posed, `ate_own_m` over everything that the
solver itself posed, images between keyframes too. `posed_percent` is of all images, of which
COLMAP gets keyframes only. `track_length` is the median number of keyframes that see a landmark;
`reprojection_px` the RMS over the observations that a solver kept, those of `imatching` in each of
its windows (it prunes at 3 px, COLMAP at 4 px).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
import importlib.util
from itertools import islice
import json
import os
from pathlib import Path
import sys
import tempfile
import time

for variable in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'):
    os.environ[variable] = '1'

import cv2  # noqa: E402
from imatching_ros.bundle.bundle import Bundle  # noqa: E402
from imatching_ros.bundle.observations import surviving  # noqa: E402
from imatching_ros.bundle.solve import refine  # noqa: E402
from imatching_ros.data.recording import open_recording, RecordingError  # noqa: E402
from imatching_ros.evaluation.trajectory import trajectory_accuracy  # noqa: E402
from imatching_ros.export.colmap import DATABASE, image_name, write_colmap  # noqa: E402
from imatching_ros.geometry.camera import Camera  # noqa: E402
from imatching_ros.geometry.correspondences import Correspondences  # noqa: E402
from imatching_ros.matching import weights  # noqa: E402
from imatching_ros.matching.tracker import Tracker  # noqa: E402
import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from sift_tracks import SiftTracker  # noqa: E402
import torch  # noqa: E402

RECORDINGS = Path(__file__).resolve().parents[2] / 'shared' / 'recordings'
SOLVERS = ('imatching', 'imatching_batch', 'colmap')


@dataclass
class Result:
    """What one solver made of a recording."""

    #: stamp to pose (7,), of every image it posed, in order of time
    T_world_camera: dict[int, np.ndarray]
    track_length: float  #: median number of keyframes of a landmark
    reprojection_px: float  #: RMS over the observations it kept, undistorted px
    seconds: float
    keyframe_seconds: float  #: without the images between keyframes


def online(
    messages: list[Correspondences], camera: Camera
) -> tuple[Result, Bundle, dict[int, Correspondences]]:
    """
    Return the bundle over every message.

    Also the bundle, and the messages of the keyframes by stamp.
    """
    bundle, received, keyframes = Bundle(camera), {}, {}
    poses, tracks, stamps, squared, seconds, solving = {}, [], [], [], 0.0, 0.0
    for message in messages:
        begin = time.process_time()
        estimate = bundle.add(message)
        spent = time.process_time() - begin
        seconds += spent
        received[message.stamp] = message
        fresh = set(message.ref_stamp.tolist()) - set(keyframes)
        solving += spent if fresh else 0.0
        keyframes |= {stamp: received[stamp] for stamp in fresh}
        poses |= estimate.earlier
        if estimate.T_world_camera is not None:
            poses[message.stamp] = estimate.T_world_camera
        if (window := estimate.window) is not None:
            messages_of = [keyframes[stamp] for stamp in window.stamps.tolist()]
            rows, posed = surviving(window, messages_of, camera, bundle.options.prune_px)
            tracks, stamps = [*tracks, rows.track], [*stamps, rows.stamp]
            squared.append(posed.residual()[0].square().sum(-1))
    poses |= bundle.trajectory  # by now known better
    keyframes = dict(sorted(keyframes.items()))
    return _result(poses, tracks, stamps, squared, seconds, solving), bundle, keyframes


def batch(before: Result, bundle: Bundle, keyframes: dict[int, Correspondences]) -> Result | None:
    """All keyframes at once, from where the bundle left them; None where that fails."""
    posed = {stamp: bundle.trajectory[stamp] for stamp in keyframes if stamp in bundle.trajectory}
    if len(posed) < 3:
        return None
    messages = [keyframes[stamp] for stamp in posed]
    begin = time.process_time()
    window = refine(messages, torch.stack(list(posed.values())), bundle.camera, bundle.options)
    seconds = time.process_time() - begin
    if window is None:
        return None
    rows, problem = surviving(window, messages, bundle.camera, bundle.options.prune_px)
    poses = dict(zip(posed, window.T_world_camera, strict=True))
    squared = problem.residual()[0].square().sum(-1)
    return _result(
        poses, [rows.track], [rows.stamp], [squared], before.seconds + seconds,
        before.keyframe_seconds + seconds,
    )


def _result(
    poses: dict[int, torch.Tensor],
    tracks: list,
    stamps: list,
    squared: list,
    seconds: float,
    keyframe_seconds: float,
) -> Result:
    """tracks, stamps, squared: (O,) each, of every observation, perhaps several times."""
    poses = {stamp: T.numpy() for stamp, T in sorted(poses.items())}
    if not tracks:
        return Result(poses, float('nan'), float('nan'), seconds, keyframe_seconds)
    pairs = torch.unique(torch.stack((torch.cat(tracks), torch.cat(stamps))), dim=1)
    lengths = torch.unique(pairs[0], return_counts=True)[1]
    error = float(torch.cat(squared).mean().sqrt())
    return Result(poses, float(np.median(lengths)), error, seconds, keyframe_seconds)


def colmap(keyframes: dict[int, Correspondences], camera: Camera) -> Result:
    import pycolmap

    pycolmap.logging.minloglevel = pycolmap.logging.Level.FATAL.value
    messages = list(keyframes.values())
    options = pycolmap.IncrementalPipelineOptions(
        multiple_models=False, extract_colors=False, num_threads=1, random_seed=0,
        ba_refine_focal_length=False,
        ba_refine_principal_point=False, ba_refine_extra_params=False,
    )
    mapper = options.mapper
    mapper.num_threads, mapper.random_seed = 1, 0
    mapper.abs_pose_refine_focal_length = mapper.abs_pose_refine_extra_params = False
    mapper.init_max_forward_motion, mapper.init_min_tri_angle = 1.0, 4.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_colmap(folder, camera, messages, {}, {}, 3.0)
        pairs = folder / 'pairs.txt'
        pairs.write_text(''.join(
            f'{image_name(ref)} {image_name(message.stamp)}\n'
            for message in messages for ref in message.ref_stamp.unique().tolist()
        ))
        database = pycolmap.Database.open(folder / DATABASE)
        database.clear_two_view_geometries()  # ours: it makes its own
        database.close()
        verification = pycolmap.TwoViewGeometryOptions()
        verification.ransac.random_seed = 0
        pycolmap.verify_matches(folder / DATABASE, pairs, verification)
        begin = time.process_time()
        models = pycolmap.incremental_mapping(folder / DATABASE, folder, folder, options)
        seconds = time.process_time() - begin
    if not models:
        return Result({}, float('nan'), float('nan'), seconds, seconds)
    model = max(models.values(), key=lambda model: model.num_reg_images())
    poses, squared = {}, []
    for image in model.images.values():
        if not image.has_pose:
            continue
        T = image.cam_from_world().inverse()
        poses[int(Path(image.name).stem)] = np.concatenate((T.translation, T.rotation.quat))
        for point in image.points2D:
            if point.has_point3D():
                predicted = image.project_point(model.points3D[point.point3D_id].xyz)
                squared.append(np.square(predicted - point.xy).sum())
    lengths = [point.track.length() for point in model.points3D.values()]
    error = float(np.sqrt(np.mean(squared)))
    return Result(dict(sorted(poses.items())), float(np.median(lengths)), error, seconds, seconds)


def compare(messages: list[Correspondences], camera: Camera, truth: tuple | None) -> list[dict]:
    """One row per solver."""
    first, bundle, keyframes = online(messages, camera)
    results = {'imatching': first, 'imatching_batch': batch(first, bundle, keyframes)}
    if importlib.util.find_spec('pycolmap'):
        results['colmap'] = colmap(keyframes, camera)
    # A solver that found nothing must not hide what the others found.
    found = [
        result.T_world_camera for result in results.values() if result and result.T_world_camera
    ]
    common = [stamp for stamp in keyframes if all(stamp in poses for poses in found)]
    rows = []
    for solver, result in results.items():
        if result is None:
            continue
        poses = result.T_world_camera

        def error(stamps, poses=poses):
            stamps = [stamp for stamp in stamps if stamp in poses]
            return trajectory_accuracy(stamps, [poses[stamp] for stamp in stamps], truth)

        rows.append({
            'solver': solver, 'frames': len(messages), 'keyframes': len(keyframes),
            'posed_percent': 100 * len(poses) / len(messages),
            'keyframes_posed_percent': 100 * sum(stamp in poses
                                                 for stamp in keyframes) / max(len(keyframes), 1),
            'common': len(common), 'ate_m': error(common).ate_m,
            'ate_percent': error(common).ate_percent,
            'ate_own_m': error(poses).ate_m, 'track_length': _finite(result.track_length),
            'reprojection_px': _finite(result.reprojection_px),
            'seconds': result.seconds, 'keyframe_seconds': result.keyframe_seconds, 'threads': 1,
        })
    return rows


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def tracks_of(kind: str, recording, frames: int | None) -> list[Correspondences]:
    """Return the messages of the recording's first images."""
    if kind == 'sift':
        tracker = SiftTracker(recording.camera)
    else:
        matcher, info = weights.load(weights.default_path())
        tracker = Tracker(matcher, info.version, recording.camera)
    return [tracker.track(stamp, image) for stamp, image in islice(recording, frames)]


def show(rows: list[dict]) -> None:
    table = Table(
        title='After Sim(3) alignment; one thread; in brackets how often our time fits into '
        "COLMAP's"
    )
    for column in ('recording', 'tracks', 'solver'):
        table.add_column(column)
    for column in (
        'images posed %', 'keyframes posed %', 'ATE m', 'ATE %', 'own ATE m', 'track', 'px',
        'seconds',
        'of keyframes',
    ):
        table.add_column(column, justify='right')
    for row in rows:
        peer = next((
            other['seconds'] for other in rows
            if other['solver'] == 'colmap' and all(other[key] == row[key]
                                                   for key in ('recording', 'tracks'))
        ), None)

        def number(value, form):
            return '-' if value is None else format(value, form)

        def seconds(value, peer=peer, row=row):
            return f'{value:.2f}' + (
                f' ({peer / value:.1f} x)' if peer and row['solver'] != 'colmap' else ''
            )

        table.add_row(
            row['recording'], row['tracks'], row['solver'], number(row['posed_percent'], '.1f'),
            f"{row['keyframes_posed_percent']:.1f} of {row['keyframes']}",
            number(row['ate_m'], '.4f'),
            number(row['ate_percent'], '.2f'), number(row['ate_own_m'], '.4f'),
            number(row['track_length'], '.0f'),
            number(row['reprojection_px'], '.2f'), seconds(row['seconds']),
            seconds(row['keyframe_seconds']),
        )
    Console(width=180).print(table)


def learning(arguments: list[str]) -> None:
    import learned_odometry

    parser = argparse.ArgumentParser(description=learned_odometry.__doc__.split('\n\n')[0])
    parser.add_argument('--scenes', nargs='+', help='default: all')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], help='default: 0 1 2')
    parser.add_argument('--steps', type=int, default=60, help='of the learner (default: 60)')
    parser.add_argument('--frames', type=int, help='of a rendered scene (default: 300)')
    parser.add_argument('--weights', type=Path, help='folder of tuned weights')
    parser.add_argument('--cache', type=Path, help='folder that keeps rendered scenes')
    parser.add_argument('--json', type=Path, help='write all rows to this file')
    learned_odometry.measure(parser.parse_args(arguments))


def main() -> None:
    if sys.argv[1:2] == ['learning']:
        return learning(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument(
        'recordings', nargs='*', type=Path, metavar='RECORDING', help='folders or bags'
    )
    parser.add_argument('--json', type=Path, help='write all rows to this file')
    parser.add_argument('--frames', type=int, help='only so many images of each')
    parser.add_argument('--tracks', choices=('sift', 'imatching'), help='only these')
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if not importlib.util.find_spec('pycolmap'):
        print('colmap is left out: pip install pycolmap', file=sys.stderr)
    rows = []
    for path in options.recordings or [
        RECORDINGS / name for name in ('redkitchen', 'kitti_street')
    ]:
        try:
            recording = open_recording(path)
            truth = recording.ground_truth
            for kind in [options.tracks] if options.tracks else ['sift', 'imatching']:
                found = compare(
                    tracks_of(kind, recording, options.frames), recording.camera, truth
                )
                rows += [{'recording': path.name, 'tracks': kind} | row for row in found]
        except RecordingError as error:
            if options.recordings:
                sys.exit(str(error))
            print(f'{path.name} is left out: {error}', file=sys.stderr)
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + '\n')


if __name__ == '__main__':
    main()
