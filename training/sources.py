"""
What training sees: pictures from photographs and videos, and rendered scenes, as arrays on disk.

Workers map the arrays into memory, so that many of them take no more of it than one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
import hashlib
from pathlib import Path
import shutil
import tempfile

import cv2
from imatching_ros.data.recording import open_recording
from imatching_ros.data.synthetic import render_recording, Sensor
from imatching_ros.data.video import PICTURES, VIDEOS
from imatching_ros.geometry.camera import Camera
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

WIDTHS = (1600, 900, 520)  # px, of the copies of a picture: a view never samples one too coarsely
SMALLEST = (320, 240)  # W, H px of a picture that is of use
FRAME_STEP = 8  # of a video's frames, one in so many: neighbours show the same
COMPLETE = 0.9  # of the frames that a video says it has; files round, and end early when cut
HELD_OUT = 8  # of each source's pictures, the last one in so many judges
FIRST_SEED = 50_000  # of the scenes; benchmarks and tests use small ones
SCENE_FRAMES, SCENE_SIZE = 28, (640, 480)
HELD_OUT_SCENES = 3  # the last ones judge


def write_pictures(sources: Sequence[Path], folder: Path) -> str:
    """
    Write the sources' pictures to ``folder``/train and ``folder``/held_out; return their digest.

    The last eighth of a source's pictures is held out: of a video, its end. Raises ValueError, one
    sentence, where a source cannot be read or holds nothing.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for part in ('train', 'held_out'):
        (folder / part).mkdir(parents=True)
    digest = hashlib.sha256()
    for number, source in enumerate(sources):
        count = -1
        for count, picture in enumerate(read_pictures(source)):
            height, width = picture.shape
            if width < SMALLEST[0] or height < SMALLEST[1]:
                raise ValueError(
                    f'{source}: a picture of {width}x{height} is smaller than the views of '
                    f'{SMALLEST[0]}x{SMALLEST[1]} that are trained on; leave it out'
                )
            smaller = [w for w in WIDTHS if w < width and height * w >= SMALLEST[1] * width]
            for scale in {min(width, WIDTHS[0]), *smaller}:
                copy = cv2.resize(
                    picture, (scale, round(height * scale / width)), interpolation=cv2.INTER_AREA
                )
                np.save(folder / 'train' / f'{number:04}_{count:06}_{scale:04}.npy', copy)
            digest.update(picture.tobytes())
        if count < 0:
            raise ValueError(
                f'{source} holds no photographs ({", ".join(PICTURES)}) and no videos '
                f'({", ".join(VIDEOS)})'
            )
        for k in range(count + 1 - (count + 1) // HELD_OUT, count + 1):
            for file in (folder / 'train').glob(f'{number:04}_{k:06}_*.npy'):
                file.rename(folder / 'held_out' / file.name)
    return digest.hexdigest()


def read_pictures(source: Path) -> Iterator[np.ndarray]:
    """Yield grey pictures (H, W) uint8 of a photograph, a video, or a folder of both, in order."""
    if not source.exists():
        raise ValueError(f'{source} does not exist')
    if source.is_dir():
        for file in sorted(source.iterdir()):
            if file.suffix.lower() in PICTURES + VIDEOS:
                yield from read_pictures(file)
    elif source.suffix.lower() in VIDEOS:
        yield from _frames(source)
    else:
        picture = cv2.imread(str(source), cv2.IMREAD_GRAYSCALE)
        if picture is None:
            raise ValueError(f'{source} cannot be read as a picture; copy it again or remove it')
        yield picture


def _frames(file: Path) -> Iterator[np.ndarray]:
    video = cv2.VideoCapture(str(file))
    try:
        promised, read = video.get(cv2.CAP_PROP_FRAME_COUNT), 0
        while video.grab():
            if read % FRAME_STEP == 0:
                whole, frame = video.retrieve()
                if not whole:
                    break
                yield cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) if frame.ndim == 3 else frame
            read += 1
    finally:
        video.release()
    if not read:
        raise ValueError(f'{file} cannot be read as a video; copy it again or convert it to H.264')
    if read < COMPLETE * promised:
        raise ValueError(
            f'{file} ends after {read} of its {promised:.0f} frames; copy it again or leave it out'
        )


@dataclass(frozen=True)
class Scene:
    """A rendered scene's frames and the exact truth."""

    images: np.ndarray  #: (F, H, W) uint8
    depths: np.ndarray  #: (F, H, W) float32, metres along the optical axis
    T_world_camera: Tensor  #: (F, 7) float64
    camera: Camera

    @classmethod
    def load(cls, folder: Path) -> Scene:
        """Return the scene in a folder that ``Scenes`` has written, its frames not yet read."""
        images, depths = (
            np.load(folder / f'{name}.npy', mmap_mode='r') for name in ('images', 'depths')
        )
        fx, fy, cx, cy = np.load(folder / 'intrinsics.npy').tolist()
        camera = Camera(images.shape[2], images.shape[1], fx, fy, cx, cy)
        return cls(images, depths, torch.from_numpy(np.load(folder / 'poses.npy')), camera)


class Scenes(Dataset):
    """
    The folders of ``count`` scenes; a scene is rendered when it is asked for the first time.

    A third drives along a street, the others walk about a room of any kind of surfaces; two in
    five are seen in dim light.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folders = [folder / str(FIRST_SEED + k) for k in range(count)]

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, number: int) -> str:
        folder = self.folders[number]
        if folder.is_dir():
            return str(folder)
        rng = np.random.default_rng((FIRST_SEED, number))
        path = 'driving' if number % 3 == 2 else 'handheld'
        surfaces = str(rng.choice(['mixed', 'mixed', 'repetitive', 'plain']))
        dim = Sensor.low_light(rng.uniform(0, 0.5))
        sensor = dim if rng.random() < 0.4 else Sensor()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix='.') as scratch:
            recording = open_recording(
                render_recording(
                    Path(scratch) / 'recording', seed=FIRST_SEED + number, frames=SCENE_FRAMES,
                    size=SCENE_SIZE, path=path, surfaces=surfaces, sensor=sensor,
                    rate_hz=float(rng.choice([10.0, 20.0])),
                )
            )
            stamps, images = zip(*recording, strict=True)
            camera, arrays = recording.camera, Path(scratch) / 'arrays'
            arrays.mkdir()
            np.save(arrays / 'images.npy', np.stack(images))
            np.save(arrays / 'depths.npy', np.stack([recording.depth(s) for s in stamps]))
            np.save(arrays / 'poses.npy', recording.ground_truth[1].numpy())
            np.save(
                arrays / 'intrinsics.npy', np.array([camera.fx, camera.fy, camera.cx, camera.cy])
            )
            arrays.rename(folder)  # whole, or not at all
        return str(folder)
