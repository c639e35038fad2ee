"""Conversions between ROS messages and the core's dataclasses lose nothing, and refuse what is malformed."""

import numpy as np
import pytest
import torch

pytest.importorskip("rclpy", reason="ROS 2's rclpy is not installed")

from geometry_msgs.msg import Pose  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud2  # noqa: E402

from imatching_ros.bundle.window import Window  # noqa: E402
from imatching_ros.geometry.camera import Camera  # noqa: E402
from imatching_ros.geometry.correspondences import Correspondences  # noqa: E402
from imatching_ros.nodes import messages  # noqa: E402

STAMP = 1_700_000_000_123_456_789
COLUMNS = ("uv", "xy", "ref_stamp", "ref_uv", "track", "score", "cov")


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
        track=torch.randperm(2**20, generator=g)[:landmarks],
        points=torch.randn(landmarks, 3, generator=g, dtype=torch.float64) * 30,
        observations=torch.randint(2, 20, (landmarks,), generator=g),
        error_px=torch.rand(landmarks, generator=g, dtype=torch.float64),
    )


@pytest.mark.parametrize("rows", [0, 1, 2000])
def test_correspondences_come_back_bit_by_bit(rows):
    sent = correspondences(rows)
    message = messages.correspondences_to_cloud(sent, "camera_optical")
    received = messages.correspondences_from_cloud(message)
    assert (message.header.frame_id, received.stamp, len(received)) == ("camera_optical", STAMP, rows)
    assert received.model == (7 if rows else 0)
    for name in COLUMNS:
        before, after = getattr(sent, name), getattr(received, name)
        assert after.dtype == before.dtype and torch.equal(after, before), name


def test_correspondences_have_the_fields_of_the_interface():
    message = messages.correspondences_to_cloud(correspondences(3), "camera")
    names = "x y z u v ref_u ref_v id ref_sec ref_nanosec score cov_uu cov_uv cov_vv model".split()
    assert [field.name for field in message.fields] == names
    assert (message.width, message.height, message.point_step) == (3, 1, 60)
    rows = messages.cloud_rows(message, messages.CORRESPONDENCE)
    assert (rows["z"] == 1).all()


def test_a_foreign_layout_of_the_same_fields_is_read():
    """Big-endian, padded rows and further fields, as another machine may send them."""
    sent = correspondences(6)
    ours = messages.cloud_rows(messages.correspondences_to_cloud(sent, "camera"), messages.CORRESPONDENCE)
    names = list(ours.dtype.names)
    layout = np.dtype({
        "names": names,
        "formats": [">" + ours.dtype.fields[name][0].str[1:] for name in names],
        "offsets": [8 + ours.dtype.fields[name][1] for name in names],
        "itemsize": 80,
    })
    theirs = np.zeros((2, 3), layout)
    for name in names:
        theirs[name] = ours[name].reshape(2, 3)
    message = messages.cloud(ours, messages.header(STAMP, "camera"))
    message.is_bigendian, message.height, message.width, message.point_step, message.row_step = True, 2, 3, 80, 256
    for field in message.fields:
        field.offset += 8
    message.data = b"".join(row.tobytes().ljust(256, b"\0") for row in theirs)
    received = messages.correspondences_from_cloud(message)
    for name in COLUMNS:
        assert torch.equal(getattr(received, name), getattr(sent, name)), name


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda m: m.fields.pop(3), "no field 'u'"),
        (lambda m: setattr(m.fields[7], "datatype", 7), "field 'id'"),
        (lambda m: setattr(m, "data", bytes(m.data)[:-1]), "bytes, fewer than"),
        (lambda m: setattr(m, "row_step", 1), "bytes, fewer than"),
        (lambda m: setattr(m.fields[14], "offset", 58), "beyond its point_step"),
        (lambda m: setattr(m, "data", np.full(300, 255, np.uint8).tobytes()), "'x' that is not finite"),
    ],
)
def test_fault_malformed_correspondences_are_refused_with_a_sentence(spoil, sentence):
    message = messages.correspondences_to_cloud(correspondences(5), "camera")
    spoil(message)
    with pytest.raises(ValueError, match=sentence):
        messages.correspondences_from_cloud(message)


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=200), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 200),
    st.integers(0, 2**32 - 1), st.booleans(),
)  # fmt: skip
def test_fault_fuzzed_point_clouds_are_read_or_refused(data, height, width, point_step, row_step, bigendian):
    message = messages.correspondences_to_cloud(correspondences(0), "camera")
    message.data, message.height, message.width, message.is_bigendian = data, height, width, bigendian
    message.point_step, message.row_step = point_step, row_step
    try:
        received = messages.correspondences_from_cloud(message)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert len(received) == height * width


def test_window_comes_back_to_the_last_bits_of_its_points():
    sent = window()
    path, landmarks = messages.window_to_messages(sent, STAMP + 99, "map")
    assert messages.to_ns(path.header.stamp) == messages.to_ns(landmarks.header.stamp) == STAMP + 99
    received = messages.window_from_messages(path, landmarks)
    for name in ("stamps", "T_world_camera", "track", "observations"):
        assert torch.equal(getattr(received, name), getattr(sent, name)), name
    assert torch.equal(received.error_px, sent.error_px.float().double())
    # float32 alone would be off by 1e-7, which moves residuals across the pruning threshold
    assert ((received.points - sent.points).abs() <= 2e-14 * sent.points.abs().clamp_min(1)).all()


def test_viewers_find_float32_points_in_landmarks():
    _, landmarks = messages.window_to_messages(window(3), STAMP, "map")
    kinds = {field.name: field.datatype for field in landmarks.fields}
    assert [kinds[name] for name in ("x", "y", "z", "id", "observations", "error_px")] == [7, 7, 7, 6, 6, 7]


def test_fault_halves_of_different_solves_are_refused():
    path, landmarks = messages.window_to_messages(window(), STAMP, "map")
    landmarks.header.stamp = messages.to_stamp(STAMP + 1)
    with pytest.raises(ValueError, match="different stamps"):
        messages.window_from_messages(path, landmarks)


def test_an_empty_window_comes_back():
    none = Window(*(column[:0] for column in vars(window()).values() if column is not None))
    received = messages.window_from_messages(*messages.window_to_messages(none, STAMP, "map"))
    assert received.T_world_camera.shape == (0, 7) and received.points.shape == (0, 3)


def test_odometry_carries_pose_and_covariance_row_by_row():
    T = torch.tensor([1.0, 2, 3, 0.1, 0.2, 0.3, 0.9], dtype=torch.float64)
    covariance = torch.arange(36, dtype=torch.float64).reshape(6, 6)
    message = messages.odometry(T, covariance, STAMP, "map", "camera")
    assert torch.equal(messages.pose_from_message(message.pose.pose), T)
    assert message.pose.covariance.tolist() == list(range(36))
    assert (message.header.frame_id, message.child_frame_id) == ("map", "camera")
    assert not messages.odometry(T, None, STAMP, "map", "camera").pose.covariance.any()
    assert isinstance(message.pose.pose, Pose)


@pytest.mark.parametrize(
    "camera",
    [
        Camera(640, 480, 500.0, 501.0, 319.5, 239.5),
        Camera(640, 480, 500.0, 501.0, 319.5, 239.5, "plumb_bob", (0.1, -0.2, 0.001, 0.002, 0.3)),
        Camera(640, 480, 300.0, 301.0, 319.5, 239.5, "equidistant", (0.1, -0.2, 0.01, 0.02)),
    ],
)
def test_camera_info_comes_back(camera):
    info = messages.camera_to_info(camera, messages.header(STAMP, "camera"))
    assert messages.camera_from_info(info) == camera


def test_fault_uncalibrated_camera_info_is_refused():
    with pytest.raises(ValueError, match="not calibrated"):
        messages.camera_from_info(CameraInfo(width=640, height=480))
    with pytest.raises(ValueError, match="not calibrated"):
        messages.camera_from_info(CameraInfo(width=640, height=480, k=[float("nan")] * 9))


def test_images_come_back():
    image = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert (messages.image_from_message(messages.image_to_message(image, messages.header(0, "c"))) == image).all()
    colour = messages.image_to_message(np.zeros((3, 4, 3), np.uint8), messages.header(0, "c"))
    assert (colour.encoding, colour.step, len(colour.data)) == ("rgb8", 12, 36)


@pytest.mark.parametrize(
    "message",
    [
        Image(encoding="32FC1", height=2, width=2, step=8, data=np.full(4, np.nan, np.float32).tobytes()),
        Image(encoding="mono8", height=2, width=2, step=2, data=b"123"),
        CompressedImage(format="jpeg", data=b"no picture"),
        Image(),
    ],
    ids=["nan", "short", "not-jpeg", "empty"],
)
def test_fault_images_that_cannot_be_read_are_refused(message):
    with pytest.raises(ValueError) as caught:
        messages.image_from_message(message)
    assert len(str(caught.value).splitlines()) == 1


def test_weights_travel_as_their_bytes():
    data = bytes(range(256)) * 5
    assert messages.weights_from_message(messages.weights_to_message(data)) == data


def test_vins_features_have_one_point_per_track_with_its_velocity():
    def one(stamp, tracks, xy):
        n = len(tracks)
        return Correspondences(
            stamp, torch.zeros(n, 2), torch.tensor(xy), torch.zeros(n, dtype=torch.int64), torch.zeros(n, 2),
            torch.tensor(tracks), torch.ones(n), torch.ones(n, 3), 0,
        )  # fmt: skip

    before = one(10**9, [5, 6], [[0.0, 0.0], [1.0, 1.0]])
    after = one(10**9 + 100_000_000, [6, 2**24 + 3, 6], [[1.5, 1.0], [2.0, 2.0], [1.5, 1.0]])
    message = messages.vins_features(after, before, "camera")
    assert len(message.channels) == 9 and len(message.points) == 2
    channels = {channel.name: list(channel.values) for channel in message.channels}
    assert channels["id"] == [6.0, 3.0]
    assert channels["velocity_x"] == pytest.approx([5.0, 0.0]) and channels["velocity_y"] == pytest.approx([0.0, 0.0])
    assert [point.z for point in message.points] == [1.0, 1.0]


def test_stamps_come_back():
    for ns in (0, 1, 999_999_999, 10**9, STAMP, 2**31 * 10**9 - 1):
        assert messages.to_ns(messages.to_stamp(ns)) == ns


def test_diagnostics_are_readable():
    status = messages.diagnostic_status(1, "/matcher", "odd", {"a": 1.23456789, "b": True, "c": 7, "d": "x"})
    assert status.level == b"\x01"
    assert {pair.key: pair.value for pair in status.values} == {"a": "1.23457", "b": "true", "c": "7", "d": "x"}
    assert isinstance(messages.correspondences_to_cloud(correspondences(1), "c"), PointCloud2)
