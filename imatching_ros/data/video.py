"""
Recordings of any kind: bags, and without ROS video files and folders of pictures.

The latter have their intrinsics from a file beside them, or from the user.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
import contextlib
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from .bags import BAG_FILES, STORE
from .cameras import camera_beside, Given, given_camera, HOW
from .images import decode_compressed, Greys
from .recording import open_recording, Recording, RecordingError
from .sieve import Sieve
from ..geometry.camera import Camera

VIDEOS = ('.mp4', '.mov', '.avi', '.mkv', '.webm', '.m4v')
PICTURES = (
    '.png', '.jpg', '.jpeg', '.bmp', '.pgm', '.ppm', '.tif', '.tiff', '.webp',
)
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
    transport: str = 'raw'  #: of ``messages``
    ground_truth: None = None
    _sieve: Sieve = field(default_factory=Sieve, repr=False)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        greys = Greys()

        def decode(image: Path | np.ndarray) -> np.ndarray:
            return _read(image, greys) if isinstance(image, Path) else image

        def other_size(number: int, has: str) -> str:
            return (
                f'picture {number} of {self.bag} is {has}, but the camera is '
                f'{self.camera.width}x{self.camera.height}; all pictures of a recording must '
                'have one size'
            )

        images = self._sieve.in_time(self._stamped())
        if not (yield from self._sieve.pictures(images, decode, self.camera_of, other_size)):
            raise RecordingError(
                f'no picture of {self.bag} can be used: {self._sieve.sentence(self.count)}'
            )

    def messages(self) -> Iterator[tuple[int, str, object]]:
        """Yield (stamp_ns, "camera", Camera), then (stamp_ns, "image", message) as a bag does."""
        types = STORE.types
        for k, (stamp, image) in enumerate(self):
            if k == 0:
                yield stamp, 'camera', self.camera
            time = types['builtin_interfaces/msg/Time'](*divmod(stamp, 10**9))
            height, width = image.shape
            yield stamp, 'image', types['sensor_msgs/msg/Image'](
                types['std_msgs/msg/Header'](time, 'camera'), height, width, 'mono8', 0, width,
                np.ascontiguousarray(image).reshape(-1),
            )

    def camera_of(self, stamp: int) -> Camera:
        """Return the camera of an image: all have the same."""
        return self.camera

    def depth(self, stamp: int) -> None:
        """Return an image's depth: none has any."""

    @property
    def left_out(self) -> Counter[str]:
        """Return how many pictures were left out so far, by the reason in words."""
        return self._sieve.counts

    def notes(self) -> list[str]:
        """Return what the user should know of the pictures, one sentence each."""
        notes = [f'the camera of {self.bag} is odd: {doubt}' for doubt in self.camera.doubts()]
        if left_out := self._sieve.sentence(self.count):
            notes.append(f'{self.bag}: {left_out}')
        return notes

    def _stamped(self) -> Iterator[tuple[int, int, Path | np.ndarray]]:
        """Yield number, stamp ns and picture: a folder's as files, a video's as they are."""
        for k, image in enumerate(_pictures(self.bag) if self.bag.is_dir() else self._video()):
            name = image.stem if isinstance(image, Path) else ''
            named = name.isdecimal() and int(name) >= NANOSECONDS
            yield k, int(name) if named else round(k / self.rate_hz * 1e9), image

    def _video(self) -> Iterator[np.ndarray]:
        video = cv2.VideoCapture(str(self.bag))
        try:
            while True:
                read, image = video.read()
                if not read:
                    return
                yield cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) if image.ndim == 3 else image
        finally:
            video.release()


def open_images(
    path: Path | str,
    image_topic: str | None = None,
    camera_info_topic: str | None = None,
    camera: Given | None = None,
    rectified: str = 'auto',
) -> Recording | Pictures:
    """
    Return a recording (``recording.open_recording``), a video file, or a folder of pictures.

    camera: what the user gives (``cameras.given_camera``). Where None, a bag's is that of its
    camera_info, a video's or a folder's that of ``camera_info.yaml`` (as ROS calibration writes
    it) or ``intrinsics.txt`` (a 3x3 matrix) beside or in it. rectified: "always", "never" or
    "auto"; of a file with a projection matrix P, "always" takes that. Raises RecordingError, one
    sentence, where there is nothing to be read, or no intrinsics.
    """
    path = Path(path)
    video = path.is_file() and path.suffix.lower() in VIDEOS
    if not video and not (path.is_dir() and _pictures(path) and not _has_bag(path)):
        return open_recording(path, image_topic, camera_info_topic, camera, rectified)
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
        files, first = _pictures(path), None
        count = len(files)
        for file in files:
            with contextlib.suppress(ValueError):
                first = _read(file)
                break
        if first is None:
            raise RecordingError(
                f'{files[0]} cannot be read as a picture, nor any of the {count} there; copy them '
                'again'
            )
    height, width = first.shape[:2]
    try:
        if camera is not None:
            found = given_camera(camera, width, height, rectified == 'always', image_topic)
        else:
            found = camera_beside(path, width, height, rectified == 'always')
    except ValueError as error:
        raise RecordingError(f'the camera of {path}: {error}') from None
    if found is None:
        raise RecordingError(
            f'{path} has no intrinsics: give {HOW}, or put camera_info.yaml or intrinsics.txt '
            'beside it'
        )
    if count <= 0:
        count = sum(1 for _ in Pictures(path, found, 0, rate))
    return Pictures(path, found, count, rate)


def _has_bag(folder: Path) -> bool:
    inside = {file.name for file in folder.iterdir()}
    return bool(inside & {'bag', 'metadata.yaml'}) or any(
        name.endswith(BAG_FILES) for name in inside
    )


def _pictures(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES)


def _read(file: Path, greys: Greys | None = None) -> np.ndarray:
    """Return a picture (H, W) uint8; ValueError where it is none."""
    try:
        return decode_compressed(file.read_bytes(), greys)
    except ValueError as error:
        raise ValueError(f'{file} cannot be read as a picture: {error}') from None
