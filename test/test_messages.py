"""
Conversions between ROS messages and the core's dataclasses.

They lose nothing, and refuse what is malformed.
"""

import array
from dataclasses import replace
import itertools

import numpy as np
import pytest
import torch

pytest.importorskip('rclpy', reason="ROS 2's rclpy is not installed")

from geometry_msgs.msg import Pose  # noqa: E402,I100
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from imatching_ros.bundle.prior import Prior  # noqa: E402
from imatching_ros.bundle.window import Window  # noqa: E402
from imatching_ros.data.images import decode_image, ENCODINGS, Greys  # noqa: E402
from imatching_ros.geometry import lie  # noqa: E402
from imatching_ros.geometry.camera import Camera  # noqa: E402
from imatching_ros.geometry.correspondences import Correspondences  # noqa: E402
from imatching_ros.nodes.clouds import (  # noqa: E402
    CORRESPONDENCE,
    correspondences_from_cloud,
    correspondences_to_cloud,
    prior_from_cloud,
    prior_to_cloud,
    rows_from_cloud,
    rows_to_cloud,
    vins_features,
    window_from_messages,
    window_to_messages,
)
from imatching_ros.nodes.images import (  # noqa: E402
    camera_to_info,
    image_from_message,
    image_to_message,
)
from imatching_ros.nodes.poses import (  # noqa: E402
    camera_odometry,
    odometry_to_message,
    pose_from_message,
    pose_from_numbers,
)
from imatching_ros.nodes.reporter import diagnostic_status  # noqa: E402
from imatching_ros.nodes.stamps import to_header, to_ns, to_stamp  # noqa: E402
from imatching_ros.nodes.weights import weights_from_message, weights_to_message  # noqa: E402
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud2  # noqa: E402

STAMP = 1_700_000_000_123_456_789
COLUMNS = ('uv', 'xy', 'ref_stamp', 'ref_uv', 'track', 'score', 'cov')


def correspondences(rows: int, seed: int = 0) -> Correspondences:
    g = torch.Generator().manual_seed(seed)
    return Correspondences(
        stamp=STAMP,
        uv=torch.rand(rows, 2, generator=g) * 640,
        xy=torch.randn(rows, 2, generator=g),
        ref_stamp=STAMP - torch.randint(1, 10**12, (rows,), generator=g),
        ref_uv=torch.rand(rows, 2, generator=g) * 640,
        track=torch.randint(0, 2**32, (rows,), generator=g),
        score=torch.rand(rows, generator=g),
        cov=torch.rand(rows, 3, generator=g),
        model=7,
    )


def window(landmarks: int = 50) -> Window:
    g = torch.Generator().manual_seed(1)
    T = torch.randn(4, 7, generator=g, dtype=torch.float64)
    return Window(
        stamps=STAMP + torch.arange(4) * 33_333_333,
        T_world_camera=T,
        track=torch.randperm(2**20, generator=g)[:landmarks].sort().values,
        points=torch.randn(landmarks, 3, generator=g, dtype=torch.float64) * 30,
        observations=torch.randint(2, 20, (landmarks,), generator=g),
        error_px=torch.rand(landmarks, generator=g, dtype=torch.float64),
    )


def window_messages(sent: Window, stamp: int) -> list:
    return [
        *window_to_messages(sent, stamp, 'map'),
        prior_to_cloud(sent.prior, stamp, 'map'),
    ]


def write(cloud: PointCloud2, name: str, value: float) -> None:
    """Put a number where a cloud's last row has a field."""
    (field,) = (field for field in cloud.fields if field.name == name)
    kind = np.float64 if field.datatype == 8 else np.float32
    start, data = (cloud.width - 1) * cloud.point_step + field.offset, kind(value).tobytes()
    cloud.data[start:start + len(data)] = array.array('B', data)


@pytest.mark.parametrize('rows', [0, 1, 2000])
def test_correspondences_come_back_bit_by_bit(rows):
    sent = correspondences(rows)
    message = correspondences_to_cloud(sent, 'camera_optical')
    received = correspondences_from_cloud(message)
    assert (message.header.frame_id, received.stamp, len(received)) == (
        'camera_optical', STAMP, rows,
    )
    assert received.model == (7 if rows else 0)
    for name in COLUMNS:
        before, after = getattr(sent, name), getattr(received, name)
        assert after.dtype == before.dtype and torch.equal(after, before), name


def test_correspondences_have_the_fields_of_the_interface():
    message = correspondences_to_cloud(correspondences(3), 'camera')
    names = 'x y z u v ref_u ref_v id ref_sec ref_nanosec score cov_uu cov_uv cov_vv model'.split()
    assert [field.name for field in message.fields] == names
    assert (message.width, message.height, message.point_step) == (3, 1, 60)
    rows = rows_from_cloud(message, CORRESPONDENCE)
    assert (rows['z'] == 1).all()


def test_a_foreign_layout_of_the_same_fields_is_read():
    """Big-endian, padded rows and further fields, as another machine may send them."""
    sent = correspondences(6)
    ours = rows_from_cloud(
        correspondences_to_cloud(sent, 'camera'), CORRESPONDENCE
    )
    names = list(ours.dtype.names)
    layout = np.dtype(
        {
            'names': names,
            'formats': ['>' + ours.dtype.fields[name][0].str[1:] for name in names],
            'offsets': [8 + ours.dtype.fields[name][1] for name in names],
            'itemsize': 80,
        }
    )
    theirs = np.zeros((2, 3), layout)
    for name in names:
        theirs[name] = ours[name].reshape(2, 3)
    message = rows_to_cloud(ours, to_header(STAMP, 'camera'))
    message.is_bigendian, message.height, message.width, message.point_step, message.row_step = (
        True, 2, 3, 80, 256,
    )
    for field in message.fields:
        field.offset += 8
    message.data = b''.join(row.tobytes().ljust(256, b'\0') for row in theirs)
    received = correspondences_from_cloud(message)
    for name in COLUMNS:
        assert torch.equal(getattr(received, name), getattr(sent, name)), name


@pytest.mark.parametrize(
    ('spoil', 'sentence'),
    [
        (lambda m: m.fields.pop(3), "no field 'u'"),
        (lambda m: setattr(m.fields[7], 'datatype', 7), "field 'id'"),
        (lambda m: setattr(m, 'data', bytes(m.data)[:-1]), 'bytes, fewer than'),
        (lambda m: setattr(m, 'row_step', 1), 'bytes, fewer than'),
        (lambda m: setattr(m.fields[14], 'offset', 58), 'beyond its point_step'),
        (
            lambda m: setattr(m, 'data', np.full(300, 255, np.uint8).tobytes()),
            "'x' that is not finite",
        ),
        (lambda m: write(m, 'u', float('nan')), "'u' that is not finite"),
        (lambda m: write(m, 'cov_vv', float('inf')), "'cov_vv' that is not finite"),
    ],
)
def test_fault_malformed_correspondences_are_refused_with_a_sentence(spoil, sentence):
    message = correspondences_to_cloud(correspondences(5), 'camera')
    spoil(message)
    with pytest.raises(ValueError, match=sentence):
        correspondences_from_cloud(message)


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=200), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1),
    st.integers(0, 200), st.integers(0, 2**32 - 1), st.booleans(),
)
def test_fault_fuzzed_point_clouds_are_read_or_refused(
    data, height, width, point_step, row_step, bigendian
):
    message = correspondences_to_cloud(correspondences(0), 'camera')
    message.data, message.height, message.width, message.is_bigendian = (
        data, height, width, bigendian,
    )
    message.point_step, message.row_step = point_step, row_step
    try:
        received = correspondences_from_cloud(message)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert len(received) == height * width


def test_window_comes_back_to_the_last_bits_of_its_points():
    sent = window()
    parts = window_messages(sent, STAMP + 99)
    assert {to_ns(part.header.stamp) for part in parts} == {STAMP + 99}
    received = window_from_messages(*parts)
    for name in ('stamps', 'T_world_camera', 'track', 'observations'):
        assert torch.equal(getattr(received, name), getattr(sent, name)), name
    assert torch.equal(received.error_px, sent.error_px.float().double())
    # float32 alone would be off by 1e-7, which moves residuals across the pruning threshold
    assert ((received.points - sent.points).abs() <= 2e-14 * sent.points.abs().clamp_min(1)).all()


def test_viewers_find_float32_points_in_landmarks():
    _, landmarks = window_to_messages(window(3), STAMP, 'map')
    kinds = {field.name: field.datatype for field in landmarks.fields}
    assert [kinds[name] for name in ('x', 'y', 'z', 'id', 'observations', 'error_px')] == [
        7, 7, 7, 6, 6, 7,
    ]


@pytest.mark.parametrize('column', ['points', 'T_world_camera'])
def test_fault_a_window_with_one_number_that_is_not_finite_is_refused(column):
    sent = window()
    getattr(sent, column)[1, 2] = float('nan')
    with pytest.raises(ValueError, match='a pose or a landmark that is not finite'):
        window_from_messages(*window_messages(sent, STAMP))


@pytest.mark.parametrize('column', ['stamps', 'track'])
def test_fault_a_window_out_of_order_is_refused(column):
    sent = window()
    swapped = getattr(sent, column).clone()
    swapped[1] = swapped[0]  # each once
    with pytest.raises(ValueError, match='not in ascending order, each once'):
        window_from_messages(*window_messages(replace(sent, **{column: swapped}), STAMP))


@pytest.mark.parametrize('part', [0, 1, 2])
def test_fault_parts_of_different_solves_are_refused(part):
    parts = window_messages(window(), STAMP)
    parts[part].header.stamp = to_stamp(STAMP + 1)
    with pytest.raises(ValueError, match='different stamps'):
        window_from_messages(*parts)


def test_prior_comes_back_bit_by_bit():
    g = torch.Generator().manual_seed(2)
    root = torch.randn(24, 24, generator=g, dtype=torch.float64)
    sent = Prior(window().stamps, window().T_world_camera, root @ root.T, root[0])
    message = prior_to_cloud(sent, STAMP, 'map')
    assert {field.name: field.count for field in message.fields} == {
        'sec': 1, 'nanosec': 1, 'pose': 7, 'gradient': 6, 'information': 144
    }
    parts = [*window_to_messages(window(), STAMP, 'map'), message]
    received = window_from_messages(*parts).prior
    for name in ('stamps', 'T_world_camera', 'information', 'gradient'):
        assert torch.equal(getattr(received, name), getattr(sent, name)), name


@pytest.mark.parametrize(
    ('spoil', 'sentence'),
    [
        (lambda m: setattr(m.fields[4], 'count', 143), '143 of datatype 8, expected 144 float64'),
        (lambda m: setattr(m, 'width', 3), 'expected 108 float64'),
        (lambda m: setattr(m, 'data', bytes(m.data)[:-1]), 'bytes, fewer than'),
        (
            lambda m: setattr(m, 'data', np.full(len(m.data), 255, np.uint8).tobytes()),
            "'pose' that is not finite",
        ),
        (lambda m: write(m, 'pose', float('nan')), "'pose' that is not finite"),
        (lambda m: write(m, 'gradient', float('inf')), "'gradient' that is not finite"),
        (lambda m: write(m, 'information', float('nan')), "'information' that is not finite"),
        (lambda m: setattr(m, 'width', 10**6), 'more than any window has'),
    ],
)
def test_fault_malformed_prior_is_refused_with_a_sentence(spoil, sentence):
    zeros = torch.zeros(24, 24, dtype=torch.float64)
    message = prior_to_cloud(
        Prior(window().stamps, window().T_world_camera, zeros, zeros[0]), STAMP, 'map'
    )
    spoil(message)
    with pytest.raises(ValueError, match=sentence):
        prior_from_cloud(message)


def test_an_empty_window_comes_back():
    none = Window(*(column[:0] for column in vars(window()).values() if column is not None))
    received = window_from_messages(*window_messages(none, STAMP))
    assert received.T_world_camera.shape == (0, 7) and received.points.shape == (0, 3)


def test_odometry_carries_pose_and_covariance_row_by_row():
    T = torch.tensor([1.0, 2, 3, 0.1, 0.2, 0.3, 0.9], dtype=torch.float64)
    covariance = torch.arange(36, dtype=torch.float64).reshape(6, 6)
    message = odometry_to_message(T, covariance, STAMP, 'map', 'camera')
    assert torch.equal(pose_from_message(message.pose.pose), T)
    assert message.pose.covariance.tolist() == list(range(36))
    assert (message.header.frame_id, message.child_frame_id) == ('map', 'camera')
    assert not odometry_to_message(T, None, STAMP, 'map', 'camera').pose.covariance.any()
    assert isinstance(message.pose.pose, Pose)


@pytest.mark.parametrize(
    'camera',
    [
        Camera(640, 480, 500.0, 501.0, 319.5, 239.5),
        Camera(640, 480, 500.0, 501.0, 319.5, 239.5, 'plumb_bob', (0.1, -0.2, 0.001, 0.002, 0.3)),
        Camera(640, 480, 300.0, 301.0, 319.5, 239.5, 'equidistant', (0.1, -0.2, 0.01, 0.02)),
    ],
)
def test_camera_info_comes_back(camera):
    info = camera_to_info(camera, to_header(STAMP, 'camera'))
    assert Camera.from_camera_info(info) == camera


def test_camera_info_of_a_binned_cut_out_of_the_sensor():
    """A pixel of the published image lies where the sensor's pixels that it is the mean of lie."""
    whole = Camera(
        640, 480, 500.0, 501.0, 321.0, 238.0, 'plumb_bob', (0.1, -0.2, 0.001, 0.002, 0.3)
    )
    info = camera_to_info(whole, to_header(STAMP, 'camera'))
    info.roi.x_offset, info.roi.y_offset, info.roi.width, info.roi.height = 100, 60, 400, 301
    info.binning_x, info.binning_y = 2, 3
    camera = Camera.from_camera_info(info)
    assert (camera.width, camera.height) == (200, 100)
    uv = torch.tensor([[0.0, 0.0], [17.0, 99.0]], dtype=torch.float64)
    # the middle of 2x3 pixels
    there = torch.tensor([[100.5, 61.0], [134.5, 358.0]], dtype=torch.float64)
    torch.testing.assert_close(camera.normalise(uv), whole.normalise(there))
    info.roi.x_offset = 300
    with pytest.raises(ValueError, match=r"400x301 at \(300, 60\) leaves the camera's 640x480"):
        Camera.from_camera_info(info)


def test_camera_info_of_a_rectified_image():
    raw = Camera(640, 480, 500.0, 501.0, 321.0, 238.0, 'plumb_bob', (0.1, -0.2, 0.001, 0.002, 0.3))
    info = camera_to_info(raw, to_header(STAMP, 'camera'))
    info.p = [450.0, 0.0, 310.0, -30.0, 0.0, 451.0, 230.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    assert Camera.from_camera_info(info) == raw
    assert Camera.from_camera_info(info, rectified=True) == Camera(
        640, 480, 450.0, 451.0, 310.0, 230.0
    )


def test_fault_uncalibrated_camera_info_is_refused():
    with pytest.raises(ValueError, match='not calibrated'):
        Camera.from_camera_info(CameraInfo(width=640, height=480))
    with pytest.raises(ValueError, match='not calibrated'):
        Camera.from_camera_info(CameraInfo(width=640, height=480, k=[float('nan')] * 9))


def test_images_come_back():
    image = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert (
        image_from_message(image_to_message(image, to_header(0, 'c')))
        == image
    ).all()
    colour = image_to_message(np.zeros((3, 4, 3), np.uint8), to_header(0, 'c'))
    assert (colour.encoding, colour.step, len(colour.data)) == ('rgb8', 12, 36)


@pytest.mark.parametrize(
    'message',
    [
        Image(
            encoding='32FC1', height=2, width=2, step=8,
            data=np.full(4, np.nan, np.float32).tobytes(),
        ),
        Image(encoding='mono8', height=2, width=2, step=2, data=b'123'),
        CompressedImage(format='jpeg', data=b'no picture'),
        Image(),
    ],
    ids=['nan', 'short', 'not-jpeg', 'empty'],
)
def test_fault_images_that_cannot_be_read_are_refused(message):
    with pytest.raises(ValueError) as caught:
        image_from_message(message)
    assert len(str(caught.value).splitlines()) == 1


def test_images_of_a_thermal_camera_go_one_way_with_one_stretch():
    """The message says the same as a recording, and a node's greys are those of its images."""
    greys, same = Greys(), Greys()
    for k in range(3):
        samples = np.random.default_rng(k).integers(7000, 9000, (20, 30)).astype('<u2')
        message = Image(
            encoding='16UC1', height=20, width=30, step=60, data=samples.tobytes()
        )
        image = image_from_message(message, greys)
        assert np.array_equal(image, decode_image('mono16', 20, 30, 60, samples, False, same))
        assert np.ptp(image) > 180


def test_cv_bridge_and_the_own_decoder_agree():
    bridge = pytest.importorskip('cv_bridge', reason='cv_bridge is not installed').CvBridge()
    random = np.random.default_rng(0)
    known = [n for n in ENCODINGS if n.startswith(('mono', 'rgb', 'bgr', 'bayer'))]
    for encoding, padding, big in itertools.product(known, range(7), (False, True)):
        kind, channels, _ = ENCODINGS[encoding]
        size = np.dtype(kind).itemsize
        if padding % (size * channels):
            continue  # it takes a row for whole pixels, and shears an image whose padding is not
        step = 10 * size * channels + padding
        data = random.integers(0, 256, 8 * step, np.uint8).tobytes()
        message = Image(
            encoding=encoding, height=8, width=10, step=step, data=data, is_bigendian=big
        )
        own = image_from_message(message).astype(int)
        other = bridge.imgmsg_to_cv2(message, 'mono8').astype(int)
        # versions of OpenCV round the mean of a Bayer pattern's pixels differently
        assert abs(own - other).max() <= ('bayer' in encoding), (encoding, padding, big)


def test_weights_travel_as_their_bytes():
    data = bytes(range(256)) * 5
    assert weights_from_message(weights_to_message(data)) == data


def test_vins_features_are_what_vins_fusion_reads():
    """
    Write what its feature_callback takes.

    Channels by number: id, camera, u, v, velocity x and y, and where there are more than five
    channels three of a true point; ids become int through float32; z must be 1.
    """

    def one(stamp, tracks, xy, uv):
        n = len(tracks)
        return Correspondences(
            stamp, torch.tensor(uv), torch.tensor(xy), torch.zeros(n, dtype=torch.int64),
            torch.zeros(n, 2), torch.tensor(tracks), torch.ones(n), torch.ones(n, 3), 0,
        )

    before = one(10**9, [5, 6], [[0.0, 0.0], [1.0, 1.0]], [[1.0, 2.0], [3.0, 4.0]])
    after = one(
        10**9 + 100_000_000, [6, 2**24 + 3, 6, 2**32 - 1],
        [[1.5, 1.0], [2.0, 2.0], [1.5, 1.0], [3.0, -1.0]],
        [[10.0, 20.0], [30.0, 40.0], [10.0, 20.0], [50.0, 60.0]],
    )
    message = vins_features(after, before, 'camera')
    assert [channel.name for channel in message.channels] == (
        'id camera_id p_u p_v velocity_x velocity_y gx gy gz'.split()
    )
    values = [list(channel.values) for channel in message.channels]
    assert [int(np.float32(value)) for value in values[0]] == [6, 3, 2**24 - 1]
    assert values[1] == [0.0] * 3
    assert (values[2], values[3]) == ([10.0, 30.0, 50.0], [20.0, 40.0, 60.0])
    assert values[4] == pytest.approx([5.0, 0.0, 0.0]) and values[5] == pytest.approx([0.0] * 3)
    assert values[6] == values[7] == values[8] == [0.0] * 3
    assert [(point.x, point.y, point.z) for point in message.points] == [
        (1.5, 1.0, 1.0), (2.0, 2.0, 1.0), (3, -1, 1),
    ]
    assert to_ns(message.header.stamp) == after.stamp
    for earlier in (None, replace(before, stamp=after.stamp), after):  # no time has passed
        values = [list(channel.values) for channel in vins_features(after, earlier, 'c').channels]
        assert values[4] == values[5] == [0.0] * 3


def test_odometry_of_a_robot_becomes_that_of_its_camera():
    """
    Pose and covariance against a numerical derivative.

    The covariance is of position and of turns about the axes of the header's frame.
    """
    g = torch.Generator().manual_seed(3)
    root = torch.randn(6, 6, generator=g, dtype=torch.float64) * 0.1
    numbers = torch.randn(2, 7, generator=g, dtype=torch.float64)
    body, extrinsics = (
        pose_from_numbers([*n[:3], *(n[3:] / n[3:].norm())]) for n in numbers
    )
    message = odometry_to_message(body, root @ root.T, STAMP, 'odom', 'base_link')
    stamp, T, covariance = camera_odometry(message, extrinsics)
    assert stamp == STAMP
    torch.testing.assert_close(T, lie.compose(body, extrinsics))
    delta = 1e-6 * torch.eye(6, dtype=torch.float64)
    J = lie.local(T, lie.compose(lie.retract(body, delta), extrinsics)).T / 1e-6
    torch.testing.assert_close(covariance, J @ root @ root.T @ J.T, atol=1e-5, rtol=1e-4)
    assert (
        camera_odometry(odometry_to_message(body, None, STAMP, 'odom', 'b'), extrinsics)[2]
        is None
    )


@pytest.mark.parametrize('numbers', [(float('nan'),) * 7, (0.0,) * 7, (0, 0, 0, 1, 1, 1, 1)])
def test_fault_odometry_without_a_pose_is_refused(numbers):
    message = odometry_to_message(
        torch.tensor(numbers, dtype=torch.float64), None, STAMP, 'odom', 'base_link'
    )
    with pytest.raises(ValueError, match='not finite|unit quaternion'):
        camera_odometry(message, pose_from_numbers((0, 0, 0, 0, 0, 0, 1)))


def test_stamps_come_back():
    for ns in (0, 1, 999_999_999, 10**9, STAMP, 2**31 * 10**9 - 1):
        assert to_ns(to_stamp(ns)) == ns


def test_diagnostics_are_readable():
    status = diagnostic_status(
        1, '/matcher', 'odd', {'a': 1.23456789, 'b': True, 'c': 7, 'd': 'x'}
    )
    assert status.level == b'\x01'
    assert {pair.key: pair.value for pair in status.values} == {
        'a': '1.23457', 'b': 'true', 'c': '7', 'd': 'x',
    }
    assert isinstance(correspondences_to_cloud(correspondences(1), 'c'), PointCloud2)
