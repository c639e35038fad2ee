"""
The nodes as a robot meets them.

Real processes, real topics, good and bad input, a clean end.
"""

import json
from pathlib import Path
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

rclpy = pytest.importorskip('rclpy', reason="ROS 2's rclpy is not installed")

from imatching_ros.bundle.bundle import Bundle  # noqa: E402,I100
from imatching_ros.data.recording import open_recording  # noqa: E402
from imatching_ros.data.synthetic import render_recording  # noqa: E402
from imatching_ros.geometry import lie  # noqa: E402
from imatching_ros.geometry.correspondences import Correspondences  # noqa: E402
from imatching_ros.matching import weights  # noqa: E402
from imatching_ros.matching.tracker import Tracker, TrackerOptions  # noqa: E402
from imatching_ros.nodes import parameters, player  # noqa: E402
from imatching_ros.nodes.bundle import transform  # noqa: E402
from imatching_ros.nodes.clouds import (  # noqa: E402
    correspondences_from_cloud,
    correspondences_to_cloud,
    window_from_messages,
)
from imatching_ros.nodes.images import camera_to_info  # noqa: E402
from imatching_ros.nodes.player import PlayerNode  # noqa: E402
from imatching_ros.nodes.poses import (  # noqa: E402
    odometry_to_message,
    pose_from_message,
    pose_from_numbers,
    pose_from_transform,
)
from imatching_ros.nodes.qos import latched, lossless  # noqa: E402
from imatching_ros.nodes.stamps import to_header, to_ns, to_stamp  # noqa: E402
from imatching_ros.nodes.weights import weights_from_message, weights_to_message  # noqa: E402
from imatching_ros.nodes.worker import Worker  # noqa: E402
from imatching_ros.replay import replay, ReplayError  # noqa: E402
from nav_msgs.msg import Odometry  # noqa: E402
from nav_msgs.msg import Path as PathMessage  # noqa: E402
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue  # noqa: E402
from rcl_interfaces.srv import GetParameters, SetParametersAtomically  # noqa: E402
from rclpy.time import Time  # noqa: E402
from ros import CAMERA, image_message, picture, Ros, SECOND, START  # noqa: E402
from sensor_msgs.msg import CameraInfo, Image, PointCloud, PointCloud2  # noqa: E402
from std_msgs.msg import UInt8MultiArray  # noqa: E402
from std_srvs.srv import SetBool, Trigger  # noqa: E402
from test_recording import SIZE, writing  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def ros(tmp_path_factory):
    ros = Ros(tmp_path_factory.mktemp('nodes'))
    yield ros
    ros.close()


@pytest.fixture(scope='module')
def first_weights(tmp_path_factory):
    torch.manual_seed(0)
    from imatching_ros.matching.families.expectation import ExpectationMatcher

    path = tmp_path_factory.mktemp('weights') / 'first.safetensors'
    try:
        matcher, _ = weights.load(weights.default_path())
    except FileNotFoundError:
        matcher = ExpectationMatcher().eval()
    weights.save(path, matcher, 3, 3)
    return path


def scene_correspondences(frames: int = 24) -> list[Correspondences]:
    """
    Exact correspondences of points in a box seen by a camera that moves sideways.

    Every fourth is a keyframe.
    """
    g = torch.Generator().manual_seed(0)
    points = torch.rand(150, 3, generator=g) * torch.tensor([6.0, 4.0, 4.0]) + torch.tensor(
        [-2.0, -2.0, 4.0]
    )
    focal, centre = torch.tensor([CAMERA.fx, CAMERA.fy]), torch.tensor([CAMERA.cx, CAMERA.cy])

    def look(frame: int) -> torch.Tensor:
        p = points - torch.tensor([0.06 * frame, 0.01 * frame, 0.0])
        return p[:, :2] / p[:, 2:]

    result = []
    for frame in range(frames):
        references = [k for k in range(frame - frame % 4 - 4, frame, 4) if k >= 0]
        n, xy = len(points), look(frame)
        count = n * len(references)
        result.append(
            Correspondences(
                stamp=START + frame * SECOND // 20,
                uv=(xy * focal + centre).repeat(len(references), 1),
                xy=xy.repeat(len(references), 1),
                ref_stamp=torch.tensor(
                    [START + k * SECOND // 20 for k in references], dtype=torch.int64
                ).repeat_interleave(n),
                ref_uv=torch.cat([look(k) * focal + centre for k in references])
                if references
                else torch.empty(0, 2),
                track=torch.arange(n).repeat(len(references)),
                score=torch.ones(count),
                cov=torch.tensor([0.2, 0.0, 0.2]).repeat(count, 1),
                model=1,
            )
        )
    return result


# The matcher


@pytest.fixture(scope='module')
def matcher(ros, first_weights):
    """Return a matcher node that has been fed nothing yet, and the ends of its topics."""
    ros.start(
        'matcher', image_qos='keep_all', processing_mode='all', weights=str(first_weights),
        queries=100, vins_features=True,
    )
    ros.images = ros.node.create_publisher(Image, 'image', lossless())
    ros.infos = ros.node.create_publisher(CameraInfo, 'camera_info', lossless())
    ros.weights = ros.node.create_publisher(UInt8MultiArray, 'weights', latched())
    ros.matched = ros.listen(PointCloud2, 'correspondences', lossless())
    ros.features = ros.listen(PointCloud, 'feature_tracker/feature', lossless())
    ros.connect(ros.images)
    ros.connect(ros.infos)
    ros.connect(ros.weights)
    ros.wait(lambda: ros.says('matcher'))
    ros.now = START
    return ros


def play(ros: Ros, image: np.ndarray) -> Correspondences:
    """Send the next image and wait for its correspondences."""
    ros.now += SECOND // 20
    before = len(ros.matched)
    ros.infos.publish(camera_to_info(CAMERA, to_header(ros.now, 'camera_optical')))
    ros.images.publish(image_message(ros.now, image))
    ros.wait(lambda: len(ros.matched) > before)
    answer = correspondences_from_cloud(ros.matched[-1])
    assert answer.stamp == ros.now
    return answer


def test_matcher_node_publishes_what_its_tracker_finds(matcher, first_weights):
    """
    Also: without camera_info it says so and waits.

    With one that is not calibrated it says that.
    """
    pictures = [picture(3.0 * index) for index in range(5)]
    stamps = [START + index * SECOND // 20 for index in range(1, 6)]
    matcher.images.publish(image_message(stamps[0], pictures[0]))
    matcher.wait(lambda: matcher.says('matcher')['waiting'] == '1')
    assert matcher.says('matcher')['level'] == 2
    assert 'no usable camera_info has come on /camera_info' in matcher.says('matcher')['message']
    matcher.infos.publish(CameraInfo(width=160, height=120))
    matcher.wait(lambda: 'not calibrated: fx is 0' in matcher.says('matcher')['last_error'])
    matcher.infos.publish(camera_to_info(CAMERA, to_header(0, 'camera_optical')))
    matcher.wait(lambda: len(matcher.matched) == 1)

    model, info = weights.load(first_weights)
    tracker = Tracker(model, info.version, CAMERA, TrackerOptions(queries=100))
    for index, (stamp, image) in enumerate(zip(stamps, pictures, strict=True)):
        expected = tracker.track(stamp, image)
        got = (
            correspondences_from_cloud(matcher.matched[0])
            if index == 0
            else play(matcher, image)
        )
        matcher.now = stamp
        assert (got.stamp, len(got)) == (stamp, len(expected))
        assert torch.equal(got.ref_stamp, expected.ref_stamp) and torch.equal(
            got.track, expected.track
        )
        torch.testing.assert_close(got.uv, expected.uv, atol=1e-3, rtol=0)
        torch.testing.assert_close(got.ref_uv, expected.ref_uv, atol=1e-3, rtol=0)
        assert got.model == (3 if len(got) else 0)
    assert len(got) > 20
    assert matcher.matched[-1].header.frame_id == 'camera_optical'
    features = matcher.wait(
        lambda: (f := matcher.features) and f[-1].header == matcher.matched[-1].header and f[-1]
    )
    assert len(features.channels) == 9 and len(features.points) == len(set(got.track.tolist()))
    matcher.wait(lambda: matcher.says('matcher')['processed'] == '5')
    says = matcher.says('matcher')
    assert (says['received'], says['dropped'], says['refused'], says['model_version']) == (
        '5', '0', '0', '3',
    )
    assert float(says['latency_p50_ms']) > 0 and float(says['peak_memory_mb']) > 50


def test_matcher_node_swaps_weights_between_two_images(matcher, first_weights):
    model, _ = weights.load(first_weights)
    data, _ = weights.dumps(model, 4, 3)
    assert play(matcher, picture(1.0)).model == 3
    matcher.weights.publish(weights_to_message(data))
    matcher.wait(lambda: matcher.says('matcher')['model_version'] == '4')
    after = play(matcher, picture(2.0))
    assert after.model == 4 and len(after) > 20  # the tracks live on


def date_back(message: Image, ns: int) -> None:
    """Make the image so much older."""
    message.header.stamp = to_stamp(to_ns(message.header.stamp) - ns)


@pytest.mark.parametrize(
    ('spoil', 'sentence'),
    [
        (lambda m: setattr(m, 'encoding', '64FC2'), "image encoding '64FC2' is not supported"),
        (lambda m: setattr(m, 'data', bytes(m.data)[:1000]), 'the image has 1000 bytes'),
        (lambda m: setattr(m, 'height', 60), 'the image is 160x60, camera_info says 160x120'),
        (lambda m: setattr(m, 'height', 0), 'the image is 160x0, camera_info says 160x120'),
        (lambda m: date_back(m, SECOND // 20), 'the same stamp'),
        (lambda m: date_back(m, SECOND // 2), 'an older stamp'),
    ],
    ids=['encoding', 'cut', 'size', 'empty', 'duplicate', 'late'],
)
def test_fault_bad_image_is_said_and_counted_and_the_matcher_node_lives_on(
    matcher, spoil, sentence
):
    play(matcher, picture(0.0))
    before = int(matcher.wait(lambda: matcher.says('matcher'))['refused'])
    matcher.now += SECOND // 20
    message = image_message(matcher.now, picture(1.0))
    spoil(message)
    matcher.images.publish(message)
    says = matcher.wait(lambda: int((s := matcher.says('matcher'))['refused']) > before and s)
    assert int(says['refused']) == before + 1 and sentence in says['last_error']
    assert sentence in matcher.log('matcher')
    play(matcher, picture(2.0))


@pytest.mark.parametrize('kind', ['foreign', 'damaged', 'cut'])
def test_fault_bad_weights_are_refused_and_the_matcher_node_keeps_its_own(
    matcher, first_weights, kind
):
    data = bytearray(first_weights.read_bytes())
    if kind == 'foreign':
        import safetensors.torch

        data = safetensors.torch.save({'x': torch.zeros(3)}, {'family': 'other'})
    elif kind == 'damaged':
        data[-100] ^= 255
    else:
        data = data[:len(data) // 2]
    before = int(matcher.says('matcher')['faults'])
    version = matcher.says('matcher')['model_version']
    matcher.weights.publish(weights_to_message(bytes(data)))
    says = matcher.wait(lambda: int((s := matcher.says('matcher'))['faults']) > before and s)
    expected = {'foreign': "family 'other'", 'damaged': 'damaged', 'cut': 'cut short'}[kind]
    assert 'the weights message: ' in says['last_error'] and expected in says['last_error']
    play(matcher, picture(0.0))
    assert str(play(matcher, picture(1.0)).model) == version


def test_fault_clock_that_goes_back_starts_the_matcher_node_afresh(matcher):
    assert len(play(matcher, picture(0.0)))
    before = int(matcher.says('matcher')['refused'])
    matcher.now = START - 100 * SECOND
    matcher.images.publish(image_message(matcher.now, picture(1.0)))  # is not believed yet
    assert len(play(matcher, picture(1.0))) == 0
    assert len(play(matcher, picture(2.0)))
    matcher.wait(lambda: 'the clock went back by' in matcher.says('matcher')['last_error'])
    matcher.wait(lambda: int(matcher.says('matcher')['refused']) == before + 1)


def test_fault_one_bad_stamp_does_not_disturb_the_matcher_node(matcher):
    play(matcher, picture(0.0))
    before = int(matcher.says('matcher')['refused'])
    for bad in (0, matcher.now - 100 * SECOND, matcher.now + 100 * SECOND, 2**31 * SECOND - 1):
        last = matcher.now
        matcher.images.publish(image_message(bad, picture(0.0)))
        found = play(matcher, picture(1.0))
        assert len(found) > 20 and found.ref_stamp.max() <= last
    says = matcher.wait(
        lambda: int((s := matcher.says('matcher'))['refused']) == before + 4 and s
    )
    assert 'ahead of the one before is ignored, unless the next one goes' in says['last_error']
    later = matcher.now + 100 * SECOND
    matcher.images.publish(image_message(later, picture(1.0)))
    matcher.now = later
    play(matcher, picture(1.0))  # the second one that says so is believed
    matcher.wait(lambda: 'the clock went forward by 100' in matcher.says('matcher')['last_error'])


def test_matcher_node_services_and_parameters(matcher, first_weights):
    answer = matcher.call(Trigger, 'matcher/reload_weights')
    assert answer.success and answer.message == f'version 3 from {first_weights}'
    assert matcher.call(Trigger, 'matcher/reset').success
    assert len(play(matcher, picture(0.0))) == 0

    def change(**values):
        changes = [
            Parameter(
                name=name,
                value=ParameterValue(type=ParameterType.PARAMETER_DOUBLE, double_value=value),
            )
            for name, value in values.items()
        ]
        request = SetParametersAtomically.Request(parameters=changes)
        return matcher.call(
            SetParametersAtomically, 'matcher/set_parameters_atomically', request
        ).result

    refused = change(agreement_px=0.1, round_trip_px=-1.0)
    assert not refused.successful and 'round_trip_px' in refused.reason and '50' in refused.reason
    request = GetParameters.Request(names=['agreement_px', 'round_trip_px'])
    values = matcher.call(GetParameters, 'matcher/get_parameters', request).values
    assert [value.double_value for value in values] == [3.0, 1.0]  # all of one set, or none of it
    assert len(play(matcher, picture(1.0)))
    assert change(round_trip_px=0.1, agreement_px=1.0).successful
    before = len(matcher.matched[-1].data)
    play(matcher, picture(2.5))
    assert len(matcher.matched[-1].data) < before  # a stricter check keeps fewer
    assert change(round_trip_px=1.0, agreement_px=3.0).successful


# The bundle


def test_bundle_node_publishes_what_its_core_finds(ros, tmp_path):
    """
    Odometry, keyframes and landmarks are the core's own; reset and save_map work.

    Bad rows do no harm.
    """
    ros.start('bundle', image_qos='keep_all', map_dir=str(tmp_path))
    odometry = ros.listen(Odometry, 'odometry', lossless())
    keyframes = ros.listen(PathMessage, 'keyframes', latched(100))
    landmarks = ros.listen(PointCloud2, 'landmarks', latched(100))
    priors = ros.listen(PointCloud2, 'prior', latched(100))
    infos = ros.node.create_publisher(CameraInfo, 'camera_info', lossless())
    rows = ros.node.create_publisher(PointCloud2, 'correspondences', lossless())
    ros.wait(lambda: ros.says('bundle'))
    ros.wait(lambda: ros.node.count_subscribers('/camera_info') >= 1)
    ros.connect(rows, 1)
    topics = ('/odometry', '/keyframes', '/landmarks', '/prior')
    ros.wait(lambda: all(ros.node.count_publishers(topic) for topic in topics))
    # Before that it says that its kernels are not loaded yet
    ros.wait(lambda: 'no usable camera_info' in ros.says('bundle')['message'])
    infos.publish(camera_to_info(CAMERA, to_header(0, 'camera_optical')))

    core, sent = Bundle(CAMERA), scene_correspondences()
    estimates = [core.add(correspondences) for correspondences in sent]
    broken = correspondences_to_cloud(sent[5], 'camera_optical')
    broken.data = np.full(len(broken.data), 255, np.uint8).tobytes()
    for index, correspondences in enumerate(sent):
        if index == 5:
            rows.publish(broken)
        rows.publish(correspondences_to_cloud(correspondences, 'camera_optical'))
    posed = [e for e in estimates if e.T_world_camera is not None]
    solved = [e for e in estimates if e.window is not None]
    assert len(posed) > 5 and len(solved) > 1, 'the scene is meant to be easy'
    ros.wait(lambda: len(odometry) == len(posed))
    ros.wait(lambda: len(keyframes) == len(landmarks) == len(priors) == len(solved))
    for message, estimate in zip(odometry, posed, strict=True):
        assert to_ns(message.header.stamp) == estimate.stamp
        assert (message.header.frame_id, message.child_frame_id) == ('map', 'camera_optical')
        pose = pose_from_message(message.pose.pose)
        torch.testing.assert_close(pose, estimate.T_world_camera, atol=1e-6, rtol=0)
        assert np.linalg.eigvalsh(message.pose.covariance.reshape(6, 6)).min() >= -1e-12
    for path, cloud, prior, estimate in zip(keyframes, landmarks, priors, solved, strict=True):
        window = window_from_messages(path, cloud, prior)
        assert (window.prior is None) == (estimate.window.prior is None)
        assert torch.equal(window.stamps, estimate.window.stamps)
        assert torch.equal(window.track, estimate.window.track)
        assert torch.equal(window.observations, estimate.window.observations)
        torch.testing.assert_close(window.points, estimate.window.points, atol=1e-5, rtol=1e-5)
    # Images before the first map get their poses only with it: odometry's stamps never go back,
    # so they are not there, but the keyframes among them are in the window
    begun = to_ns(odometry[0].header.stamp)
    late = next(e.earlier for e in estimates if e.earlier)
    first = window_from_messages(keyframes[0], landmarks[0], priors[0]).stamps.tolist()
    assert begun > max(late) and set(first) <= set(late) and len(first) >= 3
    says = ros.wait(lambda: (s := ros.says('bundle'))['processed'] == str(len(sent)) and s)
    assert (says['refused'], says['dropped'], says['status']) == ('1', '0', estimates[-1].status)
    assert 'not finite' in says['last_error']
    counts = (len(posed), len(solved), estimates[-1].inliers, core.keyframes, core.maps)
    names = ('poses', 'windows', 'inliers', 'keyframes', 'maps')
    assert tuple(int(says[name]) for name in names) == counts
    assert (says['motion'], says['scale']) == (estimates[-1].motion, 'arbitrary')

    answer = ros.call(Trigger, 'bundle/save_map')
    assert answer.success, answer.message
    lines = (tmp_path / 'trajectory.txt').read_text().splitlines()
    assert len(lines) == 1 + len(core.trajectory)
    assert lines[1].startswith(f'{START // SECOND}.')  # the first keyframe, posed late
    ply = (tmp_path / 'landmarks.ply').read_bytes()
    assert ply.startswith(b'ply\nformat binary_little_endian 1.0\nelement vertex ')
    assert ros.call(Trigger, 'bundle/reset').success
    assert ros.call(Trigger, 'bundle/save_map').success
    assert len((tmp_path / 'trajectory.txt').read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ('poses', 'mounting'),
    [('own', 'camera_pose'), ('external', 'camera_pose'), ('own', 'tf2'), ('external', 'tf2')],
)
def test_bundle_node_beside_another_odometry(ros, poses, mounting):
    """
    The robot's odometry gives the map its metre, or all of its poses.

    Camera_pose, or /tf_static, says where the camera is on it, and what is published goes to /tf.
    """
    tf2, role = mounting == 'tf2', 'bundle'
    if tf2:
        reason = 'tf2_ros is not installed (a ROS 2 installation has it)'
        tf2_ros = pytest.importorskip('tf2_ros', reason=reason)
        broadcaster, buffer = tf2_ros.StaticTransformBroadcaster(ros.node), tf2_ros.Buffer()
        listener = tf2_ros.TransformListener(buffer, ros.node)
    if role in ros.processes:
        ros.end(role)
    T_base_camera = pose_from_numbers((0.3, -0.1, 0.2, -0.5, 0.5, -0.5, 0.5))
    numbers = [0.0] * 7 if tf2 else T_base_camera.tolist()
    ros.start(role, image_qos='keep_all', poses=poses, camera_pose=numbers, publish_tf=tf2)
    odometry = ros.listen(Odometry, 'odometry', lossless())
    infos = ros.node.create_publisher(CameraInfo, 'camera_info', lossless())
    rows = ros.node.create_publisher(PointCloud2, 'correspondences', lossless())
    robot = ros.node.create_publisher(Odometry, 'external_odometry', lossless())
    for publisher in (infos, rows, robot):
        ros.connect(publisher)
    ros.wait(lambda: ros.node.count_publishers('/odometry'))
    if tf2:
        broadcaster.sendTransform(
            transform(odometry_to_message(T_base_camera, None, 0, 'base_link', 'camera_optical'))
        )
        ros.wait(lambda: ros.node.count_publishers('/tf'))
    time.sleep(0.5)
    infos.publish(camera_to_info(CAMERA, to_header(0, 'camera_optical')))
    ros.wait(lambda: 'camera_info' not in ros.says(role).get('message', 'camera_info'))
    before, truth = len(odometry), {}
    for index, correspondences in enumerate(scene_correspondences(40)):
        T = lie.identity()
        T[:3] = torch.tensor([0.06 * index, 0.01 * index, 0.0])
        truth[correspondences.stamp] = T[:3]
        body = lie.compose(T, lie.inverse(T_base_camera))
        matches = correspondences_to_cloud(correspondences, 'camera_optical')
        if index == 0:  # they name the camera's frame
            rows.publish(matches)
            ros.wait(lambda: ros.says(role).get('processed') == '1')
        robot.publish(odometry_to_message(body, None, correspondences.stamp, 'odom', 'base_link'))
        ros.wait(
            lambda index=index: (
                int(ros.says(role).get('external_odometry', 0)) > index or index % 10
            )
        )
        if index > 0:
            rows.publish(matches)
    ros.wait(lambda: ros.says(role).get('processed') == '40')
    says = ros.says(role)
    assert (says['scale'], says['external_odometry'], says['status']) == (
        'metric', '40', 'tracking',
    ), says
    poses_of = {
        to_ns(m.header.stamp): pose_from_message(m.pose.pose)
        for m in odometry[before:]
    }
    first, last = min(poses_of), max(poses_of)
    moved = (poses_of[last] - poses_of[first])[:3].norm()
    assert float(moved) == pytest.approx(float((truth[last] - truth[first]).norm()), rel=0.05)
    world = 'odom' if poses == 'external' else 'map'
    assert odometry[-1].header.frame_id == world
    if poses == 'external':
        torch.testing.assert_close(poses_of[last][:3], truth[last], atol=1e-3, rtol=0)
    if tf2:
        ros.wait(lambda: buffer.can_transform(world, 'camera_optical', Time(nanoseconds=last)))
        for stamp in (first, last):
            found = buffer.lookup_transform(world, 'camera_optical', Time(nanoseconds=stamp))
            one, other = pose_from_transform(found.transform), poses_of[stamp]
            torch.testing.assert_close(lie.matrix(one), lie.matrix(other), atol=1e-9, rtol=0)
        listener.unregister()
        ros.node.destroy_publisher(broadcaster.pub_tf)
    ros.end(role)


def test_fault_odometry_of_an_unknown_frame_is_said(ros):
    """Without camera_pose and tf2 nobody can know where the camera is on the robot."""
    ros.start('bundle', image_qos='keep_all')
    infos = ros.node.create_publisher(CameraInfo, 'camera_info', lossless())
    rows = ros.node.create_publisher(PointCloud2, 'correspondences', lossless())
    robot = ros.node.create_publisher(Odometry, 'external_odometry', lossless())
    for publisher in (infos, rows, robot):
        ros.connect(publisher)
    infos.publish(camera_to_info(CAMERA, to_header(0, 'camera_optical')))
    sent = scene_correspondences(2)
    rows.publish(correspondences_to_cloud(sent[0], 'camera_optical'))
    ros.wait(lambda: ros.says('bundle').get('processed') == '1')
    robot.publish(odometry_to_message(lie.identity(), None, sent[0].stamp, 'odom', 'base_link'))
    ros.wait(lambda: 'where the camera' in ros.says('bundle')['last_error'])
    assert "'base_link' is not known" in ros.says('bundle')['last_error']
    ros.end('bundle')


# The learner


def test_learner_node_answers_its_services_and_a_kill_loses_nothing(ros, first_weights, tmp_path):
    ros.start(
        'learner', image_qos='keep_all', weights=str(first_weights), weights_dir=str(tmp_path)
    )
    published = ros.listen(UInt8MultiArray, 'weights', latched())
    infos = ros.node.create_publisher(CameraInfo, 'camera_info', lossless())
    images = ros.node.create_publisher(Image, 'image', lossless())
    ros.wait(lambda: ros.says('learner'))
    ros.connect(images)
    assert not ros.call(Trigger, 'learner/save_checkpoint').success  # nothing has come yet
    assert ros.call(Trigger, 'learner/reset').success
    time.sleep(0.5)
    infos.publish(camera_to_info(CAMERA, to_header(0, 'camera_optical')))
    images.publish(image_message(START, picture()))
    ros.wait(lambda: int(ros.says('learner')['processed']) >= 1)

    answer = ros.call(SetBool, 'learner/enable', SetBool.Request(data=False))
    assert answer.success
    ros.wait(lambda: ros.says('learner')['enabled'] == 'false')
    answer = ros.call(Trigger, 'learner/save_checkpoint')
    assert answer.success and json.loads(Path(answer.message).read_text())['version'] == 3
    before = len(published)
    assert ros.call(Trigger, 'learner/rollback').success
    assert ros.call(Trigger, 'learner/reset').success
    ros.wait(lambda: len(published) >= before + 2)
    for message in published[before:]:
        model, info = weights.loads(weights_from_message(message))
        assert info.version > 3
        assert weights.load(tmp_path / f'version_{info.version:04d}.safetensors')[1] == info
    if 'matcher' in ros.processes:  # it took over what the learner published
        ros.wait(lambda: ros.says('matcher')['model_version'] == str(info.version))
    assert ros.call(Trigger, 'learner/save_checkpoint').success
    before = len(published)
    ros.kill('learner')
    ros.start(
        'learner', image_qos='keep_all', weights=str(first_weights), weights_dir=str(tmp_path)
    )
    ros.wait(lambda: ros.says('learner'))
    ros.connect(infos)
    ros.connect(images)
    time.sleep(0.5)
    infos.publish(camera_to_info(CAMERA, to_header(0, 'camera_optical')))
    images.publish(image_message(START + SECOND, picture()))
    ros.wait(lambda: len(published) > before)  # it went on from there, and says so
    assert weights.loads(weights_from_message(published[-1]))[1] == info


# Their end


def test_lifecycle_sigint_and_sigterm_end_every_node_cleanly(ros):
    """Those that the tests above have used, and fresh ones of the others."""
    for role in set(parameters.NODES) - set(ros.processes):
        ros.start(role)
    ros.wait(lambda: all(ros.says(role) for role in parameters.NODES))
    processes = dict(ros.processes)
    ros.processes.clear()
    for index, process in enumerate(processes.values()):
        process.send_signal(signal.SIGINT if index % 2 == 0 else signal.SIGTERM)
    assert {role: process.wait(30) for role, process in processes.items()} == dict.fromkeys(
        processes, 0
    )
    for role in processes:
        assert 'Traceback' not in ros.log(role) and 'terminate called' not in ros.log(role)


def test_lifecycle_a_wrong_parameter_ends_a_node_with_one_sentence(ros):
    process = ros.start('bundle', prune_px=-1.0)
    del ros.processes['bundle']
    assert process.wait(60) == 2
    assert (
        ros.log('bundle').strip()
        == "bundle: parameter 'prune_px' is -1, it must lie in [0.1, 100]"
    )


def test_fault_node_without_its_weights_ends_with_one_sentence(ros, tmp_path):
    missing = tmp_path / 'missing.safetensors'
    process = ros.start('matcher', weights=str(missing))
    del ros.processes['matcher']
    assert process.wait(60) == 2
    assert ros.log('matcher').strip() == f'matcher: {missing}: there is no such weights file'


# Replay


@pytest.fixture(scope='module')
def recording(tmp_path_factory):
    folder = tmp_path_factory.mktemp('rendered') / 'room'
    return open_recording(
        render_recording(folder, seed=1, frames=24, size=(160, 128), depth_every=24)
    )


def test_replay_nodes_lose_nothing_and_leave_a_run_folder(recording, tmp_path):
    result = replay(recording, tmp_path, train_fraction=0.5, learn_seconds=1.0, progress=False)
    assert (result.sent, result.train_frames, result.matched, result.dropped) == (24, 12, 24, 0)
    assert result.frame_stamps.tolist() == [stamp for stamp, _ in recording]
    assert result.frame_rows[0] == 0 and (result.frame_rows[1:] > 0).all()
    assert result.diagnostics['bundle']['processed'] == '24'
    assert result.diagnostics['learner']['enabled'] == 'false'
    assert result.weights[0] == result.weights_before and result.weights_before.is_file()
    assert len(result.keyframe_stamps) == len(result.keyframe_poses)
    assert result.notes == []
    lines = (tmp_path / 'trajectory.txt').read_text().splitlines()
    assert len(lines) == 1 + len(result.keyframe_stamps)
    assert (tmp_path / 'landmarks.ply').is_file() and (tmp_path / 'logs' / 'matcher.log').is_file()
    assert result.throughput_hz > 0 and result.peak_memory_mb > 100


def test_fault_replay_says_which_node_died_and_why(recording, tmp_path):
    with pytest.raises(
        ReplayError, match=r"the bundle node ended with exit code 2.*'prune_px' is -1"
    ):
        replay(
            recording, tmp_path, learn=False, progress=False,
            node_parameters={'bundle': {'prune_px': -1.0}},
        )


# The thread behind each node


def worker(process, **further):
    errors, dropped = [], []
    options = {'ready': lambda: True, 'queue_size': 3, **further}
    return (
        Worker(process, on_error=errors.append, on_drop=dropped.append, **options), errors,
        dropped,
    )


def test_node_worker_drops_the_oldest_and_counts():
    done = []
    thread, errors, dropped = worker(done.append)
    for item in range(10):
        thread.put(item)
    thread.start()
    thread.request(lambda: None).result(10)
    while thread.waiting():
        time.sleep(0.01)
    thread.stop()
    assert (done, dropped, errors) == ([7, 8, 9], list(range(7)), [])


def test_fault_node_worker_survives_an_exception():
    def process(item):
        if item == 0:
            raise ValueError('bad')
        done.set()

    done = threading.Event()
    thread, errors, _ = worker(process)
    thread.start()
    thread.put(0)
    thread.put(1)
    assert done.wait(10)
    with pytest.raises(ZeroDivisionError):
        thread.request(lambda: 1 // 0).result(10)
    thread.stop()
    assert [str(error) for error in errors] == ['bad']


def test_node_worker_answers_requests_between_pieces_of_background_work():
    thread, _, _ = worker(lambda item: None, idle=lambda: time.sleep(0.01) or True)
    thread.start()
    assert [thread.request(lambda n=n: n).result(10) for n in range(3)] == [0, 1, 2]
    thread.stop()


def test_node_worker_without_work_waits():
    thread, errors, _ = worker(lambda item: None)
    thread.start()
    for _ in range(2):  # and again after a piece of work
        thread.request(lambda: None).result(10)
        begun = thread.request(time.thread_time).result(10)
        time.sleep(0.5)
        assert thread.request(time.thread_time).result(10) - begun < 0.2
    assert thread.busy() < 0.2 and thread.waiting() == 0
    assert thread.stop(10) and errors == []


def test_node_worker_ends_after_the_work_in_hand_and_says_where_that_hangs():
    free, done = threading.Event(), []
    thread, errors, dropped = worker(lambda item: (free.wait(), done.append(item)))
    thread.start()
    thread.put('first')
    while not thread.busy():
        time.sleep(0.01)
    later = thread.request(lambda: None)
    thread.put('second')
    assert thread.waiting() == 1
    assert not thread.stop(0.1) and later.cancelled()
    free.set()
    assert thread.stop(10) and done == ['first'] and errors == []
    thread.clear()
    assert (thread.waiting(), dropped) == (0, ['second'])


# Parameters


def test_node_parameters_file_is_what_the_table_says():
    written = (ROOT / 'config' / 'imatching.yaml').read_text()
    assert written == parameters.to_yaml(), (
        'run: python -m imatching_ros.nodes.parameters > config/imatching.yaml'
    )


def test_node_parameters_documentation_is_what_the_table_says():
    written = (ROOT / 'docs' / 'parameters.md').read_text()
    assert written == parameters.to_markdown(), (
        'run: python -m imatching_ros.nodes.parameters --markdown > docs/parameters.md'
    )


def test_node_parameters_carry_the_core_defaults():
    """
    A default is the core's.

    One that differs would make the node another program than the offline command.
    """
    from imatching_ros.bundle.options import BundleOptions
    from imatching_ros.learning.options import LearnerOptions

    groups = {'tracker': TrackerOptions(), 'bundle': BundleOptions(), 'learner': LearnerOptions()}
    for parameter in parameters.TABLE:
        if parameter.option:
            group, *path = parameter.option.split('.')
            value = groups[group]
            for name in path:
                value = getattr(value, name)
            assert parameter.default == value, parameter.name
            assert type(parameter.default) is type(value), parameter.name


def test_node_parameters_are_whole():
    for parameter in parameters.TABLE:
        assert parameter.description and parameter.refusal(parameter.default) is None
        if type(parameter.default) in (int, float):
            assert parameter.low is not None and parameter.high is not None, parameter.name
            assert 'must lie in' in parameter.refusal(
                type(parameter.default)(parameter.high * 2 + 1)
            )
    for node in (*parameters.NODES, *parameters.OTHERS):
        names = [parameter.name for parameter in parameters.of(node)]
        assert len(names) == len(set(names))
    table = {parameter.name: parameter for parameter in parameters.TABLE}
    assert table['nodes'].refusal(['bundle', 'bundel']) == (
        "parameter 'nodes' is ['bundle', 'bundel'], it must name one or more of matcher, "
        'bundle, learner'
    )
    assert (
        table['nodes'].refusal('bundle') == "parameter 'nodes' takes a list of str, not 'bundle'"
    )
    assert table['camera_pose'].refusal([1.0] * 6).endswith('it must be 7 finite numbers')
    assert table['camera_pose'].refusal([float('nan')] * 7) and table['camera_pose'].refusal(
        [1] * 7
    )
    assert table['camera_pose'].refusal([0.0] * 7) is None
    assert table['image_transport'].refusal('both') == (
        "parameter 'image_transport' is 'both', it must be one of raw, compressed"
    )


def test_node_parameters_are_read_back_from_yaml_as_they_were():
    for value in (1e-5, 1.5e-7, 5e-4, 1e22, 0.1, 3.0, 7, True, '', 'a: b', '1e-5', (0.5, 1e-9)):
        read = yaml.safe_load(parameters.yaml_scalar(value))
        expected = list(value) if isinstance(value, tuple) else value
        assert read == expected and type(read) is type(expected), value


# The player


class Tape:
    """Time that passes only while the player waits, and what it publishes then."""

    def __init__(self, monkeypatch) -> None:
        self.now, self.heard, self.warned, self.listeners = 1000.0, [], [], 1
        fake = SimpleNamespace(ok=lambda: True, spin_once=self.wait)
        monkeypatch.setattr(player, 'rclpy', fake)
        monkeypatch.setattr(player, 'time', SimpleNamespace(monotonic=lambda: self.now))

    def wait(self, node, timeout_sec: float) -> None:
        self.now += timeout_sec

    def topic(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(
            publish=lambda message: self.heard.append((self.now, name, message)),
            get_subscription_count=lambda: self.listeners, topic_name=f'/{name}',
            wait_for_all_acked=lambda timeout: True,
        )

    def play(self, context, **values) -> list[tuple[float, str]]:
        """Return what a player with these parameters publishes, and when, since it began."""
        given = [rclpy.Parameter(name, value=value) for name, value in values.items()]
        node = PlayerNode(context=context, parameter_overrides=given)
        try:
            node._images, node._camera_info = self.topic('image'), self.topic('camera_info')
            node._time = node._time and self.topic('clock')
            log = SimpleNamespace(info=lambda text: None, warning=self.warned.append)
            node.get_logger = lambda: log
            self.heard, begun = [], self.now
            node.play()
            return [(moment - begun, name) for moment, name, _ in self.heard]
        finally:
            node.destroy_node()


def test_player_keeps_the_pace_that_is_asked_for(daylight, tmp_path, monkeypatch):
    """Each image comes at its time, with its camera_info, and before it the clock if asked for."""
    tape, ros = Tape(monkeypatch), Ros(tmp_path)
    stamps = [stamp for stamp, _ in open_recording(daylight)]
    try:
        for rate, clock in ((1.0, False), (4.0, True)):
            kinds = ['clock', 'camera_info', 'image'] if clock else ['camera_info', 'image']
            told = tape.play(ros.context, bag=str(daylight), rate=rate, clock=clock)
            assert [name for _, name in told] == kinds * len(stamps)
            due = [(stamp - stamps[0]) / SECOND / rate for stamp in stamps]
            assert [moment for moment, name in told if name == 'image'] == pytest.approx(due)
            heads = [m.header.stamp for _, name, m in tape.heard if name != 'clock']
            assert [to_ns(stamp) for stamp in heads] == [s for s in stamps for _ in range(2)]
        clocks = [to_ns(m.clock) for _, name, m in tape.heard if name == 'clock']
        assert clocks == stamps and tape.warned == []
    finally:
        ros.close()


def test_player_says_that_nobody_listens_and_plays_all_the_same(daylight, tmp_path, monkeypatch):
    tape, ros = Tape(monkeypatch), Ros(tmp_path)
    tape.listeners = 0
    try:
        told = tape.play(ros.context, bag=str(daylight))
        assert told[0][0] == pytest.approx(30.0, abs=0.2) and len(told) == 2 * 40
        (warning,) = tape.warned
        assert warning.startswith('nobody listens on /image; start the nodes with image_transport')
    finally:
        ros.close()


def test_player_does_not_wait_for_a_clock_that_was_set(tmp_path):
    """Images come with their camera_info; what cannot be used is left out and said."""
    stamps = [k * SECOND // 20 for k in range(1, 5)]  # before the clock was set
    stamps += [START + k * SECOND // 20 for k in range(4)]
    stamps[2] = 0
    with writing(tmp_path) as pen:
        pen.info('/cam/camera_info', START)
        for k, stamp in enumerate(stamps):
            pen.image(
                '/cam/image', START + k, 'mono8', bytes(SIZE[0] * SIZE[1]), SIZE[1],
                header_stamp=stamp,
            )
    told = [stamp for k, stamp in enumerate(stamps) if k != 2]
    ros = Ros(tmp_path)
    try:
        images = ros.listen(Image, 'image', lossless())
        infos = ros.listen(CameraInfo, 'camera_info', lossless())
        assert ros.start('player', bag=str(pen.path)).wait(60) == 0, ros.log('player')
        del ros.processes['player']  # it may end before all that it said is heard
        newest = [to_stamp(told[-1])] * 2
        ros.wait(lambda: [heard[-1].header.stamp for heard in (images, infos) if heard] == newest)
        assert [to_ns(image.header.stamp) for image in images] == told
        assert len(infos) > 1 and infos[-1].k[0] == 30.0
        log = ros.log('player')
        assert 'the recording goes on 1699999999.800 s later, which are not waited for' in log
        assert '1 of 8 images was left out: 1 with a stamp that goes back' in log
    finally:
        ros.close()
