"""Recordings with exact ground truth, rendered frame by frame into a bag."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
import shutil
import tempfile

import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import get_typestore, Stores
import torch
from torch import Tensor

from .motion import driving, handheld, Motion, Road, wandering
from .places import room, street
from .scene import SAMPLES, Scene
from .sensor import Sensor
from ...files import write_tum
from ...geometry.camera import Camera

START_NS = 1_700_000_000_000_000_000  #: stamp of a recording's first frame


def render_recording(
    out_dir: Path | str,
    *,
    seed: int = 0,
    frames: int = 150,
    size: tuple[int, int] = (640, 480),
    path: str = 'handheld',
    surfaces: str = 'mixed',
    rate_hz: float = 20.0,
    sensor: Sensor | None = None,
    depth_every: int = 1,
    camera: Camera | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """
    Render a recording with exact ground truth into the new folder ``out_dir`` and return its path.

    The folder holds ``bag/`` (rosbag2, MCAP: /camera/image_raw mono8, /camera/camera_info,
    /ground_truth/pose), ``groundtruth.txt`` (TUM: T_world_camera at mid-exposure, the image's
    stamp), ``intrinsics.txt`` and, for every ``depth_every``-th frame, ``depth/<stamp in ns>.npz``
    (array ``depth``, float32, metres along the optical axis).

    Of the arguments,
        seed: scene, path and noise all follow from it (and from the other arguments).
        size: width and height in pixels, where no ``camera`` is given; the focal length is then
            0.8 times the width.
        path: "handheld" (a furnished room) or "driving" (a winding street).
        surfaces: of the room: "mixed", "plain" or "repetitive" (``room``).
        sensor: noise, blur and exposure; ``Sensor()`` where None, see also ``Sensor.low_light``.
        progress: called with (frames done, frames) after each frame.

    The folder appears whole or not at all. Raises ValueError for an unknown path, fewer than two
    frames or rates and steps that are not positive, FileExistsError where out_dir exists already.
    """
    out_dir = Path(out_dir)
    if path not in ('handheld', 'driving'):
        raise ValueError(f"a synthetic recording's path is 'handheld' or 'driving', not '{path}'")
    if surfaces not in ('mixed', 'plain', 'repetitive'):
        raise ValueError(
            f"a room's surfaces are 'mixed', 'plain' or 'repetitive', not '{surfaces}'"
        )
    if frames < 2 or not rate_hz > 0 or depth_every < 1:
        raise ValueError(
            'a synthetic recording needs two frames or more, a positive rate and depth_every '
            'from 1'
        )
    if out_dir.exists():
        raise FileExistsError(f'{out_dir} exists already; remove it or choose another folder')
    sensor = sensor or Sensor()
    width, height = (camera.width, camera.height) if camera else size
    camera = camera or Camera(
        width, height, 0.8 * width, 0.8 * width, (width - 1) / 2, (height - 1) / 2
    )

    scene, path_at = make_scene(path, seed, camera, frames / rate_hz, surfaces)
    rng = np.random.default_rng([seed, 2])
    exposure = [wandering(rng, (0.7, 0.35), (0.13, 0.41)) for _ in range(2)]
    pattern = sensor.pattern((width, height), np.random.default_rng([seed, 3]))
    times = np.arange(frames) / rate_hz
    stamps = START_NS + np.rint(times * 1e9).astype(np.int64)
    poses = torch.from_numpy(path_at(times))
    shutter = sensor.exposure_s * ((np.arange(len(SAMPLES)) + 0.5) / len(SAMPLES) - 0.5)

    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f'.{out_dir.name}-', dir=out_dir.parent))
    try:
        (partial / 'depth').mkdir()
        with _Bag(partial / 'bag', camera) as bag:
            for k, stamp in enumerate(stamps.tolist()):
                light = scene.image(torch.from_numpy(path_at(times[k] + shutter)), camera)
                wander = np.array([move(times[k]) for move in exposure])
                bag.write(stamp, sensor.expose(light, wander, rng, pattern), poses[k])
                if k % depth_every == 0:
                    depth = scene.depth(poses[k], camera)
                    np.savez(partial / 'depth' / f'{stamp}.npz', depth=depth)
                if progress:
                    progress(k + 1, frames)
        truth = partial / 'groundtruth.txt'
        write_tum(truth, stamps.tolist(), poses.tolist(), of='camera_optical in world')
        header = f'pinhole K, pixel centres at integers; {width} x {height}'
        np.savetxt(partial / 'intrinsics.txt', _matrix(camera), header=header)
        partial.chmod(0o755)  # mkdtemp's folder is the owner's alone
        partial.rename(out_dir)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out_dir


def make_scene(
    path: str, seed: int, camera: Camera, seconds: float, surfaces: str = 'mixed'
) -> tuple[Scene, Motion]:
    """
    Return the scene, and the camera's path through it, that ``render_recording`` renders.

    It does so for the same path, seed, camera, surfaces and length, ``seconds``.
    """
    build, move = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    if path == 'handheld':
        # Finer texture than this costs more memory than a large picture's sharpness is worth.
        return room(build, min(camera.focal, 800) / 1.5, surfaces), handheld(move)
    speed = 4.5
    road = Road(move, speed * seconds + 70)
    return street(build, road), driving(move, road, speed)


def _matrix(camera: Camera) -> np.ndarray:
    """Return the pinhole matrix (3, 3) float64."""
    return np.array([[camera.fx, 0, camera.cx], [0, camera.fy, camera.cy], [0, 0, 1.0]])


class _Bag:
    """The recording's bag: images, camera info and true poses under one stamp."""

    def __init__(self, folder: Path, camera: Camera) -> None:
        self.camera = camera
        self.store = get_typestore(Stores.ROS2_HUMBLE)
        self.writer = Writer(folder, version=9, storage_plugin=StoragePlugin.MCAP)

    def __enter__(self) -> _Bag:
        self.writer.open()
        self.topics = [
            self.writer.add_connection(topic, msgtype, typestore=self.store)
            for topic, msgtype in (
                ('/camera/camera_info', 'sensor_msgs/msg/CameraInfo'),
                ('/camera/image_raw', 'sensor_msgs/msg/Image'),
                ('/ground_truth/pose', 'geometry_msgs/msg/PoseStamped'),
            )
        ]
        return self

    def __exit__(self, *error) -> None:
        self.writer.close()

    def write(self, stamp: int, image: np.ndarray, pose: Tensor) -> None:
        types, camera = self.store.types, self.camera
        time = types['builtin_interfaces/msg/Time'](stamp // 10**9, stamp % 10**9)
        header = types['std_msgs/msg/Header'](time, 'camera_optical_frame')
        model = camera.distortion_model.replace('none', 'plumb_bob')
        K = _matrix(camera)
        info = types['sensor_msgs/msg/CameraInfo'](
            header=header, height=camera.height, width=camera.width,
            distortion_model=model, d=np.array(camera.distortion or (0.0,) * 5),
            k=K.ravel(), r=np.eye(3).ravel(), p=np.pad(K, ((0, 0), (0, 1))).ravel(),
            binning_x=0, binning_y=0,
            roi=types['sensor_msgs/msg/RegionOfInterest'](0, 0, 0, 0, False),
        )
        picture = types['sensor_msgs/msg/Image'](
            header, camera.height, camera.width, 'mono8', 0, camera.width, image.ravel()
        )
        x, y, z, qx, qy, qz, qw = pose.tolist()
        truth = types['geometry_msgs/msg/PoseStamped'](
            types['std_msgs/msg/Header'](time, 'world'),
            types['geometry_msgs/msg/Pose'](
                types['geometry_msgs/msg/Point'](x, y, z),
                types['geometry_msgs/msg/Quaternion'](qx, qy, qz, qw),
            ),
        )
        for topic, message in zip(self.topics, (info, picture, truth), strict=True):
            self.writer.write(topic, stamp, self.store.serialize_cdr(message, topic.msgtype))
