"""
Recordings: ROS 1 bags, rosbag2 sqlite3 and MCAP.

With the ground truth that may lie beside them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path

import cv2
from imatching_ros.data.cameras import Cameras, Given, given_camera, HOW, rectified_images
from imatching_ros.data.images import compressed_size, decode_compressed, decode_image, Greys
from imatching_ros.geometry.camera import Camera, FOLLOWED_PX, unclear
import numpy as np
from rosbags.highlevel import AnyReader
from rosbags.interfaces import Connection
from rosbags.typesys import get_typestore, Stores
import torch
from torch import Tensor

IMAGE, COMPRESSED = 'sensor_msgs/msg/Image', 'sensor_msgs/msg/CompressedImage'
CAMERA_INFO, POSE = 'sensor_msgs/msg/CameraInfo', 'geometry_msgs/msg/PoseStamped'
BAG_FILES = ('.bag', '.mcap', '.db3')

#: Bags of older ROS 2 releases carry no message definitions; these stand in. ROS 1 messages are
#: brought to them too.
STORE = get_typestore(Stores.ROS2_HUMBLE)


class RecordingError(ValueError):
    """A recording that cannot be used; its text is one sentence for the user."""


@dataclass(frozen=True)
class Recording:
    """
    One camera's images in a bag, in the bag's order.

    Iterating yields ``(stamp_ns, image)``, image (H, W) uint8 grey, and may be done any number of
    times. A stamp is the message's header stamp, or the time of recording where the header has
    none; stamps are handed on as they are, even where they repeat or run backwards. Raises
    RecordingError where the bag or an image is damaged.
    """

    bag: Path  #: the bag folder or file
    folder: Path  #: where `depth/` and `groundtruth.txt` are, if they are
    camera: Camera  #: of the bag's first camera_info that can be used, or the one that was given
    image_topic: str
    camera_info_topic: str  #: empty where the camera was given
    transport: str  #: "raw" (sensor_msgs/Image) or "compressed" (sensor_msgs/CompressedImage)
    count: int  #: images in the bag
    rectified: bool = False  #: whether the camera is that of P
    said: tuple[str, ...] = ()  #: sentences about the camera
    cameras: Cameras = field(default_factory=Cameras, repr=False, compare=False)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        greys = Greys()
        for number, (stamp, camera, message) in enumerate(self._images()):
            try:
                if self.transport == 'compressed':
                    image = decode_compressed(message.data, greys)
                else:
                    image = decode_image(
                        message.encoding, message.height, message.width, message.step,
                        message.data, message.is_bigendian, greys,
                    )  # fmt: skip
            except ValueError as error:
                raise RecordingError(
                    f'image {number} of {self.image_topic} in {self.bag}: {error}'
                ) from None
            if image.shape != (camera.height, camera.width):
                raise RecordingError(
                    f'image {number} of {self.image_topic} in {self.bag} is '
                    f'{image.shape[1]}x{image.shape[0]}, but '
                    f'{self.camera_info_topic} is for {camera.width}x{camera.height}; '
                    'choose the camera_info of this camera with --camera-info-topic'
                )
            yield stamp, image

    def messages(self) -> Iterator[tuple[int, str, object]]:
        """
        Yield the images' messages in the bag's order, and the cameras that they belong to.

        (stamp_ns, "image", message), the message of `rosbags` with ROS 2's field names, also where
        the bag is of ROS 1; and (stamp_ns, "camera", Camera) before the first image and wherever
        the calibration changes.
        """
        last = None
        for stamp, camera, message in self._images():
            if camera != last:
                yield stamp, 'camera', camera
                last = camera
            yield stamp, 'image', message

    def camera_of(self, stamp: int) -> Camera:
        """Return the camera of an image that was read already."""
        return self.cameras.of(stamp)

    def notes(self) -> list[str]:
        """Return what the user should know of the recording as far as it was read."""
        notes = list(self.said)
        if self.cameras.breaks:
            notes.append(
                f'{self.camera_info_topic} changed {self.cameras.breaks} times by more than '
                f'{FOLLOWED_PX:g} px: each time a map was begun anew'
            )
        return notes

    def _images(self) -> Iterator[tuple[int, Camera, object]]:
        """
        Yield stamp, camera in force and message of each image.

        A camera_info that cannot be used changes nothing.
        """
        camera = self.camera
        for stamp, topic, _, message in self._read((self.image_topic, self.camera_info_topic)):
            if topic == self.camera_info_topic:
                with suppress(ValueError):
                    camera = Camera.from_camera_info(message, self.rectified)
                continue
            self.cameras.put(stamp, camera)
            yield stamp, camera, message

    @cached_property
    def ground_truth(self) -> tuple[Tensor, Tensor] | None:
        """
        Stamps (N,) int64, ns, and T_world_camera (N, 7) float64, or None.

        From the bag's topic of PoseStamped that has "ground" and "truth" in its name, else from
        `groundtruth.txt` (TUM: seconds tx ty tz qx qy qz qw).
        """
        with _opened(self.bag) as reader:
            topics = {c.topic for c in reader.connections if c.msgtype == POSE and c.msgcount}
        topics = sorted(
            topic for topic in topics if 'ground' in topic.lower() and 'truth' in topic.lower()
        )
        if topics:
            stamps, rows = [], []
            for stamp, _, _, message in self._read(topics[:1]):
                p, q = message.pose.position, message.pose.orientation
                stamps.append(stamp)
                rows.append((p.x, p.y, p.z, q.x, q.y, q.z, q.w))
            return torch.tensor(stamps, dtype=torch.int64), torch.tensor(rows, dtype=torch.float64)
        file = self.folder / 'groundtruth.txt'
        return _read_tum(file) if file.is_file() else None

    def depth(self, stamp: int) -> np.ndarray | None:
        """
        Read the image's depth, (H, W) float32, or None where it has none.

        It is Along the optical axis, metres, 0 where unknown.

        From `depth/<stamp in ns>.npz` (array `depth`), `.npy`, or 16-bit `.png` in millimetres.
        """
        base = self.folder / 'depth' / str(int(stamp))
        try:
            if (file := base.with_suffix('.npz')).is_file():
                with np.load(file) as arrays:
                    depth = arrays['depth']
            elif (file := base.with_suffix('.npy')).is_file():
                depth = np.load(file)
            elif (file := base.with_suffix('.png')).is_file():
                depth = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
                if depth is None or depth.dtype != np.uint16:
                    raise ValueError('it is not a 16-bit picture')
                depth = depth / np.float32(1000)
            else:
                return None
            if depth.shape != (self.camera.height, self.camera.width):
                raise ValueError(
                    f'its shape is {depth.shape}, not {(self.camera.height, self.camera.width)}'
                )
        except (ValueError, KeyError, OSError, EOFError) as error:
            raise RecordingError(f'depth {file} cannot be read: {_first_line(error)}') from None
        return depth.astype(np.float32, copy=False)

    def _read(self, topics: Collection[str]) -> Iterator[tuple[int, str, str, object]]:
        """(stamp_ns, topic, message type, message) of some topics."""
        with _opened(self.bag) as reader:
            yield from _messages(
                self.bag, reader, [c for c in reader.connections if c.topic in topics]
            )


def open_recording(
    path: Path | str, image_topic: str | None = None, camera_info_topic: str | None = None,
    camera: Given | None = None, rectified: str = 'auto',
) -> Recording:
    """
    Open a recording.

    It is a .bag, .mcap or .db3 file, a rosbag2 folder, or a folder that holds one of these, or
    `bag/`.

    Where the bag has one image topic it is taken, else `image_topic` must choose.
    `camera_info_topic` is by default the one beside the image topic (``/camera/image_raw`` has
    ``/camera/camera_info``), else the bag's only one; where `camera` is given
    (``cameras.given_camera``) none is needed. `rectified`: "always", "never", or "auto", which
    reads it from the image topic's name. Raises RecordingError, one sentence: no such path, no bag
    there, a damaged bag, no images, several image topics and none chosen, no camera_info, an
    uncalibrated camera.
    """
    bag, folder = _find(Path(path))
    with _opened(bag) as reader:
        filled = [c for c in reader.connections if c.msgcount]
        images = {c.topic: c.msgtype for c in filled if c.msgtype in (IMAGE, COMPRESSED)}
        infos = sorted({c.topic for c in filled if c.msgtype == CAMERA_INFO})
        image_topic = _choose_image(bag, image_topic, images, sorted({c.topic for c in filled}))
        always = rectified_images(rectified, image_topic)
        said: list[str] = []
        if camera is None:
            camera_info_topic = _choose_info(bag, camera_info_topic, infos, image_topic)
            here = [c for c in filled if c.topic == camera_info_topic]
            about = (message for _, _, _, message in _messages(bag, reader, here))
            try:
                camera, info = _first_camera(about, always)
            except ValueError as error:
                raise RecordingError(f'{camera_info_topic} in {bag}: {error}') from None
            apart = unclear(info, image_topic) if rectified == 'auto' else None
            if apart is not None:
                said.append(
                    f'the images of {image_topic} are taken as raw, by K and D of '
                    f'{camera_info_topic}; by P pixels lie up to {apart:.0f} px elsewhere: if '
                    'they are rectified, say --rectified always, else --rectified never'
                )
        else:
            first = next(_messages(bag, reader, [c for c in filled if c.topic == image_topic]))[3]
            try:
                height, width = (
                    compressed_size(first.data) if images[image_topic] == COMPRESSED
                    else (first.height, first.width)
                )  # fmt: skip
                camera = given_camera(camera, width, height, always, image_topic)
            except ValueError as error:
                raise RecordingError(f'the camera given for {bag}: {error}') from None
            camera_info_topic = ''
        count = sum(c.msgcount for c in filled if c.topic == image_topic)
    said += [f'the camera of {image_topic} is odd: {doubt}' for doubt in camera.doubts()]
    transport = 'compressed' if images[image_topic] == COMPRESSED else 'raw'
    return Recording(
        bag, folder, camera, image_topic, camera_info_topic, transport, count, always, tuple(said)
    )


def _first_camera(infos: Iterator[object], rectified: bool) -> tuple[Camera, object]:
    """Return the camera of the first camera_info that can be used, and that; the first's error."""
    refused = None
    for info in infos:
        try:
            return Camera.from_camera_info(info, rectified), info
        except ValueError as error:
            refused = refused or error
    raise refused


def _choose_image(bag: Path, wanted: str | None, images: dict[str, str], topics: list[str]) -> str:
    if not images:
        have = f'only {", ".join(topics)}' if topics else 'no messages at all'
        raise RecordingError(f'{bag} has no images (sensor_msgs Image or CompressedImage), {have}')
    listed = ', '.join(sorted(images))
    if wanted is not None:
        if wanted not in images and f'{wanted}/compressed' in images:
            return f'{wanted}/compressed'
        if wanted not in images:
            raise RecordingError(
                f'{bag} has no images on {wanted}; --image-topic may be one of {listed}'
            )
        return wanted
    if len(images) > 1:
        raise RecordingError(
            f'{bag} has {len(images)} image topics; choose one with --image-topic: {listed}'
        )
    return next(iter(images))


def _choose_info(bag: Path, wanted: str | None, infos: list[str], image_topic: str) -> str:
    if not infos:
        raise RecordingError(
            f'{bag} has no camera_info (sensor_msgs CameraInfo); record it with the images, or '
            f'give {HOW}'
        )
    listed = ', '.join(infos)
    if wanted is not None:
        if wanted not in infos:
            raise RecordingError(
                f'{bag} has no camera_info on {wanted}; --camera-info-topic may be one of {listed}'
            )
        return wanted
    beside = image_topic.removesuffix('/compressed').rpartition('/')[0] + '/camera_info'
    if beside in infos:
        return beside
    if len(infos) > 1:
        raise RecordingError(
            f'{bag} has {len(infos)} camera_info topics, none beside {image_topic}; '
            f'choose one with --camera-info-topic: {listed}'
        )
    return infos[0]


def _find(path: Path) -> tuple[Path, Path]:
    """
    Return the bag (a rosbag2 folder or a bag file) that `path` means.

    Also the folder of its ground truth.
    """
    if not path.exists():
        raise RecordingError(f'recording {path} does not exist')
    if path.is_file():
        if path.suffix not in BAG_FILES:
            raise RecordingError(
                f'{path} is not a recording; give a folder or a {", ".join(BAG_FILES)} file'
            )
        return path, _truth_folder(path.parent)
    for folder in (path, path / 'bag'):
        if (folder / 'metadata.yaml').is_file():
            return folder, _truth_folder(folder)
        files = (
            sorted(file for file in folder.glob('*') if file.suffix in BAG_FILES)
            if folder.is_dir()
            else []
        )
        if len(files) > 1:
            names = ', '.join(file.name for file in files)
            raise RecordingError(
                f'{folder} holds several bags and no metadata.yaml; give one of them: {names}'
            )
        if files:
            return files[0], _truth_folder(folder)
    raise RecordingError(
        f'folder {path} holds no recording: no metadata.yaml, no {", ".join(BAG_FILES)} file, '
        'no bag/'
    )


def _truth_folder(folder: Path) -> Path:
    """Ground truth lies beside the bag's files, or beside the folder `bag/` that holds them."""
    return folder.resolve().parent if folder.resolve().name == 'bag' else folder


@contextmanager
def _opened(bag: Path) -> Iterator[AnyReader]:
    """Return the bag, open."""
    try:
        reader = AnyReader([bag], default_typestore=STORE)
        reader.open()
    except Exception as error:  # a damaged file fails in as many ways as the formats have parts
        raise _damaged(bag, error) from None
    try:
        yield reader
    finally:
        reader.close()


def _messages(
    bag: Path, reader: AnyReader, connections: list[Connection]
) -> Iterator[tuple[int, str, str, object]]:
    """
    Yield (stamp_ns, topic, message type, message) of some connections.

    In the bag's order, all of them or an error.
    """
    left = sum(c.msgcount for c in connections)
    stream = reader.messages(connections=connections)
    while True:
        try:
            connection, recorded, raw = next(stream)
            message = reader.deserialize(raw, connection.msgtype)
            message = message if reader.is2 else _as_ros2(message)
        except StopIteration:
            break
        except Exception as error:  # as above
            raise _damaged(bag, error) from None
        stamp = message.header.stamp.sec * 10**9 + message.header.stamp.nanosec
        left -= 1
        yield stamp or recorded, connection.topic, connection.msgtype, message
    if left > 0:
        raise RecordingError(
            f'{bag} ends early: {left} of its messages are missing; copy or record it again'
        )


def _as_ros2(message):
    """
    Return a ROS 1 message of `rosbags` in its ROS 2 form.

    CameraInfo's D K R P in small letters, no header.seq.
    """
    if not hasattr(message, '__msgtype__'):
        return message
    ros2 = STORE.types[message.__msgtype__]
    names = [field.name for field in fields(ros2) if field.init]
    values = (getattr(message, name if hasattr(message, name) else name.upper()) for name in names)
    return ros2(*map(_as_ros2, values))


def _read_tum(file: Path) -> tuple[Tensor, Tensor]:
    stamps, rows = [], []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith('#'):
            continue
        try:
            seconds, _, fraction = words[0].partition('.')
            # As a float, a stamp of today has lost its last 200 nanoseconds.
            stamps.append(int(seconds) * 10**9 + int(fraction[:9].ljust(9, '0')))
            row = [float(word) for word in words[1:]]
            if len(row) != 7:
                raise ValueError
        except ValueError:
            raise RecordingError(
                f"{file}, line {number}: 'seconds tx ty tz qx qy qz qw' is expected"
            ) from None
        rows.append(row)
    return torch.tensor(stamps, dtype=torch.int64), torch.tensor(
        rows, dtype=torch.float64
    ).reshape(-1, 7)


def _damaged(bag: Path, error: Exception) -> RecordingError:
    if isinstance(error, PermissionError):
        return RecordingError(f'{bag} may not be read: permission denied')
    return RecordingError(
        f'{bag} is damaged or truncated ({_first_line(error)}); copy or record it again'
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
