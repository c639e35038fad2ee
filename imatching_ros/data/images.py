"""Camera images of any usual encoding as grey pictures."""

from __future__ import annotations

import re

import cv2
import numpy as np

#: Encodings of sensor_msgs/Image: bytes per sample, samples per pixel, OpenCV's conversion to
#: grey. OpenCV names a Bayer pattern after its second row and column, ROS after its first.
ENCODINGS = {
    'mono8': (1, 1, None),
    'mono16': (2, 1, None),
    'rgb8': (1, 3, cv2.COLOR_RGB2GRAY),
    'bgr8': (1, 3, cv2.COLOR_BGR2GRAY),
    'rgba8': (1, 4, cv2.COLOR_RGBA2GRAY),
    'bgra8': (1, 4, cv2.COLOR_BGRA2GRAY),
    'yuv422': (1, 2, cv2.COLOR_YUV2GRAY_UYVY),
    'uyvy': (1, 2, cv2.COLOR_YUV2GRAY_UYVY),
    'yuv422_yuy2': (1, 2, cv2.COLOR_YUV2GRAY_YUY2),
    'yuyv': (1, 2, cv2.COLOR_YUV2GRAY_YUY2),
    'bayer_rggb8': (1, 1, cv2.COLOR_BayerBG2GRAY),
    'bayer_bggr8': (1, 1, cv2.COLOR_BayerRG2GRAY),
    'bayer_gbrg8': (1, 1, cv2.COLOR_BayerGR2GRAY),
    'bayer_grbg8': (1, 1, cv2.COLOR_BayerGB2GRAY),
    'bayer_rggb16': (2, 1, cv2.COLOR_BayerBG2GRAY),
    'bayer_bggr16': (2, 1, cv2.COLOR_BayerRG2GRAY),
    'bayer_gbrg16': (2, 1, cv2.COLOR_BayerGR2GRAY),
    'bayer_grbg16': (2, 1, cv2.COLOR_BayerGB2GRAY),
}

PIXELS = 1 << 27  #: of the largest compressed picture that is decoded: a short file may claim more

# A JPEG is a row of segments. A marker may be filled up with 0xff; 0xff 0x00 is none.
_MARKER = re.compile(rb'\xff+([^\x00\xff])')
_BARE = {0x01, *range(0xD0, 0xD8)}  # markers of no segment
_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of the segment with the size


def decode_image(
    encoding: str, height: int, width: int, step: int, data, is_bigendian: bool = False
) -> np.ndarray:
    """
    Return the grey picture (height, width) uint8 of a sensor_msgs/Image's fields.

    `data` is any buffer of bytes; `step` is a row's length in bytes, padding included. Colours are
    weighed as OpenCV weighs them; of YUV the luma is taken as it is. 16-bit values v are full
    scale at 65535 and become round(v / 257). Raises ValueError, one sentence, for an unknown
    encoding, an empty image or too few bytes.
    """
    if encoding not in ENCODINGS:
        raise ValueError(
            f"image encoding '{encoding}' is not supported; use one of {', '.join(ENCODINGS)}"
        )
    size, channels, to_grey = ENCODINGS[encoding]
    if height <= 0 or width <= 0:
        raise ValueError(f'the image is empty: its size is {width}x{height}')
    row = width * channels * size
    if step < row:
        raise ValueError(
            f"the image's step is {step} bytes, a row of {width} pixels in {encoding} has {row}"
        )
    flat = np.frombuffer(data, np.uint8)
    if len(flat) < step * height:
        raise ValueError(
            f'the image has {len(flat)} bytes, {height} rows of {step} bytes need {step * height}'
        )
    if encoding.startswith('bayer') and min(height, width) < 4:
        raise ValueError(f'a Bayer image needs 4x4 pixels or more, this one has {width}x{height}')
    rows = np.ascontiguousarray(flat[:step * height].reshape(height, step)[:, :row])
    if size == 2:
        rows = rows.view('>u2' if is_bigendian else '<u2').astype(np.uint16)
    if channels > 1:
        rows = rows.reshape(height, width, channels)
    return _eight_bit(rows if to_grey is None else cv2.cvtColor(rows, to_grey))


def compressed_size(data) -> tuple[int, int]:
    """
    Return (height, width) that a JPEG or PNG file's bytes claim, without decoding them.

    Raises ValueError, one sentence, where they are neither.
    """
    data = bytes(data)
    if data.startswith(b'\x89PNG\r\n\x1a\n') and data[12:16] == b'IHDR' and len(data) >= 24:
        return int.from_bytes(data[20:24], 'big'), int.from_bytes(data[16:20], 'big')
    at = 2 if data.startswith(b'\xff\xd8') else len(data)
    while found := _MARKER.search(data, at):
        marker, at = found[1][0], found.end()
        if marker in _FRAME and at + 7 <= len(data):
            return int.from_bytes(data[at + 3:at + 5], 'big'), int.from_bytes(
                data[at + 5:at + 7], 'big'
            )
        if marker not in _BARE:
            at += max(int.from_bytes(data[at:at + 2], 'big'), 2)
    raise ValueError(f"the compressed image's {len(data)} bytes are not a JPEG or PNG picture")


def decode_compressed(data) -> np.ndarray:
    """
    Return the grey picture (H, W) uint8 of a JPEG or PNG file's bytes.

    Such as a sensor_msgs/CompressedImage carries them.

    Pixels stay where the file has them: an orientation mark is ignored, for the calibration does
    not know of it. Raises ValueError, one sentence, where the bytes are no picture, are cut short
    or claim more than ``PIXELS``.
    """
    data = bytes(data)
    height, width = compressed_size(data)
    if height * width > PIXELS:
        raise ValueError(
            f'the compressed image claims to be {width}x{height}; more than {PIXELS} pixels are '
            'not decoded'
        )
    # OpenCV fills what is missing with grey and says nothing, and makes room for all that a PNG's
    # chunk claims to hold, so the ends are looked for here.
    at = 8
    while data.startswith(b'\x89') and at < len(data) and data[at + 4:at + 8] != b'IEND':
        at += 12 + int.from_bytes(data[at:at + 4], 'big')
    if at >= len(data) or data.startswith(b'\xff') and b'\xff\xd9' not in data:
        raise ValueError('the compressed image is cut short: its data has no end')
    keep = cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), keep)
    except cv2.error:
        image = None
    if (
        image is None
        or image.shape[:2] != (height, width)
        or image.dtype not in (np.uint8, np.uint16)
    ):
        raise ValueError(
            f"the compressed image's {len(data)} bytes are not a whole JPEG or PNG picture"
        )
    return _eight_bit(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) if image.ndim == 3 else image)


def _eight_bit(grey: np.ndarray) -> np.ndarray:
    if grey.dtype == np.uint8:
        return grey
    return ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)
