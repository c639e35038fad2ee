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
    Greys,
    PIXELS,
)
import numpy as np
import pytest

CHANNELS = {'mono': '', 'rgb8': 'rgb', 'bgr8': 'bgr', 'rgba8': 'rgba', 'bgra8': 'bgra'}
WEIGHTS = {'r': 0.299, 'g': 0.587, 'b': 0.114, 'a': 0.0}
seeds = st.integers(0, 2**32 - 1)
sides = st.integers(1, 9)


def packed(samples: np.ndarray, padding: int, big: bool) -> tuple[int, bytes]:
    """Return step and bytes of samples (H, W, C), each row padded by arbitrary bytes."""
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
    """Return the grey of a Bayer mosaic without its border, from means of the nearest."""
    height, width = mosaic.shape
    out = np.zeros((height - 2, width - 2))
    for v in range(1, height - 1):
        for u in range(1, width - 1):
            for colour in 'rgb':
                near = [
                    (abs(dv) + abs(du), float(mosaic[v + dv, u + du]))
                    for dv in (-1, 0, 1) for du in (-1, 0, 1)
                    if pattern[2 * ((v + dv) % 2) + (u + du) % 2] == colour
                ]
                nearest = min(distance for distance, _ in near)
                out[v - 1, u - 1] += WEIGHTS[colour] * np.mean(
                    [value for d, value in near if d == nearest]
                )
    return out


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(4, 9), st.integers(4, 9), st.integers(0, 7), st.booleans(),
       st.sampled_from([name for name in ENCODINGS if name.startswith('bayer')]))
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


def spelled(name: str) -> st.SearchStrategy[str]:
    """Return a name as it is, and in letters of another size."""
    return st.sampled_from([name, name.upper(), name.lower()])


#: As cv_bridge reads them: the type of a sample, and what each of a pixel's samples weighs.
GENERIC = {
    '8UC1': ('u1', '1'), '8UC3': ('u1', 'bgr'), '8UC4': ('u1', 'bgra'), '16UC1': ('u2', '1'),
    '16UC3': ('u2', 'bgr'), '16UC4': ('u2', 'bgra'), 'rgb16': ('u2', 'rgb'),
    'bgr16': ('u2', 'bgr'), 'rgba16': ('u2', 'rgba'), 'bgra16': ('u2', 'bgra'),
    'BGR8': ('u1', 'bgr'),
}


@settings(max_examples=80, deadline=None)
@given(seeds, sides, sides, st.integers(0, 7), st.booleans(), st.data())
def test_generic_encodings_are_those_of_cv_bridge(seed, height, width, padding, big, data):
    encoding = data.draw(st.sampled_from(sorted(GENERIC)).flatmap(spelled))
    kind, names = next(v for k, v in GENERIC.items() if k.lower() == encoding.lower())
    top = np.iinfo(kind).max
    samples = np.random.default_rng(seed).integers(0, top + 1, (height, width, len(names)))
    step, packed_rows = packed(samples.astype(kind), padding, big)
    grey = decode_image(encoding, height, width, step, packed_rows, big)
    weights = [WEIGHTS.get(name, 1.0) for name in names]
    expected = (samples * weights).sum(-1) / (top / 255)
    assert grey.shape == (height, width) and grey.dtype == np.uint8
    assert np.abs(grey - expected).max() < 1.01


@settings(max_examples=60, deadline=None)
@given(
    seeds, st.integers(1, 5), st.integers(1, 5), st.integers(0, 7), st.booleans(),
    st.sampled_from(['nv12', 'NV21', 'nv16', 'nv24', 'i420']),
)
def test_planar_yuv_gives_its_luma(seed, height, width, padding, together, encoding):
    """It does so too where the step is that of all planes together, as some drivers have it."""
    height, width = 2 * height, 2 * width
    share = {'nv16': 2, 'nv24': 3}.get(encoding, 1.5)
    step = width if together else width + padding
    rows = np.random.default_rng(seed).integers(0, 256, (int(height * share), step), np.uint8)
    given_step = int(share * width) if together else step
    grey = decode_image(encoding, height, width, given_step, rows.tobytes())
    assert np.array_equal(grey, rows[:height, :width])


def thermal(low, high, seed=0, size=(60, 80)):
    """Return a smooth scene between two 14-bit values, with a camera's noise."""
    rng = np.random.default_rng(seed)
    scene = cv2.GaussianBlur(np.random.default_rng(1).normal(size=size), (0, 0), 6)
    scene = (scene - scene.min()) / np.ptp(scene)
    return np.rint(low + scene * (high - low) + rng.normal(0, 2, size)).astype(np.uint16)


@pytest.mark.parametrize('low, high', [(7000, 9000), (300, 3900), (0, 4095), (20000, 21000)])
def test_a_thermal_image_keeps_its_contrast(low, high):
    image = thermal(low, high)
    image[5, 5], image[7, 7] = 0, 65535  # dead and hot pixels do not matter
    grey = Greys()(image)
    assert len(np.unique(grey)) > 150 and grey.std() > 25
    order = np.argsort(image.ravel(), kind='stable')
    assert (np.diff(grey.ravel()[order].astype(int)) >= 0).all()  # brighter stays brighter


@pytest.mark.parametrize('kind', ['i2', 'f4'])
def test_signed_and_float_images_are_stretched_too(kind):
    image = (thermal(7000, 9000).astype(kind) - 8000) / (100 if kind == 'f4' else 1)
    image = image.astype(kind)
    encoding = '16SC1' if kind == 'i2' else '32FC1'
    step, data = packed(image[..., None], 3, True)
    grey = decode_image(encoding, *image.shape, step, data, True)
    assert len(np.unique(grey)) > 150 and grey.std() > 25
    if kind == 'f4':
        image[:2] = np.nan
        step, data = packed(image[..., None], 0, False)
        holed = decode_image(encoding, *image.shape, step, data)
        assert np.abs(holed[2:].astype(int) - grey[2:]).max() < 12 and not holed[0].any()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 40000), st.integers(300, 14000))
def test_the_stretch_is_steady_under_noise(low, width):
    """No image differs from the one before by more than its noise does."""
    greys = Greys()
    images = [thermal(low, low + width, seed) for seed in range(12)]
    decoded = [greys(image).astype(float) for image in images]
    for before, after in zip(decoded[2:], decoded[3:], strict=False):
        assert abs(after.mean() - before.mean()) < 0.5


def test_something_hot_changes_the_stretch_slowly_and_for_good():
    greys = Greys()
    for seed in range(60):
        cold = greys(thermal(7000, 8000, seed))
    hot = thermal(7000, 8000)
    hot[:20] = 12000
    first = greys(hot)
    assert np.abs(first[30:].astype(int) - cold[30:]).mean() < 3
    assert (first[:20] == 255).all()
    for _ in range(300):
        last = greys(hot)
    assert last[:20].max() < 250 and last[30:].mean() < first[30:].mean() - 20


def test_a_full_range_keeps_its_values_and_a_dull_one_is_not_blown_up():
    full = np.random.default_rng(0).integers(0, 65536, (60, 80)).astype(np.uint16)
    greys = Greys()
    for _ in range(3):
        assert np.array_equal(greys(full), np.rint(full / 257).astype(np.uint8))
    covered = Greys()(np.random.default_rng(0).normal(500, 3, (60, 80)).astype(np.uint16))
    assert covered.std() < 4
    eight = full.astype(np.uint8)
    assert Greys()(eight) is eight


def test_the_same_images_give_the_same_greys():
    images = [thermal(7000 + 50 * k, 9000 + 80 * k, k) for k in range(6)]
    one, other = Greys(), Greys()
    assert all(np.array_equal(one(image), other(image)) for image in images)


@pytest.mark.parametrize(
    'wrap', [bytes, bytearray, memoryview, lambda b: np.frombuffer(b, np.uint8)]
)
def test_any_buffer_is_read(wrap):
    assert decode_image('mono8', 2, 3, 3, wrap(bytes(range(6)))).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (('64FC2', 2, 2, 8, bytes(99)), "encoding '64FC2' is not supported; use one of mono8"),
        (('32FC1', 2, 2, 8, b'\xff' * 16), 'holds no finite number'),
        (('nv12', 2, 2, 2, bytes(5)), 'has 5 bytes, 3 rows of 2 bytes need 6'),
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
)
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


@pytest.mark.parametrize('share', [0.3, 0.67, 0.9])
@pytest.mark.parametrize('kind', ['.jpg', '.png', '.tiff', '.webp', '.bmp', '.ppm'])
def test_a_cut_file_is_refused(kind, share):
    data = cv2.imencode(kind, picture())[1].tobytes()
    with pytest.raises(ValueError, match='cut short|not a JPEG'):  # what of it says what it is?
        decode_compressed(data[:int(len(data) * share)])


@pytest.mark.parametrize('how', [[], [cv2.IMWRITE_JPEG_RST_INTERVAL, 2],
                                 [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]])
def test_a_jpeg_that_lacks_nothing_but_its_end_is_read(how):
    data = cv2.imencode('.jpg', picture(), how)[1].tobytes()
    assert data.endswith(b'\xff\xd9')
    whole = decode_compressed(data)
    assert np.array_equal(decode_compressed(data[:-2]), whole)
    assert np.array_equal(decode_compressed(data[:-1]), whole)
    assert np.array_equal(decode_compressed(data + bytes(100)), whole)
    # the end of a preview in another segment is not the picture's
    small = cv2.imencode('.jpg', picture()[:8, :8])[1].tobytes()
    segment = b'\xff\xe1' + (len(small) + 2).to_bytes(2, 'big') + small
    assert np.array_equal(decode_compressed(data[:2] + segment + data[2:-2]), whole)
    for cut in (data, data[:2] + segment + data[2:]):
        with pytest.raises(ValueError, match='cut short'):
            decode_compressed(cut[:-200])


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('kind', ['.tiff', '.webp', '.bmp', '.pnm'])
def test_other_files_decode_to_the_grey_of_their_pixels(kind, channels):
    image = picture(channels=channels)
    data = cv2.imencode(kind, image, [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes()
    assert compressed_size(data) == (48, 64)
    grey = image if channels == 1 else cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    assert np.array_equal(decode_compressed(data), grey)


@pytest.mark.parametrize('kind', ['.png', '.tiff', '.pgm'])
def test_files_of_16_bits_decode_as_raw_images_of_16_bits(kind):
    image = picture(np.uint16, 1) // 8 + 7000
    data = cv2.imencode(kind, image)[1].tobytes()
    raw = decode_image('mono16', 48, 64, 128, image.astype('<u2').tobytes(), False, Greys())
    assert np.array_equal(decode_compressed(data, Greys()), raw)
    assert raw.min() < 40 and raw.max() > 215


def test_fault_another_file_that_claims_to_be_a_giant_is_not_decoded():
    for head in (b'P5 30000 30000 255\n', b'P5 12000 12000 255\n'):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ValueError, match='claims to be'):
            decode_compressed(head + bytes(100))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + (10 << 10)


@pytest.mark.parametrize('data', [b'', b'no picture at all', b'\xff\xd8\xff\xd9'])
def test_bytes_that_are_no_picture_are_refused(data):
    with pytest.raises(ValueError, match='not a JPEG, PNG, TIFF, WebP, BMP or PNM picture'):
        decode_compressed(data)
