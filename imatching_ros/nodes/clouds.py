"""
Correspondences, windows and priors as point clouds with named fields, and back.

Every ``*_from_*`` raises ValueError with one sentence where a message is malformed.
"""

from __future__ import annotations

import array
import math

from geometry_msgs.msg import Point32, PoseStamped
from nav_msgs.msg import Path
import numpy as np
from sensor_msgs.msg import ChannelFloat32, PointCloud, PointCloud2, PointField
from std_msgs.msg import Header
import torch

from .poses import pose_from_message, pose_to_message
from .stamps import to_header, to_ns
from ..bundle.prior import Prior
from ..bundle.window import Window
from ..geometry.correspondences import Correspondences

CORRESPONDENCE = np.dtype([
    ('x', '<f4'), ('y', '<f4'), ('z', '<f4'), ('u', '<f4'), ('v', '<f4'), ('ref_u', '<f4'),
    ('ref_v', '<f4'),
    ('id', '<u4'), ('ref_sec', '<i4'), ('ref_nanosec', '<u4'), ('score', '<f4'),
    ('cov_uu', '<f4'), ('cov_uv', '<f4'), ('cov_vv', '<f4'), ('model', '<u4'),
])

#: Viewers draw only float32 ``x y z``. The parts that float32 cuts off follow as ``x_low y_low
#: z_low``, so that the sum gives back 48 bits of the solved point and whoever rebuilds the
#: residuals finds the same survivors.
LANDMARK = np.dtype([
    ('x', '<f4'), ('y', '<f4'), ('z', '<f4'), ('id', '<u4'), ('observations', '<u4'),
    ('error_px', '<f4'),
    ('x_low', '<f4'), ('y_low', '<f4'), ('z_low', '<f4'),
])

_FIELD_TYPES = {
    'i1': PointField.INT8, 'u1': PointField.UINT8, 'i2': PointField.INT16, 'u2': PointField.UINT16,
    'i4': PointField.INT32, 'u4': PointField.UINT32, 'f4': PointField.FLOAT32,
    'f8': PointField.FLOAT64,
}
_DTYPES = {number: name for name, number in _FIELD_TYPES.items()}


# Point clouds with named fields


def rows_to_cloud(rows: np.ndarray, head: Header) -> PointCloud2:
    """Return a structured array (N,) as a PointCloud2 whose fields are the array's own."""
    rows = np.ascontiguousarray(rows)
    return PointCloud2(
        header=head,
        height=1,
        width=len(rows),
        fields=[
            PointField(
                name=name, offset=offset, datatype=_FIELD_TYPES[dtype.base.str[1:]],
                count=_count(dtype),
            )
            for name, (dtype, offset) in rows.dtype.fields.items()
        ],
        is_bigendian=False,
        point_step=rows.dtype.itemsize,
        row_step=rows.dtype.itemsize * len(rows),
        data=array.array('B', rows.tobytes()),
        is_dense=True,
    )


def _count(dtype: np.dtype) -> int:
    return math.prod(dtype.shape)


def rows_from_cloud(message: PointCloud2, wanted: np.dtype) -> np.ndarray:
    """
    Return the rows of a PointCloud2 as a structured array (N,) of type ``wanted``.

    Fields that are not wanted are ignored. Raises ValueError where a wanted one is missing or of
    another type, or the data is cut short.
    """
    order = '>' if message.is_bigendian else '<'
    fields = {field.name: field for field in message.fields}
    for name, (dtype, _) in wanted.fields.items():
        field = fields.get(name)
        if field is None:
            raise ValueError(
                f"the point cloud has no field '{name}'; its publisher and this node must "
                'agree on it'
            )
        if _DTYPES.get(field.datatype) != dtype.base.str[1:] or field.count != _count(dtype):
            raise ValueError(
                f"field '{name}' of the point cloud has {field.count} of datatype "
                f'{field.datatype}, expected {_count(dtype)} {dtype.base.name}'
            )
        if field.offset + dtype.itemsize > message.point_step:
            raise ValueError(
                f"field '{name}' of the point cloud ends beyond its point_step of "
                f'{message.point_step}'
            )
    if (
        message.row_step < message.width * message.point_step
        or len(message.data) < message.row_step * message.height
    ):
        raise ValueError(
            f'the point cloud holds {len(message.data)} bytes, fewer than its size says'
        )
    if not message.width * message.height:  # its point_step may then be more than numpy takes
        return np.empty(0, wanted)
    names = list(wanted.names)
    layout = np.dtype(
        {
            'names': names,
            'formats': [(order + wanted[name].base.str[1:], wanted[name].shape) for name in names],
            'offsets': [fields[name].offset for name in names],
            'itemsize': message.point_step,
        }
    )
    rows = np.ndarray(
        (message.height, message.width), layout, memoryview(message.data), 0,
        (message.row_step, message.point_step),
    )
    result = np.empty(rows.size, wanted)
    for name in names:
        result[name] = rows[name].reshape(result[name].shape)
    return result


def _pair(rows: np.ndarray, *names: str) -> torch.Tensor:
    return torch.from_numpy(np.stack([rows[name] for name in names], -1))


# Correspondences


def correspondences_to_cloud(correspondences: Correspondences, frame_id: str) -> PointCloud2:
    """
    Return a cloud with one row for each correspondence.

    Its header carries the newer image's stamp and optical frame.
    """
    c = correspondences
    rows = np.empty(len(c), CORRESPONDENCE)
    rows['x'], rows['y'] = c.xy.numpy().T
    rows['z'] = 1.0
    rows['u'], rows['v'] = c.uv.numpy().T
    rows['ref_u'], rows['ref_v'] = c.ref_uv.numpy().T
    rows['id'] = c.track.numpy()
    rows['ref_sec'], rows['ref_nanosec'] = np.divmod(c.ref_stamp.numpy(), 1_000_000_000)
    rows['score'] = c.score.numpy()
    rows['cov_uu'], rows['cov_uv'], rows['cov_vv'] = c.cov.numpy().T
    rows['model'] = c.model
    return rows_to_cloud(rows, to_header(c.stamp, frame_id))


def correspondences_from_cloud(message: PointCloud2) -> Correspondences:
    """
    Return the correspondences of a cloud, exactly as they were sent.

    Only ``model`` is not known where there are no rows, and then reads 0.
    """
    rows = rows_from_cloud(message, CORRESPONDENCE)
    for name in ('x', 'y', 'u', 'v', 'ref_u', 'ref_v', 'score', 'cov_uu', 'cov_uv', 'cov_vv'):
        if not np.isfinite(rows[name]).all():
            raise ValueError(f"the correspondences hold a value of '{name}' that is not finite")
    return Correspondences(
        stamp=to_ns(message.header.stamp),
        uv=_pair(rows, 'u', 'v'),
        xy=_pair(rows, 'x', 'y'),
        ref_stamp=torch.from_numpy(
            rows['ref_sec'].astype(np.int64) * 1_000_000_000 + rows['ref_nanosec']
        ),
        ref_uv=_pair(rows, 'ref_u', 'ref_v'),
        track=torch.from_numpy(rows['id'].astype(np.int64)),
        score=torch.from_numpy(rows['score'].copy()),
        cov=_pair(rows, 'cov_uu', 'cov_uv', 'cov_vv'),
        model=int(rows['model'][0]) if len(rows) else 0,
    )


def vins_features(
    current: Correspondences, previous: Correspondences | None, frame_id: str
) -> PointCloud:
    """
    Return the feature message of VINS-Fusion: one point on z = 1 for each track, nine channels.

    The channels are id, camera, u, v, velocity x and velocity y (on the normalised plane, per
    second, 0 for a new track), and three zeros for a ground-truth point, which VINS-Fusion reads
    whenever there are more than five channels. Ids are float32, which is exact below 2^24 only, so
    tracks are counted modulo 2^24.
    """
    track, first = np.unique(current.track.numpy(), return_index=True)
    xy, uv = current.xy.numpy()[first], current.uv.numpy()[first]
    velocity = np.zeros_like(xy)
    if previous is not None and len(previous) and current.stamp > previous.stamp:
        old_track, old_first = np.unique(previous.track.numpy(), return_index=True)
        _, new, old = np.intersect1d(track, old_track, assume_unique=True, return_indices=True)
        moved = xy[new] - previous.xy.numpy()[old_first][old]
        velocity[new] = moved / ((current.stamp - previous.stamp) * 1e-9)
    zeros = np.zeros(len(track), np.float32)
    channels = {
        'id': track % 2**24,
        'camera_id': zeros,
        'p_u': uv[:, 0],
        'p_v': uv[:, 1],
        'velocity_x': velocity[:, 0],
        'velocity_y': velocity[:, 1],
        'gx': zeros,
        'gy': zeros,
        'gz': zeros,
    }
    return PointCloud(
        header=to_header(current.stamp, frame_id),
        points=[Point32(x=float(x), y=float(y), z=1.0) for x, y in xy],
        channels=[
            ChannelFloat32(name=name, values=np.asarray(values, np.float32).tolist())
            for name, values in channels.items()
        ],
    )


# Windows and priors


def window_to_messages(window: Window, stamp: int, world_frame: str) -> tuple[Path, PointCloud2]:
    """
    Return the messages ``keyframes`` and ``landmarks`` of one solve.

    Both carry the stamp (ns) of the image that caused it, as does ``prior``.
    """
    path = Path(
        header=to_header(stamp, world_frame),
        poses=[
            PoseStamped(header=to_header(ns, world_frame), pose=pose_to_message(T))
            for ns, T in zip(window.stamps.tolist(), window.T_world_camera, strict=True)
        ],
    )
    points = window.points.numpy()
    high = points.astype(np.float32)
    low = (points - high).astype(np.float32)
    rows = np.empty(len(points), LANDMARK)
    rows['x'], rows['y'], rows['z'] = high.T
    rows['x_low'], rows['y_low'], rows['z_low'] = low.T
    rows['id'] = window.track.numpy()
    rows['observations'] = window.observations.numpy()
    rows['error_px'] = window.error_px.numpy()
    return path, rows_to_cloud(rows, to_header(stamp, world_frame))


def window_from_messages(keyframes: Path, landmarks: PointCloud2, prior: PointCloud2) -> Window:
    """
    Return the window of one solve.

    Raises ValueError where the messages are of different solves, or malformed.
    """
    if len({to_ns(message.header.stamp) for message in (keyframes, landmarks, prior)}) > 1:
        raise ValueError(
            'keyframes, landmarks and prior have different stamps, so they are not of the same '
            'solve'
        )
    rows = rows_from_cloud(landmarks, LANDMARK)
    points = torch.from_numpy(_points(rows))
    poses = [pose_from_message(pose.pose) for pose in keyframes.poses]
    T_world_camera = torch.stack(poses) if poses else torch.empty(0, 7, dtype=torch.float64)
    if not (torch.isfinite(points).all() and torch.isfinite(T_world_camera).all()):
        raise ValueError('the window holds a pose or a landmark that is not finite')
    stamps = torch.tensor(
        [to_ns(pose.header.stamp) for pose in keyframes.poses], dtype=torch.int64
    )
    track = torch.from_numpy(rows['id'].astype(np.int64))
    if not ((stamps.diff() > 0).all() and (track.diff() > 0).all()):
        raise ValueError(
            "the window's keyframes or landmarks are not in ascending order, each once"
        )
    return Window(
        stamps=stamps,
        T_world_camera=T_world_camera,
        track=track,
        points=points,
        observations=torch.from_numpy(rows['observations'].astype(np.int64)),
        error_px=torch.from_numpy(rows['error_px'].astype(np.float64)),
        prior=prior_from_cloud(prior),
    )


def landmarks_from_cloud(message: PointCloud2) -> tuple[np.ndarray, np.ndarray]:
    """Return the tracks (L,) and points (L, 3) float64 of ``landmarks``."""
    rows = rows_from_cloud(message, LANDMARK)
    return rows['id'], _points(rows)


def _points(rows: np.ndarray) -> np.ndarray:
    with np.errstate(invalid='ignore'):  # whoever asked refuses what is not finite
        high = np.stack([rows[name] for name in 'xyz'], -1).astype(np.float64)
        return high + np.stack([rows[f'{name}_low'] for name in 'xyz'], -1)


def _prior_type(poses: int) -> np.dtype:
    return np.dtype([
        ('sec', '<i4'), ('nanosec', '<u4'), ('pose', '<f8', (7,)), ('gradient', '<f8', (6,)),
        ('information', '<f8', (36 * poses,)),
    ])


def prior_to_cloud(prior: Prior | None, stamp: int, world_frame: str) -> PointCloud2:
    """
    Return a prior on P poses as a cloud with a row for each, or without rows where there is none.

    A row's fields are the pose's stamp, where it was linearised (x y z qx qy qz qw), its six
    numbers of the gradient (6P,) and its six rows of the information (6P, 6P), one after the
    other.
    """
    poses = 0 if prior is None else len(prior.stamps)
    rows = np.empty(poses, _prior_type(poses))
    if prior is not None:
        rows['sec'], rows['nanosec'] = np.divmod(prior.stamps.numpy(), 1_000_000_000)
        rows['pose'] = prior.T_world_camera.numpy()
        rows['gradient'] = prior.gradient.numpy().reshape(poses, 6)
        rows['information'] = prior.information.numpy().reshape(poses, 36 * poses)
    return rows_to_cloud(rows, to_header(stamp, world_frame))


def prior_from_cloud(message: PointCloud2) -> Prior | None:
    """Return the prior of a cloud, exactly as it was sent; ValueError where it is malformed."""
    poses = message.width * message.height
    if poses == 0:
        return None
    if poses > 1000:
        raise ValueError(f'the prior speaks of {poses} poses, more than any window has')
    rows = rows_from_cloud(message, _prior_type(poses))
    for name in ('pose', 'gradient', 'information'):
        if not np.isfinite(rows[name]).all():
            raise ValueError(f"the prior holds a value of '{name}' that is not finite")
    return Prior(
        stamps=torch.from_numpy(rows['sec'].astype(np.int64) * 1_000_000_000 + rows['nanosec']),
        T_world_camera=torch.from_numpy(rows['pose'].copy()),
        information=torch.from_numpy(rows['information'].reshape(6 * poses, 6 * poses).copy()),
        gradient=torch.from_numpy(rows['gradient'].reshape(6 * poses).copy()),
    )
