"""Camera images of any usual encoding as grey pictures."""

from __future__ import annotations

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


def decode_compressed(data) -> np.ndarray:
    """
    Return the grey picture (H, W) uint8 of a JPEG or PNG file's bytes.

    Such as a sensor_msgs/CompressedImage carries them.

    Pixels stay where the file has them: an orientation mark is ignored, for the calibration does
    not know of it. Raises ValueError, one sentence, where the bytes are no picture or are cut
    short.
    """
    data = bytes(data)
    # OpenCV fills what is missing with grey and says nothing, so the end marks are looked for
    # here.
    for begin, end, name in ((b'\xff\xd8', b'\xff\xd9', 'JPEG'), (b'\x89PNG', b'IEND', 'PNG')):
        if data.startswith(begin) and end not in data:
            raise ValueError(f'the compressed image is cut short: its {name} data has no end')
    keep = cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), keep) if data else None
    except cv2.error:
        image = None
    if image is None or image.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"the compressed image's {len(data)} bytes are not a JPEG or PNG picture")
    return _eight_bit(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) if image.ndim == 3 else image)


def _eight_bit(grey: np.ndarray) -> np.ndarray:
    if grey.dtype == np.uint8:
        return grey
    return ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)
