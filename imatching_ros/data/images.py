"""Camera images of any usual encoding as grey pictures."""

from __future__ import annotations

import io
import re

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

#: Encodings of sensor_msgs/Image: type of a sample, samples per pixel, OpenCV's conversion to
#: grey. OpenCV names a Bayer pattern after its second row and column, ROS after its first.
ENCODINGS = {
    'mono8': ('u1', 1, None),
    'mono16': ('u2', 1, None),
    'rgb8': ('u1', 3, cv2.COLOR_RGB2GRAY),
    'bgr8': ('u1', 3, cv2.COLOR_BGR2GRAY),
    'rgba8': ('u1', 4, cv2.COLOR_RGBA2GRAY),
    'bgra8': ('u1', 4, cv2.COLOR_BGRA2GRAY),
    'rgb16': ('u2', 3, cv2.COLOR_RGB2GRAY),
    'bgr16': ('u2', 3, cv2.COLOR_BGR2GRAY),
    'rgba16': ('u2', 4, cv2.COLOR_RGBA2GRAY),
    'bgra16': ('u2', 4, cv2.COLOR_BGRA2GRAY),
    '8UC1': ('u1', 1, None),
    '8UC3': ('u1', 3, cv2.COLOR_BGR2GRAY),
    '8UC4': ('u1', 4, cv2.COLOR_BGRA2GRAY),
    '16UC1': ('u2', 1, None),
    '16UC3': ('u2', 3, cv2.COLOR_BGR2GRAY),
    '16UC4': ('u2', 4, cv2.COLOR_BGRA2GRAY),
    '16SC1': ('i2', 1, None),
    '32FC1': ('f4', 1, None),
    'bayer_rggb8': ('u1', 1, cv2.COLOR_BayerBG2GRAY),
    'bayer_bggr8': ('u1', 1, cv2.COLOR_BayerRG2GRAY),
    'bayer_gbrg8': ('u1', 1, cv2.COLOR_BayerGR2GRAY),
    'bayer_grbg8': ('u1', 1, cv2.COLOR_BayerGB2GRAY),
    'bayer_rggb16': ('u2', 1, cv2.COLOR_BayerBG2GRAY),
    'bayer_bggr16': ('u2', 1, cv2.COLOR_BayerRG2GRAY),
    'bayer_gbrg16': ('u2', 1, cv2.COLOR_BayerGR2GRAY),
    'bayer_grbg16': ('u2', 1, cv2.COLOR_BayerGB2GRAY),
}
#: Of YUV only the luma is taken. Packed: the place of the luma in each pixel's two bytes.
PACKED = {
    'yuv422': 1, 'uyvy': 1, 'vyuy': 1, 'yuv422_uyvy': 1,
    'yuv422_yuy2': 0, 'yuyv': 0, 'yuy2': 0, 'yvyu': 0,
}
#: Planar, the luma first: rows of all planes together for each row of the image.
PLANAR = {
    'nv12': 1.5, 'nv21': 1.5, 'i420': 1.5, 'yuv420': 1.5, 'yv12': 1.5,
    'nv16': 2.0, 'nv61': 2.0, 'nv24': 3.0, 'nv42': 3.0,
}
_KNOWN = {name.lower(): name for name in (*ENCODINGS, *PACKED, *PLANAR)}

PIXELS = 1 << 27  #: of the largest compressed picture that is decoded: a short file may claim more
FORMATS = ('TIFF', 'WEBP', 'BMP', 'PPM')  #: that are read beside JPEG and PNG
_PICTURE = 'JPEG, PNG, TIFF, WebP, BMP or PNM picture'

# A JPEG is a row of segments. A marker may be filled up with 0xff; 0xff 0x00 is none.
_MARKER = re.compile(rb'\xff+([^\x00\xff])')
_BARE = {0x01, *range(0xD0, 0xD8)}  # markers of no segment
_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of the segment with the size
_SCAN, _END = 0xDA, b'\xff\xd9'

WHOLE = (0.0, 65535.0)  #: the range of 16 bits
SMALL = 0.25  #: values that fill less of it than this are stretched
QUANTILES = (1.0, 99.0)  #: percent of the pixels; single hot or dead ones must not matter
MARGIN = 0.15  #: share of what lies between them that is kept free on either side
FLAT = 256.0  #: values of 16 bits are never stretched further than one to one
PACE = 0.02  #: share of the way to each image's own range that the range in use goes
STEP = 0.01  #: and at most this share of itself
FIRST = 10  #: images whose mean range is in use at first
SAMPLES = 1 << 16  #: pixels, about, from which a range is taken


class Greys:
    """
    The values of one camera's 16-bit or float images as eight bits, the same from image to image.

    Where 16-bit values fill a good part of their range they become round(v / 257). Those of 12-
    and 14-bit and of thermal cameras do not: what lies between two of their quantiles, and a
    margin, fills the eight bits. That range follows the images so slowly that no image differs
    visibly in brightness from the one before, and depends on nothing but the images so far.
    """

    def __init__(self) -> None:
        self._range: np.ndarray | None = None
        self._images = 0

    def __call__(self, grey: np.ndarray) -> np.ndarray:
        """Return an image (H, W) as uint8; ValueError where it holds no finite number."""
        if grey.dtype == np.uint8:
            return grey
        low, high = self._next(_range_of(grey))
        if grey.dtype.kind == 'f':
            grey = np.nan_to_num(grey, nan=low, posinf=high, neginf=low)
        scaled = (grey.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low))
        return np.clip(scaled + np.float32(0.5), 0, 255).astype(np.uint8)

    def _next(self, own: np.ndarray) -> np.ndarray:
        """Return the range (2,) in use once an image has come whose own is this."""
        self._images += 1
        if self._range is None:
            self._range = own
        elif self._images <= FIRST:
            self._range = self._range + (own - self._range) / self._images
        else:
            most = STEP * (self._range[1] - self._range[0])
            self._range = self._range + np.clip(PACE * (own - self._range), -most, most)
        return self._range


def _range_of(grey: np.ndarray) -> np.ndarray:
    """Return the values (2,) of an image (H, W) that are to become black and white."""
    step = max(1, int((grey.size / SAMPLES) ** 0.5))
    some = grey[::step, ::step]
    if grey.dtype.kind == 'f':
        some = some[np.isfinite(some)]
        if not some.size:
            raise ValueError('the image holds no finite number')
    low, high = np.percentile(some, QUANTILES)
    if grey.dtype == np.uint16 and high - low >= SMALL * (WHOLE[1] - WHOLE[0]):
        return np.array(WHOLE)
    least = FLAT if grey.dtype.kind != 'f' else max(1e-3 * max(abs(low), abs(high)), 1e-6)
    middle, half = (low + high) / 2, max((0.5 + MARGIN) * (high - low), least / 2)
    if grey.dtype == np.uint16:
        middle = min(max(middle, half), WHOLE[1] - half)
    return np.array([middle - half, middle + half])


def _eight_bit(grey: np.ndarray, greys: Greys | None) -> np.ndarray:
    if grey.dtype == np.uint16 and greys is None:
        return ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return (greys or Greys())(grey)


def decode_image(
    encoding: str, height: int, width: int, step: int, data, is_bigendian: bool = False,
    greys: Greys | None = None,
) -> np.ndarray:
    """
    Return the grey picture (height, width) uint8 of a sensor_msgs/Image's fields.

    ``data`` is any buffer of bytes; ``step`` is a row's length in bytes, padding included. Colours
    are weighed as OpenCV weighs them; of YUV the luma is taken as it is. ``greys`` brings values
    of more than eight bits to eight: give the same one for all images of a camera; without it,
    16-bit values v become round(v / 257). Raises ValueError, one sentence, for an unknown
    encoding, an empty image or too few bytes.
    """
    name = _KNOWN.get(encoding.strip().lower())
    if name is None:
        raise ValueError(
            f"image encoding '{encoding}' is not supported; use one of "
            f'{", ".join(_KNOWN.values())}'
        )
    kind, channels, to_grey = ENCODINGS.get(name, ('u1', 2 if name in PACKED else 1, None))
    if height <= 0 or width <= 0:
        raise ValueError(f'the image is empty: its size is {width}x{height}')
    flat, planes = np.frombuffer(data, np.uint8), PLANAR.get(name, 1.0)
    if planes > 1.0 and step == int(width * planes) and len(flat) < step * height * planes:
        step = width  # of all planes together, as some drivers have it
    row = width * channels * np.dtype(kind).itemsize
    if step < row:
        raise ValueError(
            f"the image's step is {step} bytes, a row of {width} pixels in {encoding} has {row}"
        )
    rows = int(height * planes)
    if len(flat) < step * rows:
        raise ValueError(
            f'the image has {len(flat)} bytes, {rows} rows of {step} bytes need {step * rows}'
        )
    if name.startswith('bayer') and min(height, width) < 4:
        raise ValueError(f'a Bayer image needs 4x4 pixels or more, this one has {width}x{height}')
    image = np.ascontiguousarray(flat[:step * height].reshape(height, step)[:, :row])
    if kind != 'u1':
        image = image.view(('>' if is_bigendian else '<') + kind).astype(kind)
    if channels > 1:
        image = image.reshape(height, width, channels)
    if name in PACKED:
        return np.ascontiguousarray(image[..., PACKED[name]])
    return _eight_bit(image if to_grey is None else cv2.cvtColor(image, to_grey), greys)


def compressed_size(data) -> tuple[int, int]:
    """
    Return (height, width) that the bytes of a picture's file claim, without decoding them.

    Raises ValueError, one sentence, where they are no picture of a kind that is read here.
    """
    data = bytes(data)
    if data.startswith(b'\x89PNG\r\n\x1a\n') and data[12:16] == b'IHDR' and len(data) >= 24:
        return int.from_bytes(data[20:24], 'big'), int.from_bytes(data[16:20], 'big')
    for marker, at in _segments(data):
        if marker in _FRAME and at + 7 <= len(data):
            return int.from_bytes(data[at + 3:at + 5], 'big'), int.from_bytes(
                data[at + 5:at + 7], 'big'
            )
    if not data.startswith(b'\xff\xd8'):
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                return picture.height, picture.width
        except Image.DecompressionBombError as error:
            raise ValueError(f'the compressed image claims to be a giant: {error}') from None
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError):
            pass
    raise ValueError(f"the compressed image's {len(data)} bytes are not a {_PICTURE}")


def _segments(data: bytes):
    """Yield the marker of each segment of a JPEG file, and where the segment begins."""
    at = 2 if data.startswith(b'\xff\xd8') else len(data)
    while found := _MARKER.search(data, at):
        marker, at = found[1][0], found.end()
        yield marker, at
        if marker not in _BARE:
            at += max(int.from_bytes(data[at:at + 2], 'big'), 2)


def decode_compressed(data, greys: Greys | None = None) -> np.ndarray:
    """
    Return the grey picture (H, W) uint8 of the bytes of a picture's file.

    A sensor_msgs/CompressedImage carries such: JPEG, PNG, TIFF, WebP, BMP or PNM. Pixels stay
    where the file has them: an orientation mark is ignored, for the calibration does not know of
    it. ``greys`` is as for :func:`decode_image`. Raises ValueError, one sentence, where the bytes
    are no picture, are cut short or claim more than ``PIXELS``.
    """
    data = bytes(data)
    height, width = compressed_size(data)
    if height * width > PIXELS:
        raise ValueError(
            f'the compressed image claims to be {width}x{height}; more than {PIXELS} pixels are '
            'not decoded'
        )
    image = _decoded(_whole(data))
    if (
        image is None
        or image.shape[:2] != (height, width)
        or image.dtype not in (np.uint8, np.uint16, np.int16, np.float32)
    ):
        raise ValueError(
            f"the compressed image's {len(data)} bytes are not a whole {_PICTURE}"
        )
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) if image.ndim == 3 else image
    return _eight_bit(grey, greys)


def _whole(data: bytes) -> bytes:
    """
    Return the file with its end, where that alone is missing; ValueError where more is.

    OpenCV fills what is missing with grey, or leaves it black, and says nothing.
    """
    short = ValueError('the compressed image is cut short: its data has no end')
    if data.startswith(b'\x89'):  # OpenCV makes room for all that a chunk claims to hold
        at = 8
        while at < len(data) and data[at + 4:at + 8] != b'IEND':
            at += 12 + int.from_bytes(data[at:at + 4], 'big')
        if at >= len(data):
            raise short
    elif data.startswith(b'\xff\xd8'):
        scan = next((at for marker, at in _segments(data) if marker == _SCAN), len(data))
        if _END not in data[scan:]:
            # A decoder that has all of the picture does not look at what follows
            data = data.rstrip(b'\xff')  # the end's first half
            one, other = (data + filling * 64 + _END for filling in (b'\x00\x00', b'\xaa\x55'))
            decoded, twin = _decoded(one), _decoded(other)
            if scan == len(data) or decoded is None or not np.array_equal(decoded, twin):
                raise short
            return one
    else:
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                picture.load()
        except (OSError, ValueError, SyntaxError, EOFError):
            raise short from None
    return data


def _decoded(data: bytes) -> np.ndarray | None:
    keep = cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), keep)
    except cv2.error:
        return None
