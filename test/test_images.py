"""Decoding of images, against per-pixel references."""

import resource

import cv2
from hypothesis import given, settings
from hypothesis import strategies as st
from imatching_ros.data.images import (
    compressed_size,
    decode_compressed,
    decode_image,
    ENCODINGS,
    PIXELS,
)
import numpy as np
import pytest

CHANNELS = {'mono': '', 'rgb8': 'rgb', 'bgr8': 'bgr', 'rgba8': 'rgba', 'bgra8': 'bgra'}
WEIGHTS = {'r': 0.299, 'g': 0.587, 'b': 0.114, 'a': 0.0}
seeds = st.integers(0, 2**32 - 1)
sides = st.integers(1, 9)


def packed(samples: np.ndarray, padding: int, big: bool) -> tuple[int, bytes]:
    """Step and bytes of samples (H, W, C), each row followed by padding of arbitrary bytes."""
    rows = [
        row.astype(row.dtype.newbyteorder('>' if big else '<')).tobytes() + b'\xa5' * padding
        for row in samples
    ]
    return len(rows[0]), b''.join(rows)


@settings(max_examples=60, deadline=None)
@given(seeds, sides, sides, st.integers(0, 7), st.sampled_from(['rgb8', 'bgr8', 'rgba8', 'bgra8']))
def test_colour_is_weighed_pixel_by_pixel(seed, height, width, padding, encoding):
    names = CHANNELS[encoding]
    samples = np.random.default_rng(seed).integers(0, 256, (height, width, len(names)), np.uint8)
    step, data = packed(samples, padding, False)
    grey = decode_image(encoding, height, width, step, data)
    assert grey.shape == (height, width) and grey.dtype == np.uint8
    for v in range(height):
        for u in range(width):
            start = v * step + u * len(names)
            expected = sum(WEIGHTS[name] * data[start + k] for k, name in enumerate(names))
            assert abs(int(grey[v, u]) - expected) < 0.51
    assert np.array_equal(
        grey, cv2.cvtColor(samples[..., [names.index(c) for c in 'bgr']], cv2.COLOR_BGR2GRAY)
    )


@settings(max_examples=60, deadline=None)
@given(
    seeds, sides, sides, st.integers(0, 7), st.booleans(), st.sampled_from([np.uint8, np.uint16])
)
def test_mono_keeps_every_pixel_in_its_place(seed, height, width, padding, big, dtype):
    samples = np.random.default_rng(seed).integers(
        0, np.iinfo(dtype).max + 1, (height, width), dtype
    )
    step, data = packed(samples, padding, big)
    grey = decode_image('mono8' if dtype is np.uint8 else 'mono16', height, width, step, data, big)
    for v in range(height):
        for u in range(width):
            value = int(samples[v, u])
            assert grey[v, u] == (value if dtype is np.uint8 else round(value / 257))


def bilinear_grey(mosaic: np.ndarray, pattern: str) -> np.ndarray:
    """
    Grey of a Bayer mosaic without its border.

    Every missing colour is the mean of its nearest neighbours.
    """
    height, width = mosaic.shape
    out = np.zeros((height - 2, width - 2))
    for v in range(1, height - 1):
        for u in range(1, width - 1):
            for colour in 'rgb':
                near = [
                    (abs(dv) + abs(du), float(mosaic[v + dv, u + du]))
                    for dv in (-1, 0, 1) for du in (-1, 0, 1)
                    if pattern[2 * ((v + dv) % 2) + (u + du) % 2] == colour
                ]  # fmt: skip
                nearest = min(distance for distance, _ in near)
                out[v - 1, u - 1] += WEIGHTS[colour] * np.mean(
                    [value for d, value in near if d == nearest]
                )
    return out


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(4, 9), st.integers(4, 9), st.integers(0, 7), st.booleans(),
       st.sampled_from([name for name in ENCODINGS if name.startswith('bayer')]))  # fmt: skip
def test_bayer_is_demosaicked_by_its_own_pattern(seed, height, width, padding, big, encoding):
    dtype = np.uint16 if encoding.endswith('16') else np.uint8
    mosaic = np.random.default_rng(seed).integers(
        0, np.iinfo(dtype).max + 1, (height, width), dtype
    )
    step, data = packed(mosaic, padding, big)
    grey = decode_image(encoding, height, width, step, data, big)
    assert grey.shape == (height, width) and grey.dtype == np.uint8
    expected = bilinear_grey(mosaic, encoding[6:10]) / (257 if dtype is np.uint16 else 1)
    assert np.abs(grey[1:-1, 1:-1] - expected).max() < 1.01


@settings(max_examples=40, deadline=None)
@given(
    seeds, sides, sides, st.integers(0, 7),
    st.sampled_from(['yuv422', 'uyvy', 'yuv422_yuy2', 'yuyv']),
)
def test_yuv_gives_its_luma(seed, height, width, padding, encoding):
    samples = np.random.default_rng(seed).integers(0, 256, (height, 2 * width, 2), np.uint8)
    step, data = packed(samples, padding, False)
    luma = samples[..., 1 if encoding in ('yuv422', 'uyvy') else 0]
    assert np.array_equal(decode_image(encoding, height, 2 * width, step, data), luma)


@pytest.mark.parametrize(
    'wrap', [bytes, bytearray, memoryview, lambda b: np.frombuffer(b, np.uint8)]
)
def test_any_buffer_is_read(wrap):
    assert decode_image('mono8', 2, 3, 3, wrap(bytes(range(6)))).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (('32FC1', 2, 2, 8, bytes(16)), "encoding '32FC1' is not supported; use one of mono8"),
        (('mono8', 0, 2, 2, b''), 'empty'),
        (('mono16', 2, 3, 5, bytes(10)), 'step is 5 bytes, a row of 3 pixels in mono16 has 6'),
        (('rgb8', 2, 2, 6, bytes(11)), 'has 11 bytes, 2 rows of 6 bytes need 12'),
        (('bayer_rggb8', 2, 2, 2, bytes(4)), 'Bayer'),
    ],
)
def test_what_is_wrong_is_said(arguments, words):
    with pytest.raises(ValueError, match=words):
        decode_image(*arguments)


def picture(dtype=np.uint8, channels=3) -> np.ndarray:
    top = np.iinfo(dtype).max
    image = np.random.default_rng(0).integers(0, top + 1, (48, 64, channels)).astype(dtype)
    return image[..., 0] if channels == 1 else image


@pytest.mark.parametrize('channels', [1, 3, 4])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_png_decodes_to_the_grey_of_its_pixels(dtype, channels):
    image = picture(dtype, channels)
    data = cv2.imencode('.png', image)[1].tobytes()
    grey = image if channels == 1 else cv2.cvtColor(image[..., :3].copy(), cv2.COLOR_BGR2GRAY)
    expected = np.rint(grey / 257).astype(np.uint8) if dtype is np.uint16 else grey
    assert np.array_equal(decode_compressed(data), expected)


def test_jpeg_decodes_and_an_orientation_mark_turns_nothing():
    smooth = cv2.GaussianBlur(picture(), (0, 0), 4)
    data = cv2.imencode('.jpg', smooth, [cv2.IMWRITE_JPEG_QUALITY, 98])[1].tobytes()
    grey = decode_compressed(data)
    assert np.abs(grey.astype(int) - cv2.cvtColor(smooth, cv2.COLOR_BGR2GRAY)).max() <= 3
    exif = b'Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0'
    marked = data[:2] + b'\xff\xe1' + (len(exif) + 2).to_bytes(2, 'big') + exif + data[2:]
    # the mark is real
    assert cv2.imdecode(np.frombuffer(marked, np.uint8), cv2.IMREAD_COLOR).shape[:2] == (64, 48)
    assert np.array_equal(decode_compressed(marked), grey)


@pytest.mark.parametrize(
    ('kind', 'how'),
    [
        ('.png', []), ('.jpg', []), ('.jpg', [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]),
        ('.jpg', [cv2.IMWRITE_JPEG_RST_INTERVAL, 2, cv2.IMWRITE_JPEG_OPTIMIZE, 1]),
    ],
)  # fmt: skip
def test_a_file_says_its_size_before_it_is_decoded(kind, how):
    data = cv2.imencode(kind, picture(), how)[1].tobytes()
    assert compressed_size(data) == (48, 64)
    if kind == '.jpg':  # a preview in another segment, filling bytes and a stray restart mark
        small = cv2.imencode(kind, picture()[:8, :8])[1].tobytes()
        segment = b'\xff\xe1' + (len(small) + 2).to_bytes(2, 'big') + small
        data = data[:2] + segment + b'\xff\xd0\xff\xff' + data[2:]
        assert compressed_size(data) == decode_compressed(data).shape == (48, 64)


@pytest.mark.parametrize('kind', ['.jpg', '.png'])
def test_fault_a_file_that_claims_to_be_a_giant_is_not_decoded(kind):
    data = cv2.imencode(kind, picture())[1].tobytes()
    size = b'\x000\x00@' if kind == '.jpg' else b'\x00\x00\x00@\x00\x00\x000'
    assert data.count(size) == 1
    side = (30000).to_bytes(len(size) // 2, 'big')
    data = data.replace(size, 2 * side)
    assert compressed_size(data) == (30000, 30000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=f'claims to be 30000x30000; more than {PIXELS} pixels'):
        decode_compressed(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + (10 << 10)


def test_fault_a_chunk_that_claims_to_be_a_giant_is_not_read():
    data = bytearray(cv2.imencode('.png', picture())[1].tobytes())
    at = data.index(b'IDAT') - 4
    data[at:at + 4] = (3 << 30).to_bytes(4, 'big')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match='cut short'):
        decode_compressed(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + (10 << 10)


@pytest.mark.parametrize('kind', ['.jpg', '.png'])
def test_a_cut_file_is_refused(kind):
    data = cv2.imencode(kind, picture())[1].tobytes()
    with pytest.raises(ValueError, match='cut short'):
        decode_compressed(data[:len(data) * 2 // 3])


@pytest.mark.parametrize('data', [b'', b'no picture at all', b'\xff\xd8\xff\xd9'])
def test_bytes_that_are_no_picture_are_refused(data):
    with pytest.raises(ValueError, match='not a JPEG or PNG'):
        decode_compressed(data)
