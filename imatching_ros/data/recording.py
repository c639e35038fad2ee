"""One camera's images in a bag of any kind, with the ground truth that may lie beside them."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
import contextlib
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
import re
from textwrap import shorten
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from .bags import Bag, BAG_FILES, is_part, Message
from .cameras import Given, given_camera, HOW, rectified_images
from .images import compressed_size, decode_compressed, decode_image, Greys
from .sieve import BROKEN, LOST, Sieve
from .stamps import goes_on
from .storage import Channel, RecordingError
from ..files import read_tum
from ..geometry.camera import Camera, FOLLOWED_PX, unclear

__all__ = ['BAG_FILES', 'open_recording', 'Recording', 'RecordingError']

IMAGE, COMPRESSED = 'sensor_msgs/msg/Image', 'sensor_msgs/msg/CompressedImage'
CAMERA_INFO, POSE = 'sensor_msgs/msg/CameraInfo', 'geometry_msgs/msg/PoseStamped'
KINDS = {'raw': IMAGE, 'compressed': COMPRESSED}
ENCODINGS = ('cdr', 'ros1')  #: of messages that can be read


@dataclass(frozen=True)
class Recording:
    """
    One camera's images in a bag, in the bag's order.

    Iterating yields ``(stamp_ns, image)``, image (H, W) uint8 grey, any number of times. A stamp
    is the message's header's, or the time of recording where the clock of the headers does not
    run; stamps grow from image to image. Images that cannot be used, broken ones and those with
    stamps that do not go on, are left out and counted. Raises RecordingError where no image can be
    used, or where the first is of another size than the camera.
    """

    bag: Path  #: the bag's folder or file
    folder: Path  #: where `depth/` and `groundtruth.txt` are, if they are
    camera: Camera  #: of the first camera_info that can be used, or the one that was given
    image_topic: str
    camera_info_topic: str  #: empty where the camera was given
    transport: str  #: "raw" (sensor_msgs/Image) or "compressed" (sensor_msgs/CompressedImage)
    count: int  #: images in the bag, as it says itself; some of them may be left out
    _bag: Bag = field(repr=False)
    _header_clock: bool = field(repr=False)  #: whether the clock of the images' headers runs
    _rectified: bool = field(default=False, repr=False)  #: whether cameras are those of P
    _said: tuple[str, ...] = field(default=(), repr=False)  #: of the camera, for the user
    _sieve: Sieve = field(default_factory=Sieve, repr=False)
    _cameras: list[tuple[int, Camera]] = field(default_factory=list, repr=False)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        greys = Greys()

        def decode(message: Any) -> np.ndarray:
            if self.transport == 'compressed':
                return decode_compressed(message.data, greys)
            return decode_image(
                message.encoding, message.height, message.width, message.step, message.data,
                message.is_bigendian, greys,
            )

        def other_size(number: int, has: str) -> str:
            return (
                f'image {number} of {self.image_topic} in {self.bag} is {has}, but '
                f'{self.camera_info_topic} is for {self.camera.width}x{self.camera.height}; '
                'choose the camera_info of this camera with --camera-info-topic'
            )

        images = self._images()
        if not (yield from self._sieve.pictures(images, decode, self.camera_of, other_size)):
            raise self._unusable()

    def messages(self) -> Iterator[tuple[int, str, Any]]:
        """
        Yield (stamp ns, "image" or "camera", message) in the bag's order.

        An image is a message of ``rosbags`` with ROS 2's field names, also where the bag is of ROS
        1, and its stamp goes on from the one before. A camera is a Camera: one before the first
        image, another whenever the calibration has changed.
        """
        told = None
        for _, stamp, message in self._images():
            if (camera := self.camera_of(stamp)) != told:
                yield stamp, 'camera', camera
            told = camera
            yield stamp, 'image', message

    @property
    def left_out(self) -> Counter[str]:
        """Return how many images were left out so far, by the reason in words."""
        return self._sieve.counts

    def notes(self) -> list[str]:
        """Return what the user should know of the recording, one sentence each."""
        notes = [*self._bag.notes(), *self._said]
        cameras = [camera for _, camera in self._cameras]
        others = sum(not b.goes_on_from(a) for a, b in pairwise(cameras))
        if others:
            notes.append(
                f'{self.camera_info_topic} changed {others} times by more than {FOLLOWED_PX:g} '
                'px: each time a map was begun anew'
            )
        if not self._header_clock:
            notes.append(
                f'the clock of the headers of {self.image_topic} does not run, so the time of '
                'recording is used'
            )
        if left_out := self._sieve.sentence(self.count):
            notes.append(f'{self.bag}: {left_out}')
        return notes

    def camera_of(self, stamp: int) -> Camera:
        """Return the camera that was in force for an image that was yielded."""
        number = bisect_right(self._cameras, stamp, key=lambda entry: entry[0])
        return self._cameras[number - 1][1] if number else self.camera

    @cached_property
    def ground_truth(self) -> tuple[Tensor, Tensor] | None:
        """
        Stamps (N,) int64, ns, and T_world_camera (N, 7) float64, or None where there are none.

        They are from the bag's topic of PoseStamped that has "ground" and "truth" in its name,
        else from ``groundtruth.txt`` (TUM: seconds tx ty tz qx qy qz qw). Poses that are not
        finite are left out, and those of a topic whose stamps do not go on.
        """
        topics = sorted(
            channel.topic for channel in _filled(self._bag, POSE)
            if 'ground' in channel.topic.lower() and 'truth' in channel.topic.lower()
        )
        stamps, rows = [], []
        if topics:
            channels = _filled(self._bag, POSE, topics[0])
            running = _clock_runs(self._bag, channels)
            poses = (
                (0, message.stamp if running else message.recorded, message.content.pose)
                for message in self._bag.messages(channels) if message.content is not None
            )
            for _, stamp, pose in Sieve().in_time(poses):
                p, q = pose.position, pose.orientation
                stamps.append(stamp)
                rows.append((p.x, p.y, p.z, q.x, q.y, q.z, q.w))
        elif (file := self.folder / 'groundtruth.txt').is_file():
            try:
                stamps, rows = read_tum(file)
            except ValueError as error:
                raise RecordingError(str(error)) from None
        else:
            return None
        times = torch.as_tensor(stamps, dtype=torch.int64)
        poses = torch.as_tensor(rows, dtype=torch.float64).reshape(-1, 7)
        good = poses.isfinite().all(-1) & (poses[:, 3:].norm(dim=-1) > 0)
        return (times[good], poses[good]) if good.any() else None

    def depth(self, stamp: int) -> np.ndarray | None:
        """
        Return the depth of the image of this stamp, or None where it has none.

        It is (H, W) float32 along the optical axis, metres, 0 where unknown; from ``depth/<stamp
        in ns>.npz`` (array ``depth``), ``.npy``, or 16-bit ``.png`` in millimetres. Raises
        RecordingError where that file is broken or of another size.
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

    def _images(self) -> Iterator[tuple[int, int, Any]]:
        """Yield (number, stamp ns, message) of the images whose stamps go on."""
        number = None
        for number, stamp, (camera, message) in self._sieve.in_time(self._read()):
            if not self._cameras or stamp < self._cameras[-1][0]:  # from the start again
                self._cameras[:] = [(stamp, camera)]
            elif camera != self._cameras[-1][1]:
                self._cameras.append((stamp, camera))
            yield number, stamp, message
        if number is None:
            raise self._unusable()

    def _unusable(self) -> RecordingError:
        return RecordingError(
            f'no image on {self.image_topic} in {self.bag} can be used: '
            f'{self._sieve.sentence(self.count)}'
        )

    def _read(self) -> Iterator[tuple[int, int, tuple[Camera, Any]]]:
        """Yield (number, stamp ns, (camera in force, message)) of the images that can be read."""
        images = _filled(self._bag, KINDS[self.transport], self.image_topic)
        infos = _filled(self._bag, CAMERA_INFO, self.camera_info_topic)
        camera, number = self.camera, -1
        for message in self._bag.messages(images + infos):
            if message.topic == self.camera_info_topic:
                with contextlib.suppress(ValueError):  # one that cannot be used changes nothing
                    camera = _camera(message, self._rectified)
                continue
            number += 1
            if message.content is None:
                self._sieve.leave_out(number, BROKEN, 'its message is cut short')
                continue
            stamp = message.stamp if self._header_clock else message.recorded
            yield number, stamp, (camera, message.content)
        for lost in range(number + 1, self.count):
            self._sieve.leave_out(lost, LOST)


def open_recording(
    path: Path | str, image_topic: str | None = None, camera_info_topic: str | None = None,
    camera: Given | None = None, rectified: str = 'auto',
) -> Recording:
    """
    Open a bag's file, a folder of the files of one recording, or one that holds these in ``bag/``.

    Where the bag has one image topic it is taken, else ``image_topic`` must choose.
    ``camera_info_topic`` is by default the one beside the image topic (``/camera/image_raw`` has
    ``/camera/camera_info``), else the bag's only one; where ``camera`` is given
    (``cameras.given_camera``) none is needed. ``rectified``: "always", "never", or "auto", which
    reads it from the image topic's name. Raises RecordingError, one sentence: no such path, no bag
    there, nothing in it that can be read, no images, several image topics and none chosen, no
    camera_info, an uncalibrated camera.
    """
    bag = Bag(Path(path))
    image_topic, kind = _choose_image(bag, image_topic)
    always, said = rectified_images(rectified, image_topic), []
    images = _filled(bag, kind, image_topic)
    if camera is not None:
        camera, camera_info_topic = _given_camera(bag, images, camera, always), ''
    else:
        camera_info_topic = _choose_info(bag, camera_info_topic, image_topic)
        camera, info = _first_camera(bag, camera_info_topic, always)
        apart = unclear(info, image_topic) if rectified == 'auto' else None
        if apart is not None:
            said.append(
                f'the images of {image_topic} are taken as raw, by K and D of '
                f'{camera_info_topic}; by P pixels lie up to {apart:.0f} px elsewhere: if they '
                'are rectified, say --rectified always, else --rectified never'
            )
    said += [f'the camera of {image_topic} is odd: {doubt}' for doubt in camera.doubts()]
    return Recording(
        bag.path, bag.folder, camera, image_topic, camera_info_topic,
        'raw' if kind == IMAGE else 'compressed',
        sum(bag.channels[channel] for channel in images), bag, _clock_runs(bag, images), always,
        tuple(said),
    )


def _filled(bag: Bag, kind: str, topic: str | None = None) -> list[Channel]:
    """Return the channels of one type, and perhaps of one topic, that hold readable messages."""
    return [
        channel for channel, count in bag.channels.items()
        if count and channel.kind == kind and channel.encoding in ENCODINGS
        and topic in (None, channel.topic)
    ]


def _clock_runs(bag: Bag, channels: list[Channel]) -> bool:
    """Return whether the stamps in the headers ever go on from one message to the next."""
    stamps = (message.stamp for message in bag.messages(channels) if message.content is not None)
    before = first = next(stamps, 0)
    for stamp in stamps:
        if goes_on(before, stamp):
            return True
        before, first = stamp, 0
    return first > 0  # of a single one


def _camera(info: Message, rectified: bool) -> Camera:
    """Return the camera of a camera_info; ValueError where it cannot be used."""
    if info.content is None:
        raise ValueError('its message is cut short')
    return Camera.from_camera_info(info.content, rectified)


def _first_camera(bag: Bag, topic: str, rectified: bool) -> tuple[Camera, Any]:
    """Return the camera of the first camera_info that can be used, and that message."""
    refusal = None
    for message in bag.messages(_filled(bag, CAMERA_INFO, topic)):
        try:
            return _camera(message, rectified), message.content
        except ValueError as error:
            refusal = refusal or error
    raise RecordingError(f'{topic} in {bag.path}: {refusal or "no message can be read"}')


def _given_camera(bag: Bag, images: list[Channel], given: Given, rectified: bool) -> Camera:
    """Return the camera that the user gives, for images of the size of the first."""
    refusal = None
    for message in bag.messages(images):
        if (image := message.content) is None:
            continue
        try:
            height, width = (
                compressed_size(image.data) if images[0].kind == COMPRESSED
                else (image.height, image.width)
            )
        except ValueError as error:  # a broken picture
            refusal = refusal or error
            continue
        try:
            return given_camera(given, width, height, rectified, images[0].topic)
        except ValueError as error:
            raise RecordingError(f'the camera given for {bag.path}: {error}') from None
    raise RecordingError(
        f'no image on {images[0].topic} in {bag.path} can be used: '
        f'{refusal or "no message can be read"}'
    )


def _choose_image(bag: Bag, wanted: str | None) -> tuple[str, str]:
    """Return the topic of the images, and their type."""
    images = {c.topic: c.kind for kind in (COMPRESSED, IMAGE) for c in _filled(bag, kind)}
    if not images:
        raise RecordingError(_no_images(bag))
    listed = ', '.join(sorted(images))
    if wanted is not None:
        wanted = wanted if wanted in images else f'{wanted.rstrip("/")}/compressed'
        if wanted not in images:
            wanted = wanted.removesuffix('/compressed')
            raise RecordingError(
                f'{bag.path} has no images on {wanted}; --image-topic may be one of {listed}'
            )
        return wanted, images[wanted]
    if len(images) > 1:
        raise RecordingError(
            f'{bag.path} has {len(images)} image topics; choose one with --image-topic: {listed}'
        )
    return next(iter(images.items()))


def _no_images(bag: Bag) -> str:
    filled = sorted(channel for channel, count in bag.channels.items() if count)
    for topic, kind, encoding in filled:
        names = kind if encoding in ENCODINGS else f'{kind} {topic}'
        if not re.search('image|video|ffmpeg|theora', names, re.IGNORECASE):
            continue
        what = 'ROS' if encoding in ENCODINGS else encoding
        return (
            f'{bag.path} has images only as {what} messages '
            f'({shorten(kind or "no type", 80)} on {topic}), which are not read; convert them to '
            'sensor_msgs/msg/Image or CompressedImage'
        )
    have = f'only {", ".join(c.topic for c in filled)}' if filled else 'no messages at all'
    have = f'no images (sensor_msgs Image or CompressedImage), {have}'
    if bag.closed:
        return f'{bag.path} has {have}'
    return f'{bag.path} is damaged or truncated: what is there has {have}; copy it again'


def _choose_info(bag: Bag, wanted: str | None, image_topic: str) -> str:
    infos = sorted({channel.topic for channel in _filled(bag, CAMERA_INFO)})
    if not infos:
        part = bag.path.is_file() and is_part(bag.path)
        raise RecordingError(
            f'{bag.path} has no camera_info (sensor_msgs CameraInfo); '
            + (
                'as part of a split recording it may be in another part: give the folder that '
                f'holds them all, {bag.path.parent}'
                if part
                else f'record it together with the images, or give {HOW}'
            )
        )
    listed = ', '.join(infos)
    if wanted is not None:
        if wanted not in infos:
            raise RecordingError(
                f'{bag.path} has no camera_info on {wanted}; --camera-info-topic may be one of '
                f'{listed}'
            )
        return wanted
    beside = image_topic.removesuffix('/compressed').rpartition('/')[0] + '/camera_info'
    if beside in infos:
        return beside
    if len(infos) > 1:
        raise RecordingError(
            f'{bag.path} has {len(infos)} camera_info topics, none beside {image_topic}; '
            f'choose one with --camera-info-topic: {listed}'
        )
    return infos[0]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
