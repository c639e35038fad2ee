"""Bags of all three formats, written here and read back, and what is said of bad ones."""

from contextlib import contextmanager
from pathlib import Path

import cv2
from imatching_ros.data.images import decode_image
from imatching_ros.data.recording import open_recording, RecordingError
from imatching_ros.data.sieve import BROKEN, RESIZED
from imatching_ros.data.stamps import AHEAD, BACK, FAR, SAME
import numpy as np
import pytest
from rosbags import rosbag1, rosbag2
from rosbags.typesys import get_typestore, Stores

ROS1, ROS2 = get_typestore(Stores.ROS1_NOETIC), get_typestore(Stores.ROS2_HUMBLE)
FORMATS = ['rosbag1', 'sqlite3', 'mcap']
SIZE = (24, 32)
START = 1_650_000_000_123_456_789
DT = 100_000_000
SHARED = Path(__file__).parents[2] / 'shared' / 'recordings'


class Pen:
    """Write messages of either ROS into an open bag."""

    def __init__(self, writer, store):
        self.writer, self.store, self.topics = writer, store, {}

    def make(self, name: str, **values):
        if self.store is ROS1:
            if name == 'std_msgs/msg/Header':
                values = {'seq': 0, **values}
            if name == 'sensor_msgs/msg/CameraInfo':
                values = {
                    key.upper() if key in 'dkrp' else key: value for key, value in values.items()
                }
        return self.store.types[name](**values)

    def header(self, stamp: int):
        time = self.make('builtin_interfaces/msg/Time', sec=stamp // 10**9, nanosec=stamp % 10**9)
        return self.make('std_msgs/msg/Header', stamp=time, frame_id='camera')

    def write(self, topic: str, stamp: int, message):
        kind = message.__msgtype__
        if topic not in self.topics:
            self.topics[topic] = self.writer.add_connection(topic, kind, typestore=self.store)
        serialize = self.store.serialize_ros1 if self.store is ROS1 else self.store.serialize_cdr
        self.writer.write(self.topics[topic], stamp, bytes(serialize(message, kind)))

    def info(
        self, topic: str, stamp: int, fx: float = 30.0, size=SIZE,
        d=(0.1, -0.05, 0.001, 0.002, 0.0), p=(0.0,) * 12,
    ):
        roi = self.make(
            'sensor_msgs/msg/RegionOfInterest', x_offset=0, y_offset=0, height=0, width=0,
            do_rectify=False,
        )
        k = np.array([fx, 0, 15.5, 0, fx, 11.5, 0, 0, 1])
        self.write(topic, stamp, self.make(
            'sensor_msgs/msg/CameraInfo', header=self.header(stamp), height=size[0], width=size[1],
            distortion_model='plumb_bob', d=np.array(d), k=k, r=np.eye(3).ravel(),
            p=np.array(p, float), binning_x=0, binning_y=0, roi=roi,
        ))

    def image(
        self, topic: str, stamp: int, encoding: str, data: bytes, step: int, size=SIZE,
        header_stamp=None,
    ):
        header = self.header(stamp if header_stamp is None else header_stamp)
        self.write(topic, stamp, self.make(
            'sensor_msgs/msg/Image', header=header, height=size[0], width=size[1],
            encoding=encoding,
            is_bigendian=0, step=step, data=np.frombuffer(data, np.uint8),
        ))

    def compressed(self, topic: str, stamp: int, data: bytes):
        self.write(topic, stamp, self.make(
            'sensor_msgs/msg/CompressedImage', header=self.header(stamp), format='jpeg',
            data=np.frombuffer(data, np.uint8),
        ))

    def pose(self, topic: str, stamp: int, x: float):
        point = self.make('geometry_msgs/msg/Point', x=x, y=2.0, z=3.0)
        turn = self.make('geometry_msgs/msg/Quaternion', x=0.0, y=0.6, z=0.0, w=0.8)
        pose = self.make('geometry_msgs/msg/Pose', position=point, orientation=turn)
        self.write(
            topic, stamp,
            self.make('geometry_msgs/msg/PoseStamped', header=self.header(stamp), pose=pose),
        )


@contextmanager
def writing(folder: Path, kind: str = 'mcap'):
    """Return a pen for a new bag; its path is pen.path."""
    if kind == 'rosbag1':
        path, store = folder / 'drive.bag', ROS1
        writer = rosbag1.Writer(path)
    else:
        path, store = folder / 'drive', ROS2
        plugin = rosbag2.StoragePlugin.MCAP if kind == 'mcap' else rosbag2.StoragePlugin.SQLITE3
        writer = rosbag2.Writer(path, version=9, storage_plugin=plugin)
    with writer:
        pen = Pen(writer, store)
        pen.path = path
        yield pen


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def good(folder: Path, kind: str = 'mcap', count: int = 5) -> Path:
    with writing(folder, kind) as pen:
        for k in range(count):
            pen.info('/cam/camera_info', START + k)
            pen.image('/cam/image_raw', START + k, 'mono8', noise(k, *SIZE).tobytes(), SIZE[1])
    return pen.path


@pytest.mark.parametrize('kind', FORMATS)
def test_raw_images_of_every_format_come_back(tmp_path, kind):
    encodings = {'mono8': 1, 'rgb8': 3, 'bgra8': 4, 'mono16': 2, 'bayer_grbg8': 1}
    expected = []
    with writing(tmp_path, kind) as pen:
        for k, (encoding, size) in enumerate(encodings.items()):
            stamp, step = START + k * 10**8, SIZE[1] * size + k
            data = noise(k, SIZE[0], step).tobytes()
            pen.info('/cam/camera_info', stamp)
            pen.image('/cam/image_raw', stamp, encoding, data, step)
            pen.pose('/ground_truth/pose', stamp, float(k))
            expected.append((stamp, decode_image(encoding, *SIZE, step, data)))
    recording = open_recording(pen.path)
    assert (recording.image_topic, recording.camera_info_topic) == (
        '/cam/image_raw',
        '/cam/camera_info',
    )
    assert recording.transport == 'raw' and len(recording) == 5
    camera = recording.camera
    assert (camera.height, camera.width, camera.fx, camera.cx) == (*SIZE, 30.0, 15.5)
    assert camera.distortion_model == 'plumb_bob' and camera.distortion == (
        0.1, -0.05, 0.001, 0.002, 0.0,
    )
    for _ in range(2):  # any number of times
        for (stamp, image), (true_stamp, true_image) in zip(recording, expected, strict=True):
            assert stamp == true_stamp and np.array_equal(image, true_image)
    stamps, poses = recording.ground_truth
    assert stamps.tolist() == [stamp for stamp, _ in expected]
    assert poses.tolist() == [[float(k), 2, 3, 0, 0.6, 0, 0.8] for k in range(5)]


@pytest.mark.parametrize('kind', FORMATS)
def test_compressed_images_of_every_format_come_back(tmp_path, kind):
    pictures = [cv2.GaussianBlur(noise(k, *SIZE), (0, 0), 3) for k in range(4)]
    with writing(tmp_path, kind) as pen:
        for k, picture in enumerate(pictures):
            data = cv2.imencode(('.jpg', '.png')[k % 2], picture)[1].tobytes()
            pen.info('/cam/camera_info', START + k)
            pen.compressed('/cam/image_raw/compressed', START + k, data)
    recording = open_recording(pen.path)
    assert (
        recording.transport == 'compressed' and recording.camera_info_topic == '/cam/camera_info'
    )
    images = [image for _, image in recording]
    assert np.array_equal(images[1], pictures[1]) and np.array_equal(images[3], pictures[3])
    assert (
        max(
            np.abs(image.astype(int) - picture).max()
            for image, picture in zip(images, pictures, strict=True)
        )
        < 6
    )


@pytest.mark.parametrize('kind', FORMATS)
def test_messages_have_the_names_of_ros2(tmp_path, kind):
    recording = open_recording(good(tmp_path, kind))
    (first, role, camera), *images = recording.messages()
    assert (first, role, camera) == (START, 'camera', recording.camera)
    assert [stamp for stamp, _, _ in images] == [START + k for k in range(5)]
    for stamp, role, message in images:
        assert role == 'image' and message.__msgtype__ == 'sensor_msgs/msg/Image'
        data = ROS2.serialize_cdr(message, message.__msgtype__)
        copy = ROS2.deserialize_cdr(data, message.__msgtype__)
        assert copy.header.frame_id == 'camera' and copy.encoding == 'mono8'
        assert message.header.stamp.sec * 10**9 + message.header.stamp.nanosec == stamp


RAW = {'d': (-0.3, 0.1, 0.0, 0.0, 0.0), 'p': [36.0, 0, 16, 0, 0, 36, 12, 0, 0, 0, 1, 0]}


def of_topic(folder, image_topic, kind='mcap', **info):
    """Return a bag with one image on a topic, its camera_info beside it."""
    folder.mkdir(exist_ok=True)
    with writing(folder, kind) as pen:
        pen.info(image_topic.rpartition('/')[0] + '/camera_info', START, **info)
        pen.image(image_topic, START, 'mono8', bytes(SIZE[0] * SIZE[1]), SIZE[1])
    return pen.path


@pytest.mark.parametrize('kind', FORMATS)
@pytest.mark.parametrize(
    ('topic', 'rectified', 'fx'),
    [
        ('/cam/image_rect', 'auto', 36.0), ('/cam/image_raw', 'auto', 30.0),
        ('/kitti/camera_gray_left/image', 'auto', 36.0), ('/cam/rect/image', 'auto', 36.0),
        ('/cam/image_raw', 'always', 36.0), ('/cam/image_rect', 'never', 30.0),
    ],
)
def test_rectified_images_have_the_camera_of_p(tmp_path, kind, topic, rectified, fx):
    recording = open_recording(of_topic(tmp_path, topic, kind, **RAW), rectified=rectified)
    assert recording.camera.fx == fx
    assert recording.camera.distortion_model == ('none' if fx == 36.0 else 'plumb_bob')
    assert [camera for _, kind, camera in recording.messages() if kind == 'camera'] == [
        recording.camera
    ]
    assert recording.notes() == []


def test_p_alone_is_used_and_where_nothing_tells_it_is_said(tmp_path):
    alone = of_topic(tmp_path, '/cam/image_raw', fx=0.0, **RAW)
    assert open_recording(alone).camera.fx == 36.0
    silent = of_topic(tmp_path / 'second', '/cam/image', **RAW)
    recording = open_recording(silent)
    (note,) = recording.notes()
    assert recording.camera.fx == 30.0
    assert '/cam/image are taken as raw, by K and D' in note and '--rectified always' in note
    assert open_recording(silent, rectified='never').notes() == []
    assert open_recording(silent, rectified='always').notes() == []


def test_an_odd_camera_is_used_and_said(tmp_path):
    fx = SIZE[1] / 2 / np.tan(np.radians(2.0))
    (note,) = open_recording(of_topic(tmp_path, '/cam/image', fx=fx)).notes()
    assert 'the camera of /cam/image is odd: the field of view is 4 degrees' in note


def changing(folder, focal):
    """Return a bag whose camera_info has one focal length after the other; 0 is uncalibrated."""
    with writing(folder) as pen:
        for k, fx in enumerate(focal):
            pen.info('/cam/camera_info', START + 10 * k, fx=fx, d=(0.0,) * 5)
            data = noise(k, *SIZE).tobytes()
            pen.image('/cam/image_raw', START + 10 * k, 'mono8', data, SIZE[1])
    return pen.path


def test_a_camera_that_changes_is_that_of_each_image(tmp_path):
    recording = open_recording(changing(tmp_path, [0.0, 0.0, 30.0, 30.01, 30.0, 0.0, 60.0]))
    assert recording.camera.fx == 30.0
    expected = [30.0, 30.0, 30.0, 30.01, 30.0, 30.0, 60.0]
    for _ in range(2):  # any number of times
        seen = [recording.camera_of(stamp).fx for stamp, _ in recording]
        assert seen == expected
    assert [recording.camera_of(START + 10 * k).fx for k in range(7)] == expected
    told = [(stamp, item.fx) for stamp, kind, item in recording.messages() if kind == 'camera']
    assert told == [(START, 30.0), (START + 30, 30.01), (START + 40, 30.0), (START + 60, 60.0)]
    (note,) = recording.notes()
    assert 'changed 1 times by more than 3 px' in note


@pytest.mark.parametrize('kind', FORMATS)
def test_a_camera_that_is_given_needs_no_camera_info(tmp_path, kind):
    for k, data in enumerate((False, True)):  # raw, compressed
        (tmp_path / str(k)).mkdir()
        with writing(tmp_path / str(k), kind) as pen:
            if data:
                jpeg = cv2.imencode('.jpg', noise(0, *SIZE))[1].tobytes()
                pen.compressed('/cam/image/compressed', START, jpeg)
            else:
                pen.image('/cam/image', START, 'mono8', noise(0, *SIZE).tobytes(), SIZE[1])
        for given in ('31 32 16 12 radtan -0.1 0.01 0 0', [31, 32, 16, 12, -0.1, 0.01, 0, 0]):
            recording = open_recording(pen.path, camera=given)
            assert len(list(recording)) == 1 and recording.ground_truth is None
            c = recording.camera
            assert (c.width, c.height, c.fx, c.fy, c.cx, c.cy) == (*SIZE[::-1], 31, 32, 16, 12)
            assert (c.distortion_model, c.distortion) == ('plumb_bob', (-0.1, 0.01, 0.0, 0.0))
            assert [item for _, kind, item in recording.messages() if kind == 'camera'] == [c]


def test_a_camera_that_is_given_goes_before_camera_info(tmp_path):
    recording = open_recording(good(tmp_path), camera='40 40 16 12 fisheye 0.01 0 0 0')
    assert recording.camera.fx == 40 and recording.camera.distortion_model == 'equidistant'
    assert {recording.camera_of(stamp) for stamp, _ in recording} == {recording.camera}


def test_a_thermal_bag_keeps_its_contrast_and_reads_alike_twice(tmp_path):
    with writing(tmp_path) as pen:
        pen.info('/cam/camera_info', START)
        for k in range(4):
            samples = np.random.default_rng(k).integers(7000, 9000, SIZE).astype('<u2')
            pen.image('/cam/image', START + k, '16UC1', samples.tobytes(), 2 * SIZE[1])
    recording = open_recording(pen.path)
    one, other = list(recording), list(recording)
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(one, other, strict=True))
    assert min(np.ptp(image) for _, image in one) > 180


def test_a_camera_comes_before_the_first_image_and_where_the_calibration_changes(tmp_path):
    with writing(tmp_path) as pen:
        for k, fx in enumerate((0.0, 30.0, 30.0, 31.0, 0.0, 31.0)):
            pen.info('/cam/camera_info', START + 10 * k, fx=fx)
            pen.image(
                '/cam/image', START + 10 * k + 1, 'mono8', bytes(SIZE[0] * SIZE[1]), SIZE[1]
            )
    recording = open_recording(pen.path)
    assert recording.camera.fx == 30.0  # the first that can be used
    told = [(stamp, role) for stamp, role, _ in recording.messages()]
    assert told[:2] == [(START + 1, 'camera'), (START + 1, 'image')]
    assert [s for s, role in told if role == 'camera'] == [START + 1, START + 31]
    assert [s for s, role in told if role == 'image'] == [START + 10 * k + 1 for k in range(6)]
    for _ in range(2):
        assert len(list(recording)) == 6
        cameras = [recording.camera_of(START + 10 * k + 1).fx for k in range(6)]
        assert cameras == [30.0, 30.0, 30.0, 31.0, 31.0, 31.0]


def stamped(folder: Path, headers, kind='mcap'):
    """Return a recording of images whose headers say this, recorded every 0.1 s from START."""
    with writing(folder, kind) as pen:
        pen.info('/cam/camera_info', START)
        for k, header in enumerate(headers):
            pen.image(
                '/cam/image', START + k * DT, 'mono8', noise(k, *SIZE).tobytes(), SIZE[1],
                header_stamp=header,
            )
    return open_recording(pen.path)


RUNNING = [START + 10**15 + k * DT for k in range(8)]
FUTURE = START + 4 * 10**17  # 2037


@pytest.mark.parametrize(
    ('headers', 'kept', 'left_out'),
    [
        (RUNNING, range(8), {}),
        # twice the same
        ([*RUNNING[:3], RUNNING[2], *RUNNING[4:]], [0, 1, 2, 4, 5, 6, 7], {SAME: 1}),
        # two swapped
        ([*RUNNING[:3], RUNNING[4], RUNNING[3], *RUNNING[5:]], [0, 1, 2, 4, 5, 6, 7], {AHEAD: 1}),
        # zero now and then, and at first
        ([0, 0, *RUNNING[2:5], 0, *RUNNING[6:]], [2, 3, 4, 6, 7], {SAME: 1, FAR: 1, BACK: 1}),
        # the year 2037 once, and last
        ([*RUNNING[:4], FUTURE, *RUNNING[5:7], FUTURE], [0, 1, 2, 3, 5, 6], {FAR: 2}),
        # five seconds ahead, once
        ([*RUNNING[:4], RUNNING[4] + 50 * DT, *RUNNING[5:]], [0, 1, 2, 3, 5, 6, 7], {AHEAD: 1}),
        # played in a loop, as far as it goes on
        ([*RUNNING[:4], *RUNNING[:4]], range(4), {BACK: 3, SAME: 1}),
        # the clock was set ahead for good
        ([*(k * DT + 1 for k in range(4)), *RUNNING[4:]], range(8), {}),
    ],
    ids=['good', 'same', 'swapped', 'zero', 'future', 'ahead', 'loop', 'set'],
)
def test_images_with_stamps_that_do_not_go_on_are_left_out(tmp_path, headers, kept, left_out):
    recording = stamped(tmp_path, headers)
    for _ in range(2):  # each is counted once
        images = list(recording)
        assert [stamp for stamp, _ in images] == [headers[k] for k in kept]
        for k, (_, image) in zip(kept, images, strict=True):
            assert np.array_equal(image, noise(k, *SIZE))
        told = [stamp for stamp, role, _ in recording.messages() if role == 'image']
        assert told == [headers[k] for k in kept]
        assert recording.left_out == left_out and len(recording) == 8
    count = sum(left_out.values())
    assert [f'{count} of 8 images w' in note for note in recording.notes()] == [True][:count]


@pytest.mark.parametrize('kind', FORMATS)
@pytest.mark.parametrize('header', [0, START + 7])
def test_where_the_clock_of_the_headers_stands_still_the_time_of_recording_counts(
    tmp_path, kind, header
):
    recording = stamped(tmp_path, [header] * 4, kind)
    assert [stamp for stamp, _ in recording] == [START + k * DT for k in range(4)]
    (note,) = recording.notes()
    assert 'the clock of the headers of /cam/image does not run' in note


def test_a_single_image_is_a_recording(tmp_path):
    assert [stamp for stamp, _ in stamped(tmp_path, RUNNING[:1])] == RUNNING[:1]


@pytest.mark.parametrize('kind', ['sqlite3', 'mcap'])
def test_folder_bag_folder_and_file_are_the_same_recording(tmp_path, kind):
    bag = good(tmp_path, kind).rename(tmp_path / 'bag')
    (tmp_path / 'groundtruth.txt').write_text('# stamp pose\n1650000000.123456789 1 2 3 0 0 0 1\n')
    (tmp_path / 'depth').mkdir()
    depth = np.random.default_rng(0).uniform(1, 9, SIZE).astype(np.float32)
    np.savez(tmp_path / 'depth' / f'{START}.npz', depth=depth)
    np.save(tmp_path / 'depth' / f'{START + 1}.npy', depth)
    cv2.imwrite(
        str(tmp_path / 'depth' / f'{START + 2}.png'), np.rint(depth * 1000).astype(np.uint16)
    )
    file = next(file for file in bag.iterdir() if file.suffix != '.yaml')
    for path in (tmp_path, bag, file):
        recording = open_recording(path)
        assert len(list(recording)) == 5
        stamps, poses = recording.ground_truth
        assert stamps.tolist() == [START] and poses.tolist() == [[1, 2, 3, 0, 0, 0, 1]]
        assert np.array_equal(recording.depth(START), depth) and np.array_equal(
            recording.depth(START + 1), depth
        )
        assert recording.depth(START + 2).dtype == np.float32
        assert np.abs(recording.depth(START + 2) - depth).max() < 0.00051
        assert recording.depth(START + 3) is None
    (bag / 'metadata.yaml').unlink()  # as after a crash of the recorder
    assert len(list(open_recording(tmp_path))) == 5


def test_without_ground_truth_there_is_none(tmp_path):
    recording = open_recording(good(tmp_path))
    assert recording.ground_truth is None and recording.depth(START) is None


def sentence(path, **topics) -> str:
    """Return what is said of a bad recording, when opened or read: one line, one sentence."""
    with pytest.raises(RecordingError) as caught:
        list(open_recording(path, **topics))
    text = str(caught.value)
    assert '\n' not in text and str(path) in text
    return text


def test_a_missing_path_and_folders_without_a_bag(tmp_path):
    assert 'does not exist' in sentence(tmp_path / 'nothing.mcap')
    assert 'holds no recording' in sentence(tmp_path)
    (tmp_path / 'notes.txt').write_text('hello')
    assert 'is not a recording' in sentence(tmp_path / 'notes.txt')
    for name in ('a.mcap', 'b.mcap'):
        (tmp_path / name).touch()
    assert 'several bags' in (text := sentence(tmp_path)) and 'a.mcap, b.mcap' in text


@pytest.mark.parametrize('kind', FORMATS)
def test_no_images(tmp_path, kind):
    with writing(tmp_path, kind) as pen:
        pen.info('/cam/camera_info', START)
    assert 'has no images' in (text := sentence(pen.path)) and '/cam/camera_info' in text


def test_several_cameras_must_be_chosen_from(tmp_path):
    with writing(tmp_path) as pen:
        for k, side in enumerate(('left', 'right')):
            pen.info(f'/{side}/camera_info', START, fx=30.0 + k)
            pen.image(f'/{side}/image', START, 'mono8', noise(k, *SIZE).tobytes(), SIZE[1])
        pen.image('/debug', START, 'mono8', noise(2, *SIZE).tobytes(), SIZE[1])
    text = sentence(pen.path)
    assert '--image-topic' in text and '/debug, /left/image, /right/image' in text
    assert '/left/image' in sentence(pen.path, image_topic='/middle/image')
    right = open_recording(pen.path, image_topic='/right/image')
    assert right.camera.fx == 31.0 and np.array_equal(next(iter(right))[1], noise(1, *SIZE))
    text = sentence(pen.path, image_topic='/debug')
    assert '--camera-info-topic' in text and '/left/camera_info, /right/camera_info' in text
    assert '--camera-info-topic' in sentence(
        pen.path, image_topic='/debug', camera_info_topic='/nowhere'
    )
    assert open_recording(pen.path, '/debug', '/left/camera_info').camera.fx == 30.0


def test_no_camera_info_and_none_calibrated(tmp_path):
    with writing(tmp_path) as pen:
        pen.image('/cam/image', START, 'mono8', bytes(SIZE[0] * SIZE[1]), SIZE[1])
    text = sentence(pen.path)
    assert 'has no camera_info' in text and 'give --camera fx fy cx cy [model] [d ...]' in text
    assert 'not begin with fx fy cx cy' in sentence(pen.path, camera='40 40 16')
    assert 'nowhere.yaml does not exist' in sentence(pen.path, camera='nowhere.yaml')
    assert 'cx is 160, on or beyond' in sentence(pen.path, camera='30 30 160 120')
    (tmp_path / 'second').mkdir()
    with writing(tmp_path / 'second') as pen:
        pen.info('/cam/camera_info', START, fx=0.0)
        pen.image('/cam/image', START, 'mono8', bytes(SIZE[0] * SIZE[1]), SIZE[1])
    assert 'not calibrated: fx is 0' in sentence(pen.path)


def test_camera_info_of_another_size(tmp_path):
    with writing(tmp_path) as pen:
        pen.info('/cam/camera_info', START, size=(30, 40))
        pen.image('/cam/image', START, 'mono8', bytes(SIZE[0] * SIZE[1]), SIZE[1])
    assert 'is 32x24, but /cam/camera_info is for 40x30' in sentence(pen.path)


def test_broken_images_are_left_out_and_counted(tmp_path):
    jpegs = [cv2.imencode('.jpg', noise(k, *SIZE))[1].tobytes() for k in range(5)]
    other = cv2.imencode('.jpg', noise(5, 48, 64))[1].tobytes()
    spoilt = [b'', jpegs[0], jpegs[1], jpegs[2][:len(jpegs[2]) // 2], other, jpegs[4]]
    with writing(tmp_path) as pen:
        pen.info('/cam/camera_info', START)
        for k, data in enumerate(spoilt):
            pen.compressed('/cam/image/compressed', START + k, data)
    recording = open_recording(pen.path)
    for _ in range(2):
        assert [stamp - START for stamp, _ in recording] == [1, 2, 5]
        assert recording.left_out == {BROKEN: 2, RESIZED: 1} and len(recording) == 6
    (note,) = recording.notes()
    assert note.startswith(f'{pen.path}: 3 of 6 images were left out: 2 that cannot be read (')
    assert note.endswith('1 of another size (64x48)')


def test_a_recording_of_which_no_image_can_be_used_says_why(tmp_path):
    with writing(tmp_path) as pen:
        pen.info('/cam/camera_info', START)
        for k in range(3):
            pen.compressed('/cam/image/compressed', START + k, b'nothing')
    text = sentence(pen.path)
    assert text.startswith('no image on /cam/image/compressed in ') and '3 of 3 images' in text
    assert "the compressed image's 7 bytes are not a" in text


def test_poses_that_cannot_be_used_are_left_out_of_the_ground_truth(tmp_path):
    xs = [0.0, 1.0, float('nan'), 3.0, 4.0, 5.0]
    headers = [START, START + DT, START + 2 * DT, 0, START + DT, START + 5 * DT]
    with writing(tmp_path) as pen:
        pen.info('/cam/camera_info', START)
        pen.image('/cam/image', START, 'mono8', bytes(SIZE[0] * SIZE[1]), SIZE[1])
        for header, x in zip(headers, xs, strict=True):
            pen.pose('/ground_truth/pose', header, x)
    stamps, poses = open_recording(pen.path).ground_truth
    assert stamps.tolist() == [START, START + DT, START + 5 * DT]
    assert poses[:, 0].tolist() == [0.0, 1.0, 5.0]
    (tmp_path / 'b').mkdir()
    bag = good(tmp_path / 'b').rename(tmp_path / 'b' / 'bag')
    (tmp_path / 'b' / 'groundtruth.txt').write_text(
        '1.650000000123456789e+09 1 2 3 0 0 0 1\n1650000001.5 nan 2 3 0 0 0 1\n'
        '1650000002 1 2 3 0 0 0 0\n1650000003.000000001 4 2 3 0 0 0 1\n'
    )
    stamps, poses = open_recording(bag).ground_truth
    assert stamps.tolist() == [START, 1_650_000_003_000_000_001]
    assert poses[:, 0].tolist() == [1.0, 4.0]


def test_broken_ground_truth_and_depth(tmp_path):
    recording = open_recording(good(tmp_path).rename(tmp_path / 'bag'))
    (tmp_path / 'groundtruth.txt').write_text('1.0 1 2 3 0 0 0 1\n2.0 1 2\n')
    with pytest.raises(RecordingError, match='line 2'):
        recording.ground_truth  # noqa: B018
    (tmp_path / 'depth').mkdir()
    (tmp_path / 'depth' / '1.npz').write_bytes(b'PK nonsense')
    np.save(tmp_path / 'depth' / '2.npy', np.ones((3, 4), np.float32))
    cv2.imwrite(str(tmp_path / 'depth' / '3.png'), noise(0, *SIZE))
    for stamp, words in ((1, '1.npz'), (2, 'its shape is'), (3, 'not a 16-bit picture')):
        with pytest.raises(RecordingError, match=words):
            recording.depth(stamp)


@pytest.mark.parametrize(
    ('name', 'count', 'size'), [('redkitchen', 450, (480, 640)), ('kitti_street', 51, (376, 1241))]
)
def test_real_recordings(name, count, size):
    if not (SHARED / name).is_dir():
        pytest.skip(f'the recording {name} is not at {SHARED}')
    recording = open_recording(SHARED / name)
    stamps = []
    for stamp, image in recording:
        stamps.append(stamp)
        assert image.shape == size and image.std() > 10
    assert len(stamps) == len(recording) == count and recording.transport == 'compressed'
    assert recording.ground_truth[0].tolist() == stamps
    if name == 'redkitchen':
        depth = recording.depth(stamps[5])
        assert depth.dtype == np.float32 and 0.5 < np.median(depth[depth > 0]) < 5
        assert recording.depth(stamps[1]) is None
