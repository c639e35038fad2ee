"""Images and cameras as ROS messages, and back: malformed ones raise ValueError."""

from __future__ import annotations

import array
from typing import Any

import numpy as np
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Header

from .stamps import to_header
from ..data.images import compressed_size, decode_compressed, decode_image, Greys
from ..geometry.camera import Camera


def camera_to_info(camera: Camera, head: Header) -> CameraInfo:
    """Return the camera_info of a camera; one without distortion is a plumb_bob of zeros."""
    K = [camera.fx, 0.0, camera.cx, 0.0, camera.fy, camera.cy, 0.0, 0.0, 1.0]
    undistorted = camera.distortion_model == 'none'
    return CameraInfo(
        header=head,
        width=camera.width,
        height=camera.height,
        distortion_model='plumb_bob' if undistorted else camera.distortion_model,
        d=list(camera.distortion) or [0.0] * 5,
        k=K,
        r=[1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0],
        p=[*K[:3], 0.0, *K[3:6], 0.0, *K[6:], 0.0],
    )


def image_size(message: Image | CompressedImage) -> tuple[int, int]:
    """
    Return height and width as the message says them, without decoding what it holds.

    Raises ValueError where a CompressedImage does not say.
    """
    if isinstance(message, CompressedImage):
        return compressed_size(message.data)
    return message.height, message.width


def image_from_message(message: Image | CompressedImage, greys: Greys | None = None) -> np.ndarray:
    """
    Return the grey image (H, W) uint8 of an Image or a CompressedImage.

    greys: as for ``decode_image``, one for all images of a camera. Raises ValueError where the
    message cannot be read.
    """
    if isinstance(message, CompressedImage):
        return decode_compressed(message.data, greys)
    return decode_image(
        message.encoding, message.height, message.width, message.step, message.data,
        bool(message.is_bigendian), greys,
    )


def image_from_camera(
    message: Image | CompressedImage, camera: Camera, greys: Greys
) -> np.ndarray:
    """
    Return the grey image (H, W) uint8 of a message from a camera.

    greys: the camera's. Raises ValueError where the image cannot be read or is not the camera's.
    """
    height, width = image_size(message)
    if (width, height) != (camera.width, camera.height):
        raise ValueError(
            f'the image is {width}x{height}, camera_info says {camera.width}x{camera.height}; '
            'publish the camera_info that belongs to the image'
        )
    return image_from_message(message, greys)


def image_to_message(image: np.ndarray, head: Header) -> Image:
    """Return the message of an image uint8: (H, W) as mono8, (H, W, 3) as rgb8."""
    height, width = image.shape[:2]
    return Image(
        header=head,
        height=height,
        width=width,
        encoding='mono8' if image.ndim == 2 else 'rgb8',
        step=image.nbytes // height,
        data=array.array('B', np.ascontiguousarray(image).tobytes()),
    )


def image_from_recording(message: Any, stamp: int) -> Image | CompressedImage:
    """Return the message to publish of an image that a recording holds, at a stamp in ns."""
    head = to_header(stamp, message.header.frame_id)
    data = array.array('B', message.data.tobytes())
    if message.__msgtype__ == 'sensor_msgs/msg/CompressedImage':
        return CompressedImage(header=head, format=message.format, data=data)
    return Image(
        header=head,
        height=message.height,
        width=message.width,
        encoding=message.encoding,
        is_bigendian=message.is_bigendian,
        step=message.step,
        data=data,
    )
