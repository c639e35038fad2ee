"""
Video files and folders of pictures, with intrinsics from a file beside them.

Recordings without ROS.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
from imatching_ros.data.recording import BAG_FILES, open_recording, Recording, RecordingError
from imatching_ros.data.sieve import Sieve
from imatching_ros.geometry.camera import Camera
import numpy as np
from ruamel.yaml import YAML, YAMLError

VIDEOS = ('.mp4', '.mov', '.avi', '.mkv', '.webm', '.m4v')
PICTURES = ('.png', '.jpg', '.jpeg', '.bmp', '.pgm', '.tif', '.tiff')
RATE_HZ = 30.0  #: where neither file nor file names tell the time
NANOSECONDS = 10**15  #: a file name that is a number from here on is a stamp


@dataclass(frozen=True)
class Pictures:
    """
    The images of a video file, or of a folder of pictures in the order of their names.

    Iterating yields ``(stamp_ns, image)``, image (H, W) uint8 grey, any number of times. A picture
    whose name is a number of nanoseconds has that stamp; all else is evenly spaced from zero.
    Pictures that cannot be used are left out and counted, as those of a Recording are. Raises
    RecordingError where none can be used.
    """

    bag: Path  #: the file or the folder
    camera: Camera
    count: int  #: images; of a video, what the file says of itself
    rate_hz: float
    ground_truth: None = None
    _sieve: Sieve = field(default_factory=Sieve, repr=False)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        size = (self.camera.height, self.camera.width)

        def other_size(number: int, has: str) -> str:
            return (
                f'picture {number} of {self.bag} is {has}, but the camera is {size[1]}x{size[0]}; '
                'all pictures of a recording must have one size'
            )

        images = self._sieve.in_time(self._stamped())
        if not (yield from self._sieve.pictures(images, _picture, size, other_size)):
            raise RecordingError(
                f'no picture of {self.bag} can be used: {self._sieve.sentence(self.count)}'
            )

    @property
    def left_out(self) -> Counter[str]:
        """Return how many pictures were left out so far, by the reason in words."""
        return self._sieve.counts

    def notes(self) -> list[str]:
        """Return what the user should know of the pictures, one sentence each."""
        left_out = self._sieve.sentence(self.count)
        return [f'{self.bag}: {left_out}'] if left_out else []

    def _stamped(self) -> Iterator[tuple[int, int, tuple[Path, np.ndarray | None]]]:
        for k, (name, image) in enumerate(self._images()):
            stem = name.stem
            named = self.bag.is_dir() and stem.isdecimal() and int(stem) >= NANOSECONDS
            yield k, int(stem) if named else round(k / self.rate_hz * 1e9), (name, image)

    def _images(self) -> Iterator[tuple[Path, np.ndarray | None]]:
        if self.bag.is_dir():
            yield from (
                (file, cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)) for file in _pictures(self.bag)
            )
            return
        video = cv2.VideoCapture(str(self.bag))
        try:
            while True:
                read, image = video.read()
                if not read:
                    return
                yield (
                    self.bag,
                    cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) if image.ndim == 3 else image,
                )
        finally:
            video.release()


def _picture(named: tuple[Path, np.ndarray | None]) -> np.ndarray:
    name, image = named
    if image is None:
        raise ValueError(f'{name} cannot be read as a picture; copy it again or remove it')
    return image


def open_images(
    path: Path | str,
    image_topic: str | None = None,
    camera_info_topic: str | None = None,
    intrinsics: Sequence[float] | None = None,
) -> Recording | Pictures:
    """
    Return a recording (``recording.open_recording``), a video file, or a folder of pictures.

    intrinsics: ``fx fy cx cy`` and distortion coefficients (plumb_bob with four or five), pixels;
    where None, a video's or a folder's are those of ``camera_info.yaml`` (as ROS calibration
    writes it) or ``intrinsics.txt`` (a 3x3 matrix) beside or in it. Raises RecordingError, one
    sentence, where there is nothing to be read, or no intrinsics.
    """
    path = Path(path)
    video = path.is_file() and path.suffix.lower() in VIDEOS
    if not video and not (path.is_dir() and _pictures(path) and not _has_bag(path)):
        return open_recording(path, image_topic, camera_info_topic)
    rate, count = RATE_HZ, 0
    if video:
        capture = cv2.VideoCapture(str(path))
        rate = capture.get(cv2.CAP_PROP_FPS) or RATE_HZ
        count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        read, first = capture.read()
        capture.release()
        if not read:
            raise RecordingError(
                f'{path} holds no video that can be read; convert it to H.264, or to pictures'
            )
    else:
        files = _pictures(path)
        pictures, count = (cv2.imread(str(file)) for file in files), len(files)
        first = next((picture for picture in pictures if picture is not None), None)
        if first is None:
            raise RecordingError(
                f'{files[0]} cannot be read as a picture; copy it again or remove it'
            )
    camera = _camera(path, first.shape[1], first.shape[0], intrinsics)
    if count <= 0:
        count = sum(1 for _ in Pictures(path, camera, 0, rate))
    return Pictures(path, camera, count, rate)


def _has_bag(folder: Path) -> bool:
    inside = {file.name for file in folder.iterdir()}
    return bool(inside & {'bag', 'metadata.yaml'}) or any(
        name.endswith(BAG_FILES) for name in inside
    )


def _pictures(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES)


def _camera(path: Path, width: int, height: int, intrinsics: Sequence[float] | None) -> Camera:
    source = '--camera'
    try:
        if intrinsics is not None:
            if len(intrinsics) not in (4, 8, 9):
                raise ValueError(
                    f'{len(intrinsics)} numbers, but fx fy cx cy and 0, 4 or 5 of distortion '
                    'are expected'
                )
            fx, fy, cx, cy, *D = intrinsics
            return Camera.from_camera_info(
                width, height, [fx, 0, cx, 0, fy, cy, 0, 0, 1], D, 'plumb_bob'
            )
        for folder in (path, path.parent) if path.is_dir() else (path.parent,):
            if (source := folder / 'camera_info.yaml').is_file():
                about = YAML(typ='safe').load(source.read_text())
                if (about['image_width'], about['image_height']) != (width, height):
                    raise ValueError(
                        f'it is for {about["image_width"]}x{about["image_height"]}, not '
                        f'{width}x{height}'
                    )
                D, model = (
                    about['distortion_coefficients']['data'],
                    about.get('distortion_model', ''),
                )
                return Camera.from_camera_info(
                    width, height, about['camera_matrix']['data'], D, model
                )
            if (source := folder / 'intrinsics.txt').is_file():
                K = np.loadtxt(source)
                if K.shape != (3, 3):
                    raise ValueError(f'a 3x3 matrix is expected, its shape is {K.shape}')
                return Camera.from_camera_info(width, height, K.ravel().tolist(), [], '')
    except (ValueError, KeyError, TypeError, YAMLError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise RecordingError(f'the intrinsics in {source} cannot be used: {line}') from None
    raise RecordingError(
        f'{path} has no intrinsics: give --camera fx fy cx cy, or put camera_info.yaml or '
        'intrinsics.txt beside it'
    )
