"""
Ten thousand spoilt messages of each type that a node takes, and some hundreds over the wire.

No crash, each counted, each said in one sentence.
"""

import array
import time

import cv2
import numpy as np
import pytest

rclpy = pytest.importorskip('rclpy', reason="ROS 2's rclpy is not installed")

from imatching_ros.bundle.bundle import Bundle  # noqa: E402,I100
from imatching_ros.bundle.options import BundleOptions  # noqa: E402
from imatching_ros.geometry.camera import Camera  # noqa: E402
from imatching_ros.matching import weights  # noqa: E402
from imatching_ros.nodes import parameters  # noqa: E402
from imatching_ros.nodes.bundle import BundleNode  # noqa: E402
from imatching_ros.nodes.clouds import (  # noqa: E402
    correspondences_from_cloud,
    correspondences_to_cloud,
    prior_to_cloud,
    window_to_messages,
)
from imatching_ros.nodes.images import camera_to_info, image_to_message  # noqa: E402
from imatching_ros.nodes.learner import LearnerNode, PARTS  # noqa: E402
from imatching_ros.nodes.matcher import MatcherNode  # noqa: E402
from imatching_ros.nodes.qos import latched, lossless  # noqa: E402
from imatching_ros.nodes.stamps import to_header, to_ns, to_stamp  # noqa: E402
from imatching_ros.nodes.weights import weights_to_message  # noqa: E402
from imatching_ros.replay.domain import free_domain  # noqa: E402
from nav_msgs.msg import Odometry  # noqa: E402
from rclpy.context import Context  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402
from rclpy.serialization import serialize_message  # noqa: E402
from rclpy.signals import SignalHandlerOptions  # noqa: E402
from ros import picture, Ros, SECOND, START  # noqa: E402
from sensor_msgs.msg import CompressedImage, PointCloud2  # noqa: E402
from test_nodes import CAMERA as SCENE  # noqa: E402
from test_nodes import scene_correspondences  # noqa: E402

COUNT = 10_000
CAMERA = Camera(64, 48, 50.0, 50.0, 31.5, 23.5)
FRAMES = 24

# What spoils a message


LIMITS = {
    f'{sign}int{bits}': (0 if sign else -(2 ** (bits - 1)), 2 ** (bits - (not sign)) - 1)
    for sign in ('', 'u') for bits in (8, 16, 32, 64)
} | {'byte': (0, 255), 'octet': (0, 255)}
NUMBERS = (
    0.0, -0.0, 1.0, -1.0, 1e-40, 1e-12, 1e12, 1e38, 1e300, float('nan'), float('inf'),
    -float('inf'),
)
WORDS = (
    '', 'mono8', 'rgb8', 'mono16', 'bayer_rggb8', '32FC1', 'yuv422', 'plumb_bob', 'equidistant',
    'rational_polynomial', 'x', 'id', 'jpeg', 'two\nlines', 'é' * 50, '%s{}', 'x' * 5000,
)


def spoilt(rng: np.random.Generator, message):
    """Return a copy of a ROS message with one field, of it or of what it holds, changed."""
    types = message.get_fields_and_field_types()
    copy = type(message)(**{name: getattr(message, name) for name in types})
    name = str(rng.choice(list(types)))
    setattr(copy, name, _other(rng, getattr(copy, name), types[name]))
    return copy


def _other(rng: np.random.Generator, value, kind: str):
    """Another value of a ROS type, often an extreme one."""
    if kind.startswith('sequence<') or kind.endswith(']'):
        element = kind.removeprefix('sequence<').split(',')[0].split('[')[0].rstrip('>')
        if element in ('uint8', 'octet'):
            return array.array('B', _other_bytes(rng, bytes(value)))
        items, how = list(value), rng.integers(4)
        if items and (how == 0 or kind.endswith(']')):
            index = rng.integers(len(items))
            items[index] = _other(rng, items[index], element)
        elif how == 1:
            items = items[:rng.integers(len(items) + 1)]
        elif how == 2:
            items += items[:rng.integers(len(items) + 1)]
        else:
            items = [items[index] for index in rng.permutation(len(items))]
        return items
    if kind in ('float', 'double'):
        new = float(rng.choice(NUMBERS)) if rng.integers(2) else float(value) * rng.normal()
        return float(np.clip(new, -3e38, 3e38)) if kind == 'float' and np.isfinite(new) else new
    if kind == 'boolean':
        return not value
    if kind.startswith('string'):
        return str(rng.choice(WORDS))
    if kind in LIMITS:
        low, high = LIMITS[kind]
        new = (
            low, high, low + int(rng.random() * (high - low)), value + int(rng.integers(-2, 3)),
        )[rng.integers(4)]
        return min(max(new, low), high)
    return spoilt(rng, value)


def _other_bytes(rng: np.random.Generator, data: bytes) -> bytes:
    """
    Cut, lengthened, or with one byte or many changed.

    Whole numbers among them, for what is made of numbers.
    """
    how = rng.integers(5)
    if how == 0:
        return data[:rng.integers(len(data) + 1)]
    if how == 1:
        return data + rng.bytes(rng.integers(1, 100))
    new = np.frombuffer(data, np.uint8).copy()
    if how == 2 and len(new) >= 4:
        words = new[:len(new) // 4 * 4].view(np.uint32)
        which = rng.random(len(words)) < rng.choice([0.001, 0.1])
        words[which] = (
            np.float32(rng.choice(NUMBERS[:-5])).view(np.uint32)
            if rng.integers(2)
            else rng.integers(2**32)
        )
    elif len(new):
        count = 1 if how == 3 else rng.integers(1, len(new) + 1)
        new[rng.integers(0, len(new), count)] = rng.integers(0, 256, count)
    return new.tobytes()


# Good messages to spoil


def looks():
    """Images of a picture that moves to the left, one for each frame."""
    return [picture(1.5 * frame)[:48, :64].copy() for frame in range(FRAMES)]


def head(frame: int):
    return to_header(START + frame * SECOND // 20, 'camera')


def images():
    result = []
    for frame, grey in enumerate(looks()):
        kind = frame % 4
        pixels = (grey, np.stack([grey] * 3, -1), grey, grey.astype('<u2') * 257)[kind]
        message = image_to_message(grey, head(frame))
        message.encoding = ('mono8', 'rgb8', 'bayer_rggb8', 'mono16')[kind]
        message.step = pixels.nbytes // 48
        message.data = array.array('B', pixels.tobytes())
        result.append(message)
    return result


def compressed():
    result = []
    for frame, grey in enumerate(looks()):
        suffix, pixels = (('.png', grey), ('.jpg', grey), ('.png', grey.astype(np.uint16) * 257))[
            frame % 3
        ]
        data = cv2.imencode(suffix, pixels)[1].tobytes()
        result.append(
            CompressedImage(header=head(frame), format=suffix[1:], data=array.array('B', data))
        )
    return result


def infos():
    lenses = {
        'none': (), 'plumb_bob': (0.1, 0.01, 0.001, 0.001, 0.0),
        'equidistant': (0.1, 0.01, 0.001, 0.001),
        'rational_polynomial': (0.1, 0.01, 0.001, 0.001, 0.0, 0.1, 0.01, 0.0),
    }
    cameras = [Camera(64, 48, 50.0, 50.0, 31.5, 23.5, *lens) for lens in lenses.items()]
    return [camera_to_info(camera, head(0)) for camera in cameras]


def clouds():
    return [
        correspondences_to_cloud(rows, 'camera') for rows in scene_correspondences(FRAMES)
    ]


def windows():
    """Keyframes, landmarks and prior of every window that the bundle solves of the scene."""
    bundle, result = Bundle(SCENE, BundleOptions(keyframes=4)), {part: [] for part in PARTS}
    for rows in scene_correspondences(FRAMES):
        window = bundle.add(rows).window
        if window is not None:
            path, cloud = window_to_messages(window, rows.stamp, 'map')
            prior = prior_to_cloud(window.prior, rows.stamp, 'map')
            for part, message in zip(PARTS, (path, cloud, prior), strict=True):
                result[part].append(message)
    return result


def weights_messages():
    """Return a real file, and short ones of which every byte counts."""
    real = weights.default_path().read_bytes()
    length = int.from_bytes(real[:8], 'little')
    texts = [
        real[:8 + length], b'{"__metadata__":{"family":"expectation"}}', b'{"a":[1]}', b'{}',
        b'[]',
    ]
    short = [
        len(text).to_bytes(8, 'little') + text if index else text
        for index, text in enumerate(texts)
    ]
    return [weights_to_message(data) for data in [real, *16 * short]]


# A node that takes them


class Fed:
    """A node in this process, whose topics are fed by calling what ROS would call."""

    def __init__(self, node_class, context, **values) -> None:
        given = [
            Parameter(name, value=value)
            for name, value in {'queue_size': 100_000, **values}.items()
        ]
        self.node = node_class(context=context, parameter_overrides=given)
        self.sentences: list[str] = []
        say = self.node.health.fault
        self.node.health.fault = lambda sentence: (self.sentences.append(sentence), say(sentence))[
            1
        ]
        self.node.start()
        self.callbacks = {s.topic_name.lstrip('/'): s.callback for s in self.node.subscriptions}
        self.fed = 0

    def feed(self, topic: str, message) -> None:
        self.callbacks[topic](message)

    def calibrate(self, camera: Camera) -> None:
        self.feed('camera_info', camera_to_info(camera, head(0)))

    def drain(self) -> None:
        """Until all is worked off. The core's thread answers, so it lives."""
        while self.node.worker.waiting():
            time.sleep(0.05)
        self.node.worker.request(lambda: None).result(60)

    def settle(self) -> None:
        """Nothing was lost, and nothing was said that nobody had thought of."""
        self.drain()
        health = self.node.health
        assert health.received == health.processed + health.refused + health.dropped
        assert health.dropped == 0 and health.faults == len(self.sentences) >= health.refused
        for sentence in self.sentences:
            assert 'unexpected' not in sentence, sentence
            assert '\n' not in sentence and len(sentence) < 500, sentence


@pytest.fixture(scope='module')
def context():
    context = Context()
    with free_domain() as domain:
        rclpy.init(
            args=[], context=context, domain_id=domain,
            signal_handler_options=SignalHandlerOptions.NO,
        )
        yield context
        rclpy.shutdown(context=context)


@pytest.fixture
def fed(context):
    made = []

    def make(node_class, **values) -> Fed:
        made.append(Fed(node_class, context, **values))
        return made[-1]

    yield make
    for each in made:
        each.node.close()
        each.node.destroy_node()


def storm(
    fed: Fed, topic: str, good: list, seed: int, count: int = COUNT, between=lambda index: None
) -> None:
    """Spoilt messages, with good ones among them so that there is always something to lose."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        message = good[index % len(good)]
        for _ in range(rng.integers(1, 5) if index % 10 else 0):
            message = spoilt(rng, message)
        between(index)
        fed.feed(topic, message)


# The storms


def test_fuzz_images(fed):
    matcher = fed(MatcherNode, processing_mode='all', queries=8, references=1)
    matcher.calibrate(CAMERA)
    storm(matcher, 'image', images(), 0)
    matcher.settle()
    assert matcher.node.health.processed > 100 and matcher.node.health.refused > 1000


def test_fuzz_compressed_images(fed):
    learner = fed(LearnerNode, image_transport='compressed')
    learner.calibrate(CAMERA)
    storm(learner, 'image/compressed', compressed(), 1)
    learner.settle()
    assert learner.node.health.processed > 100 and learner.node.health.refused > 100


def test_fuzz_camera_info(fed):
    """Images come all the while; in the end a good calibration brings all back."""
    matcher = fed(MatcherNode, processing_mode='all', queries=8, references=1)
    pictures = images()

    def between(index: int) -> None:
        if index % 20 == 0:
            matcher.feed('image', pictures[index // 20 % FRAMES])

    storm(matcher, 'camera_info', infos(), 2, between=between)
    matcher.drain()
    matcher.calibrate(CAMERA)
    before = matcher.node.health.processed
    for frame, message in enumerate(pictures):
        message.header = head(FRAMES + frame)  # later than those that came in the storm
        matcher.feed('image', message)
    matcher.settle()
    assert matcher.node.health.processed - before >= FRAMES - 1
    assert matcher.node.health.faults > 1000


def test_fuzz_correspondences(fed):
    bundle = fed(BundleNode)
    bundle.calibrate(SCENE)
    storm(bundle, 'correspondences', clouds(), 3)
    bundle.settle()
    assert bundle.node.health.processed > 100 and bundle.node.health.refused > 1000


def test_fuzz_weights(fed):
    matcher = fed(MatcherNode)
    storm(matcher, 'weights', weights_messages(), 4)
    matcher.settle()
    assert matcher.node.health.faults > 1000


@pytest.mark.parametrize('spoils', PARTS)
def test_fuzz_windows(fed, spoils):
    """
    Each spoilt part with its good other parts.

    The images and correspondences of all are there.
    """
    learner = fed(LearnerNode)
    learner.calibrate(SCENE)
    for frame, rows in enumerate(clouds()):
        learner.feed('image', image_to_message(picture(1.5 * frame), head(frame)))
        learner.feed('correspondences', rows)
    whole = windows()

    def others(index: int) -> None:
        for part in PARTS.keys() - {spoils}:
            learner.feed(part, whole[part][index % len(whole[part])])

    storm(learner, spoils, whole[spoils], 5, between=others)
    learner.settle()
    assert learner.node.health.refused > 1000


def test_fuzz_odometry(fed):
    """What another odometry says; in the end it is listened to again."""
    bundle = fed(BundleNode)
    bundle.calibrate(SCENE)
    rows, poses = clouds(), []
    for frame in range(24):
        message = Odometry(
            header=to_header(START + frame * SECOND // 20, 'odom'), child_frame_id='camera'
        )
        message.pose.pose.position.x, message.pose.pose.orientation.w = 0.01 * frame, 1.0
        poses.append(message)
    for message in rows:
        bundle.feed('correspondences', message)
    storm(bundle, 'external_odometry', poses, 6)
    bundle.drain()
    assert bundle.node.health.faults > 1000
    before = bundle.node.odometry
    for frame, message in enumerate(poses):  # later than any spoilt one that was taken
        message.header.stamp = to_stamp(START + 12 * SECOND + frame)
    rows[0].header.stamp = to_stamp(START + 11 * SECOND)
    bundle.feed('correspondences', rows[0])
    bundle.drain()
    for message in poses:
        bundle.feed('external_odometry', message)
    bundle.settle()
    assert bundle.node.odometry == before + len(poses)


def test_fuzz_over_the_wire(tmp_path):
    """
    What another process says: spoilt messages, and bytes that are none.

    The three nodes live, count and say it, and work on what is good afterwards.
    """
    ros, rng, now = Ros(tmp_path), np.random.default_rng(7), START + 1000 * SECOND
    try:
        ros.start('matcher', image_qos='keep_all', processing_mode='all', queries=50)
        ros.start('bundle', image_qos='keep_all', queue_size=10_000)
        ros.start(
            'learner', image_qos='keep_all', image_transport='compressed', queue_size=10_000
        )
        good = {
            'camera_info': infos(), 'image': images(), 'image/compressed': compressed(),
            'correspondences': clouds(), 'weights': weights_messages(), **windows(),
            'external_odometry': [
                Odometry(header=head(frame), child_frame_id='camera') for frame in range(FRAMES)
            ],
        }
        ends = {'camera_info': 3, 'correspondences': 2}
        publishers = {}
        for topic, each in good.items():
            late = latched(100) if topic in PARTS else latched() if topic == 'weights' else None
            publisher = ros.node.create_publisher(type(each[0]), topic, late or lossless())
            ros.connect(publisher, ends.get(topic, 1))
            publishers[topic] = publisher
        matched = ros.listen(PointCloud2, 'correspondences', lossless())
        poses = ros.listen(Odometry, 'odometry', lossless())
        for role in parameters.NODES:
            ros.wait(lambda role=role: ros.says(role).get('lifecycle') == 'active')
        publishers['camera_info'].publish(camera_to_info(CAMERA, head(0)))
        for index in range(300):
            for topic, publisher in publishers.items():
                message = good[topic][index % len(good[topic])]
                if index % 3 == 0:
                    # Of nothing at all, Fast DDS waits for the rest for ever
                    publisher.publish(_other_bytes(rng, serialize_message(message)) or b'\0')
                else:
                    publisher.publish(spoilt(rng, spoilt(rng, message)))
            time.sleep(0.005)
        publishers['camera_info'].publish(camera_to_info(SCENE, head(0)))

        def settled(role: str) -> dict[str, str] | None:
            """Its diagnostics, where all that it received is accounted for."""
            says = ros.says(role)
            done = sum(int(says[key]) for key in ('processed', 'refused', 'dropped'))
            return says if says['waiting'] == '0' and int(says['received']) == done else None

        time.sleep(3.0)  # until diagnostics are of afterwards
        before = {role: ros.wait(lambda role=role: settled(role)) for role in parameters.NODES}
        assert all(int(says['refused']) > 30 for says in before.values()), before
        last = len(matched)
        for frame in range(FRAMES):
            stamp = to_header(now + frame * SECOND // 20, 'camera')
            publishers['image'].publish(image_to_message(picture(1.5 * frame), stamp))
            data = cv2.imencode('.png', picture(1.5 * frame))[1].tobytes()
            publishers['image/compressed'].publish(
                CompressedImage(header=stamp, format='png', data=array.array('B', data))
            )
        stamps = [to_ns(head(frame).stamp) + now - START for frame in range(FRAMES)]
        ros.wait(lambda: {to_ns(m.header.stamp) for m in matched[last:]} >= {*stamps})
        assert len(correspondences_from_cloud(matched[-1])) > 20
        for role in parameters.NODES:
            ros.wait(
                lambda role=role: (
                    settled(role)
                    and int(ros.says(role)['processed']) - int(before[role]['processed']) >= FRAMES
                )
            )
        last = len(poses)
        for cloud in clouds():  # of long before: the clock goes back, and a new map begins
            publishers['correspondences'].publish(cloud)
        ros.wait(lambda: len(poses) > last)
        sentences = {
            'matcher': 'the weights message: ', 'bundle': 'external_odometry: ',
            'learner': 'camera_info: ',
        }
        for role, sentence in sentences.items():
            log = ros.log(role)
            assert sentence in log and 'unexpected' not in log and 'Traceback' not in log, log
    finally:
        ros.close()
