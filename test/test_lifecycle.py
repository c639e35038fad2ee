"""
The life cycle of the nodes.

Managed from outside, refusing what is wrong, leaving nothing behind.
"""

from dataclasses import replace
from functools import partial
import os
from pathlib import Path
import re
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch

rclpy = pytest.importorskip('rclpy', reason="ROS 2's rclpy is not installed")

from imatching_ros.bundle.window import Window  # noqa: E402,I100
from imatching_ros.geometry import lie  # noqa: E402
from imatching_ros.matching import weights  # noqa: E402
from imatching_ros.nodes import bundle, condition, matcher, parameters  # noqa: E402
from imatching_ros.nodes.bundle import BundleNode  # noqa: E402
from imatching_ros.nodes.composed import SharedWeights  # noqa: E402
from imatching_ros.nodes.images import camera_to_info  # noqa: E402
from imatching_ros.nodes.learner import LearnerNode, PARTS, UNJOINED  # noqa: E402
from imatching_ros.nodes.matcher import draw, MatcherNode  # noqa: E402
from imatching_ros.nodes.qos import latched, lossless  # noqa: E402
from imatching_ros.nodes.stamps import to_header, to_ns, to_stamp  # noqa: E402
from rcl_interfaces.msg import Log, Parameter, ParameterType, ParameterValue  # noqa: E402
from rcl_interfaces.srv import SetParameters  # noqa: E402
from rclpy.qos import QoSProfile, ReliabilityPolicy  # noqa: E402
from ros import CAMERA, image_message, picture, Ros, SECOND, START  # noqa: E402
from rosgraph_msgs.msg import Clock  # noqa: E402
from sensor_msgs.msg import CameraInfo, Image, PointCloud2  # noqa: E402
from std_srvs.srv import SetBool  # noqa: E402
from test_messages import window, window_messages  # noqa: E402

BEST_EFFORT = ReliabilityPolicy.BEST_EFFORT
TOPICS = {'matcher': '/correspondences', 'bundle': '/odometry', 'learner': '/weights'}


@pytest.fixture
def ros(tmp_path):
    ros = Ros(tmp_path)
    yield ros
    ros.close()


def inside(process) -> tuple[int, float]:
    """Threads of a process, and its resident memory in MB."""
    lines = dict(line.split(':', 1) for line in open(f'/proc/{process.pid}/status') if ':' in line)
    return int(lines['Threads']), int(lines['VmRSS'].split()[0]) / 1024


def test_lifecycle_five_cycles_leave_nothing_behind(ros):
    """configure, activate, deactivate, cleanup, with images coming all the time."""
    for role in parameters.NODES:
        values = {'queries': 50, 'processing_mode': 'all'} if role == 'matcher' else {}
        ros.start(role, autostart=False, image_qos='keep_all', **values)
    images = ros.node.create_publisher(Image, 'image', lossless())
    infos = ros.node.create_publisher(CameraInfo, 'camera_info', lossless())
    matched = ros.listen(PointCloud2, 'correspondences', lossless())
    ros.wait(
        lambda: all(ros.says(role).get('lifecycle') == 'unconfigured' for role in parameters.NODES)
    )
    assert not any(ros.node.count_publishers(topic) for topic in TOPICS.values())
    now, seen = START, []

    def play(count: int = 3) -> None:
        nonlocal now
        for index in range(count):
            now += SECOND // 20
            images.publish(image_message(now, picture(float(index))))

    for cycle in range(5):
        for role in parameters.NODES:
            assert ros.change(role, 'configure'), ros.log(role)
        ros.wait(lambda: all(ros.node.count_publishers(topic) for topic in TOPICS.values()))
        ros.wait(
            lambda: images.get_subscription_count() == 2 and infos.get_subscription_count() == 3
        )
        time.sleep(0.3)
        infos.publish(camera_to_info(CAMERA, to_header(0, 'camera')))
        play()  # inactive: neither answered nor kept
        for role in reversed(parameters.NODES):
            assert ros.change(role, 'activate'), ros.log(role)
        before = len(matched)
        play()
        ros.wait(lambda before=before: len(matched) == before + 3)
        assert [to_ns(message.header.stamp) for message in matched[before:]] == [
            now - 2 * SECOND // 20, now - SECOND // 20, now
        ]
        for role in parameters.NODES:
            assert ros.change(role, 'deactivate'), ros.log(role)
            assert ros.state(role) == 'inactive'
        play()
        for role in parameters.NODES:
            assert ros.change(role, 'cleanup'), ros.log(role)
            assert ros.state(role) == 'unconfigured'
        ros.wait(lambda: not any(ros.node.count_publishers(topic) for topic in TOPICS.values()))
        assert len(matched) == 3 * (cycle + 1)
        seen.append({role: inside(process) for role, process in ros.processes.items()})
    for role in parameters.NODES:
        (threads, memory), (threads_then, memory_then) = seen[4][role], seen[1][role]
        assert threads <= threads_then and memory < memory_then + 10, (role, seen)
        assert ros.change(role, 'shutdown')
        assert ros.state(role) == 'finalized'
        assert 'Traceback' not in ros.log(role)


def test_lifecycle_a_managed_node_refuses_configuration_and_lives_on(ros, tmp_path):
    missing = tmp_path / 'missing.safetensors'
    ros.start('matcher', autostart=False, weights=str(missing))
    ros.start('bundle', autostart=False, prune_px=-1.0, kernel='cubic')
    for role, reasons in {
        'matcher': [f'{missing}: there is no such weights file'],
        'bundle': [
            "parameter 'prune_px' is -1, it must lie in [0.1, 100]",
            "parameter 'kernel' is 'cubic'",
        ],
    }.items():
        assert not ros.change(role, 'configure')
        assert ros.state(role) == 'unconfigured'
        for reason in reasons:
            ros.wait(lambda role=role, reason=reason: reason in ros.says(role).get('message', ''))
            assert reason in ros.log(role)
        assert ros.says(role)['level'] == 2 and 'Traceback' not in ros.log(role)

    text = ParameterValue(
        type=ParameterType.PARAMETER_STRING, string_value=str(weights.default_path())
    )
    request = SetParameters.Request(parameters=[Parameter(name='weights', value=text)])
    assert ros.call(SetParameters, 'matcher/set_parameters', request).results[0].successful
    assert ros.change('matcher', 'configure') and ros.change('matcher', 'activate')
    ros.wait(lambda: ros.says('matcher').get('lifecycle') == 'active')
    ros.wait(lambda: 'no usable camera_info has come' in ros.says('matcher')['message'])


@pytest.mark.parametrize(
    ('topic', 'rectified', 'focal'),
    [
        ('/cam/image_raw', 'auto', 130.0), ('/cam/image_rect', 'auto', 99.0),
        ('/image_rect_color', 'auto', 99.0), ('/cam/image_rect/compressed', 'auto', 99.0),
        ('/cam/image_rect', 'never', 130.0), ('/image', 'always', 99.0),
        ('/zed/left/rect/image', 'auto', 99.0), ('/kitti/camera_gray_left/image', 'auto', 99.0),
        ('/cam/image', 'auto', 130.0),
    ],
)
def test_lifecycle_a_configured_node_knows_a_rectified_image_by_its_name(
    ros, topic, rectified, focal
):
    end = 'image/compressed' if topic.endswith('compressed') else 'image'
    node = BundleNode(
        context=ros.context, cli_args=['--ros-args', '-r', f'{end}:={topic}'],
        parameter_overrides=[rclpy.Parameter('rectified', value=rectified)],
    )
    node.start()
    info = camera_to_info(CAMERA, to_header(0, 'camera'))
    info.p[0] = info.p[5] = 99.0
    ros.executor.add_node(node)
    publisher = ros.node.create_publisher(CameraInfo, 'camera_info', 10)
    ros.connect(publisher)
    ros.wait(lambda: publisher.publish(info) or node.camera)
    assert (node.camera.fx, node.camera.fy) == (focal, focal)
    ros.executor.remove_node(node)
    assert node.close()
    node.destroy_node()


def test_lifecycle_a_node_follows_a_camera_and_passes_over_what_is_none(ros):
    """Zeros first; then it is focused anew, zeros come again, and at last another camera."""
    said = []
    node = BundleNode(context=ros.context)
    node.reporter.fault = said.append
    node.start()

    def tell(camera) -> None:
        info = CameraInfo(width=CAMERA.width, height=CAMERA.height)
        if camera is not None:
            info = camera_to_info(camera, to_header(0, 'camera'))
        node._on_camera_info(info)
        node.worker.request(lambda: None).result(30)

    tell(None)
    assert node.camera is None and said.pop().startswith('camera_info: the camera is not calib')
    tell(CAMERA)
    core = node.core = node.build(node.camera)
    core.state.keyframes = 7
    for fx in (CAMERA.fx + 0.02, CAMERA.fx - 0.5):
        tell(replace(CAMERA, fx=fx))
        assert node.core is core and core.camera.fx == node.camera.fx == fx
    assert said == []
    tell(None)
    assert core.camera.fx == node.camera.fx == CAMERA.fx - 0.5 and len(said) == 1
    tell(CAMERA.scaled(0.5, 0.5))
    assert said[1:] == ['camera_info changed: starting afresh with the new calibration']
    assert node.core is core and core.camera == CAMERA.scaled(0.5, 0.5) and core.window is None
    assert node.close()
    node.destroy_node()


def test_lifecycle_a_node_says_where_nothing_tells_whether_images_are_rectified(ros):
    node = BundleNode(
        context=ros.context, cli_args=['--ros-args', '-r', 'image:=/cam/image'],
    )
    warned = []
    node.get_logger().warning = warned.append
    logger = node.get_logger()
    node.get_logger = lambda: logger
    node.start()
    info = camera_to_info(CAMERA, to_header(0, 'camera'))
    info.p[0] = info.p[5] = 99.0
    node._on_camera_info(info)
    assert node.camera == CAMERA and len(warned) == 1
    assert 'the images of /cam/image are taken as raw' in warned[0]
    assert node.close()
    node.destroy_node()


@pytest.mark.parametrize(
    ('name', 'value', 'sentence'),
    [
        ('device', 'tpu9', "parameter 'device' is 'tpu9', which torch cannot use"),
        (
            'qos_overrides./correspondences.publisher.reliability', 'certain',
            'Unexpected QoS override',
        ),
        ('weights', '/', 'there is no such weights file'),
        ('queries', 10**6, "parameter 'queries' is 1e+06, it must lie in [8, 20000]"),
    ],
)
def test_lifecycle_configuration_is_refused_with_one_sentence(ros, name, value, sentence):
    node = MatcherNode(
        context=ros.context, parameter_overrides=[rclpy.Parameter(name, value=value)]
    )
    for _ in range(2):
        with pytest.raises(ValueError) as caught:
            node.start()
        assert sentence in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert node.state == 'unconfigured'
    # what had been made before the refusal is gone
    assert not ros.node.count_subscribers('/image')
    node.destroy_node()


@pytest.mark.parametrize('kind', [MatcherNode, BundleNode, LearnerNode])
def test_lifecycle_a_node_describes_its_parameters(ros, kind):
    node = kind(context=ros.context)
    for parameter in parameters.of(kind.role):
        said = node.describe_parameter(parameter.name)
        assert (said.description, said.read_only) == (parameter.description, parameter.read_only)
        assert said.additional_constraints == (
            f'one of {", ".join(parameter.choices)}' if parameter.choices else ''
        )
        limits = [(r.from_value, r.to_value) for r in said.floating_point_range]
        limits += [(r.from_value, r.to_value) for r in said.integer_range]
        whole = parameter.low is not None
        assert limits == [(parameter.low, parameter.high)] * whole, parameter.name
    node.destroy_node()


def test_lifecycle_a_node_has_not_waited_before_it_is_active(ros, monkeypatch):
    node = BundleNode(context=ros.context)
    node.start()
    assert node.state == 'active' and node.condition.warning() == ''
    later = time.monotonic() + 60.0
    monkeypatch.setattr(condition, 'time', SimpleNamespace(monotonic=lambda: later))
    assert node.condition.warning() == 'nothing has come on /correspondences for 60 s'
    node.receive('no camera is known, so it waits', fed=False)
    assert node.condition.warning() != ''
    node.receive('so does this', fed=True)
    assert (node.condition.warning(), node.health.received) == ('', 2)
    node.trigger_deactivate()
    node.receive('it is not asked for any more')
    assert (node.health.received, node.health.dropped) == (2, 2)
    assert node.state == 'inactive'
    node.trigger_cleanup()
    assert (node.state, node.worker) == ('unconfigured', None)
    node.trigger_shutdown()
    assert node.state == 'finalized'
    node.destroy_node()


def test_lifecycle_publish_tf_is_refused_where_there_is_no_tf2(ros, monkeypatch):
    monkeypatch.setattr(bundle, 'tf2_ros', None)
    override = rclpy.Parameter('publish_tf', value=True)
    node = BundleNode(context=ros.context, parameter_overrides=[override])
    with pytest.raises(ValueError, match='publish_tf is set but tf2_ros is not installed'):
        node.start()
    node.destroy_node()


INTERFACE = {
    MatcherNode: {
        'image': 'Image best_effort', 'camera_info': 'CameraInfo best_effort',
        'weights': 'UInt8MultiArray reliable 1 latched',
        'correspondences': 'PointCloud2 reliable 10', 'debug/matches': 'Image reliable 1',
        'feature_tracker/feature': 'PointCloud reliable 10',
        '~/reset': 'Trigger', '~/reload_weights': 'Trigger',
    },
    BundleNode: {
        'correspondences': 'PointCloud2 reliable 10', 'camera_info': 'CameraInfo best_effort',
        'external_odometry': 'Odometry best_effort', 'odometry': 'Odometry reliable 10',
        'keyframes': 'Path reliable 1 latched', 'landmarks': 'PointCloud2 reliable 1 latched',
        'prior': 'PointCloud2 reliable 1 latched',
        '~/reset': 'Trigger', '~/save_map': 'Trigger',
    },
    LearnerNode: {
        'image/compressed': 'CompressedImage best_effort',
        'camera_info': 'CameraInfo best_effort', 'correspondences': 'PointCloud2 reliable 10',
        'keyframes': 'Path reliable 1 latched', 'landmarks': 'PointCloud2 reliable 1 latched',
        'prior': 'PointCloud2 reliable 1 latched',
        'weights': 'UInt8MultiArray reliable 1 latched',
        'learning': 'DiagnosticStatus reliable 10',
        '~/reset': 'Trigger', '~/enable': 'SetBool', '~/save_checkpoint': 'Trigger',
        '~/rollback': 'Trigger',
    },
}


def test_a_node_says_what_it_waits_for_until_it_can_work(ros, tmp_path):
    """The first time on a processor: no kernel has been compiled yet."""
    package = tmp_path / 'imatching_ros'
    source = Path(__file__).parents[1] / package.name
    shutil.copytree(source, package, ignore=shutil.ignore_patterns('__pycache__'))
    kernels = package / 'kernels.py'  # of which a part is enough to see
    text = kernels.read_text()
    for module in ('matching.compiled', 'bundle.solver.compiled.minimise'):
        text = text.replace(f"    'imatching_ros.{module}',\n", '')
    assert text.count("    'imatching_ros.") == 2
    kernels.write_text(text)
    ros.settings['PYTHONPATH'] = os.pathsep.join([str(tmp_path), ros.settings['PYTHONPATH']])
    ros.settings['NUMBA_CACHE_DIR'] = str(tmp_path / 'kernels')
    ros.start('bundle')
    pattern = r'compiling for this processor, once: \d+ of \d+'
    says = ros.wait(
        lambda: (s := ros.says('bundle')) and re.fullmatch(pattern, s['message']) and s
    )
    assert (says['lifecycle'], says['ready'], says['level']) == ('active', 'false', 1)
    ros.wait(lambda: ros.says('bundle')['ready'] == 'true')
    assert 'compiling' not in ros.says('bundle')['message']
    log = ros.log('bundle')
    assert 0 < log.index('once: 1 of ') < log.index('ready')
    ros.end('bundle')
    ros.start('bundle')
    ros.wait(lambda: ros.says('bundle').get('ready') == 'true')
    assert 'compiling' not in ros.log('bundle')


def test_fault_a_node_says_that_it_must_do_without_kernels(ros, tmp_path):
    """Matching and bundle then run in plain torch."""
    (tmp_path / 'numba.py').write_text("raise ImportError('numba is not for this python')")
    ros.settings['PYTHONPATH'] = os.pathsep.join([str(tmp_path), ros.settings['PYTHONPATH']])
    ros.start('matcher', image_qos='keep_all', processing_mode='all', queries=20)
    images = ros.node.create_publisher(Image, 'image', lossless())
    infos = ros.node.create_publisher(CameraInfo, 'camera_info', lossless())
    matched = ros.listen(PointCloud2, 'correspondences', lossless())
    rosout = ros.listen(Log, '/rosout', latched(100))
    ros.connect(images)
    ros.connect(infos)
    infos.publish(camera_to_info(CAMERA, to_header(0, 'camera')))
    images.publish(image_message(START, picture()))
    ros.wait(lambda: matched)
    ros.wait(lambda: 'numba is not for this python' in ros.says('matcher').get('message', ''))
    assert ros.says('matcher')['ready'] == 'true' and ros.says('matcher')['level'] == 1
    ros.wait(lambda: any('numba is not for this python' in said.msg for said in rosout))


@pytest.mark.parametrize('kind', INTERFACE, ids=lambda kind: kind.role)
def test_lifecycle_a_configured_node_has_the_topics_and_services_of_the_interface(ros, kind):
    """All names are relative; README's table names each."""
    values = {'vins_features': True} if kind is MatcherNode else {}
    values |= {'image_transport': 'compressed'} if kind is LearnerNode else {}
    node = kind(
        context=ros.context, namespace='robot',
        parameter_overrides=[rclpy.Parameter(name, value=value) for name, value in values.items()],
    )
    before = {*node.publishers, *node.subscriptions, *node.services}
    node.start()
    found = {}
    for end in {*node.publishers, *node.subscriptions} - before:
        if end.topic_name.startswith('/robot/'):  # else tf2's
            qos = end.qos_profile
            words = [end.msg_type.__name__, qos.reliability.name.lower()]
            words += [str(qos.depth)] if 'reliable' in words else []
            words += ['latched'] if qos.durability.name == 'TRANSIENT_LOCAL' else []
            found[end.topic_name.removeprefix('/robot/')] = ' '.join(words)
    for service in {*node.services} - before:
        name = service.srv_name.removeprefix(f'/robot/{kind.role}/')
        found['~/' + name.removeprefix('~/')] = service.srv_type.__name__
    assert found == INTERFACE[kind]
    assert node.close() and {*node.publishers, *node.subscriptions, *node.services} == before
    node.destroy_node()
    readme = (Path(__file__).parents[1] / 'README.md').read_text()
    assert all(f'`{name}`' in readme for name in found)


def test_an_active_matcher_draws_only_while_someone_looks(ros, monkeypatch):
    drawn = []
    monkeypatch.setattr(matcher, 'draw', lambda *pair: drawn.append(pair) or draw(*pair))
    values = {'image_qos': 'keep_all', 'processing_mode': 'all', 'queries': 50}
    node = MatcherNode(
        context=ros.context,
        parameter_overrides=[rclpy.Parameter(name, value=value) for name, value in values.items()],
    )
    node.start()
    ros.executor.add_node(node)
    images = ros.node.create_publisher(Image, 'image', lossless())
    infos = ros.node.create_publisher(CameraInfo, 'camera_info', lossless())
    matched = ros.listen(PointCloud2, 'correspondences', lossless())
    ros.connect(images)
    ros.connect(infos)
    infos.publish(camera_to_info(CAMERA, to_header(0, 'camera')))
    for index in range(3):
        images.publish(image_message(START + index * SECOND // 20, picture(2.0 * index)))
    ros.wait(lambda: len(matched) == 3)
    assert matched[-1].width and not drawn
    looked = ros.listen(Image, 'debug/matches', 1)
    ros.wait(node._debug.get_subscription_count)
    images.publish(image_message(START + SECOND, picture(8.0)))
    ros.wait(lambda: looked)
    assert len(drawn) == 1
    assert (looked[0].encoding, looked[0].width, looked[0].height) == ('rgb8', 160, 120)
    assert to_ns(looked[0].header.stamp) == START + SECOND
    ros.executor.remove_node(node)
    assert node.close()
    node.destroy_node()


def test_a_bundle_node_remembers_a_bounded_number_of_landmarks(ros, monkeypatch):
    monkeypatch.setattr(bundle, 'LANDMARKS', 100)
    node = BundleNode(context=ros.context)
    for first in (0, 60, 120, 30):
        track = torch.arange(first, first + 60)
        points = track[:, None].double().expand(-1, 3)
        node._remember(Window(track[:0], torch.empty(0, 7), track, points, track, points[:, 0]))
    assert sorted(node._points) == [*range(30, 90), *range(140, 180)]  # those that were seen last
    assert node._points[70] == [70.0] * 3
    node.destroy_node()


def test_a_bundle_node_knows_where_the_camera_is_on_the_robot_or_says_what_to_set(
    ros, monkeypatch
):
    monkeypatch.setattr(bundle, 'tf2_ros', None)
    node = BundleNode(context=ros.context)
    node.start()
    assert node._extrinsics('base_link') is None  # no image has named the camera's frame yet
    node._camera_frame = 'camera'
    with pytest.raises(ValueError, match="'camera' is in 'base_link' is not known; set camera_po"):
        node._extrinsics('base_link')
    for one_frame in ('', 'camera'):
        node._T_child_camera = None
        assert torch.equal(node._extrinsics(one_frame), lie.identity())
    assert node.close()
    node.destroy_node()
    given = [0.1, 0.2, 0.3, 0.0, 0.0, 0.0, 1.001]
    override = rclpy.Parameter('camera_pose', value=given)
    node = BundleNode(context=ros.context, parameter_overrides=[override])
    node.start()
    expected = torch.tensor([*given[:6], 1.0], dtype=torch.float64)
    assert torch.equal(node._extrinsics('base_link'), expected)
    assert node.close()
    node.destroy_node()


class Core:
    """A learner's core that writes down what it is asked for."""

    version, enabled, ready, metric = 3, True, True, False
    windows = stale = skipped = promotions = rollbacks = 0

    def __init__(self) -> None:
        self.asked, self.given = [], []

    def rest(self) -> float:
        return 1.0

    def reset(self) -> None:
        self.asked.append('reset')

    def start_recording(self, camera) -> None:
        self.asked.append('start_recording')

    def verdict(self, now: bool) -> None:
        self.asked.append(f'verdict {now}')

    def weights(self) -> bytes:
        return b'weights'

    def add_window(self, window) -> bool:
        self.given.append(window)
        return True


@pytest.fixture
def watched(ros):
    """Return an active learner node and its core."""
    override = rclpy.Parameter('image_qos', value='keep_all')
    node = LearnerNode(context=ros.context, parameter_overrides=[override])
    node.start()
    node.core = Core()
    yield node, node.core
    assert node.close()
    node.destroy_node()


def test_a_learner_node_that_is_turned_off_is_judged_at_once(watched):
    node, core = watched
    for on, said in ((False, 'watching only'), (True, 'learning'), (False, 'watching only')):
        answer = node._on_enable(SetBool.Request(data=on), SetBool.Response())
        assert (answer.success, answer.message) == (True, said)
        assert core.enabled == node.value('enabled') == on
    assert core.asked == ['verdict True'] * 2


def test_a_learner_node_joins_the_parts_of_a_window(watched):
    """In whatever order they come; of those that do not all come, a few are remembered."""
    node, core = watched
    sent, stamps = window(), range(START, START + UNJOINED + 3)
    solves = [dict(zip(PARTS, window_messages(sent, ns), strict=True)) for ns in stamps]

    def give(solve: int, *names: str) -> int:
        for name in names:
            node._add_part(name, solves[solve][name])
        return len(core.given)

    assert give(0, 'prior', 'keyframes') == give(1, 'landmarks', 'keyframes') == 0
    assert give(0, 'landmarks') == 1 and give(1, 'prior') == 2
    assert all(torch.equal(found.track, sent.track) for found in core.given)
    for solve in range(UNJOINED + 3):
        give(solve, 'landmarks', 'prior')
    assert give(2, 'keyframes') == 2  # forgotten: ten newer ones wait
    assert give(4, 'keyframes') == 3
    for forget, asked in ((node.restart, 'start_recording'), (node.reset, 'reset')):
        give(5, 'landmarks', 'prior')
        forget()
        assert give(5, 'keyframes') == 3 and core.asked[-1] == asked
        forget()


def test_lifecycle_composed_nodes_share_one_process_and_one_end(ros):
    """
    What a graph changes while it runs is followed.

    QoS is overridden the ROS way, a clock that jumps back starts all three afresh, silence is
    said.
    """
    process = ros.start(
        'composed', image_qos='keep_all', processing_mode='all', queries=50, use_sim_time=True,
        **{'qos_overrides./correspondences.publisher.reliability': 'best_effort'},
    )
    images = ros.node.create_publisher(Image, 'image', lossless())
    infos = ros.node.create_publisher(CameraInfo, 'camera_info', lossless())
    clock = ros.node.create_publisher(Clock, '/clock', 10)
    matched = ros.listen(
        PointCloud2, 'correspondences', QoSProfile(depth=100, reliability=BEST_EFFORT)
    )
    for publisher, ends in ((images, 2), (infos, 3), (clock, 3)):
        ros.connect(publisher, ends)
    infos_of = partial(ros.node.get_publishers_info_by_topic, '/correspondences')
    ros.wait(
        lambda: (
            [i.qos_profile.reliability for i in infos_of() if i.node_name == 'matcher']
            == [BEST_EFFORT]
        )
    )
    ros.wait(lambda: ros.node.count_publishers('/weights'))
    time.sleep(0.5)
    clock.publish(Clock(clock=to_stamp(START + 100 * SECOND)))
    infos.publish(camera_to_info(CAMERA, to_header(0, 'camera')))
    before = len(matched)
    for index in range(4):
        images.publish(
            image_message(START + 100 * SECOND + index * SECOND // 20, picture(2.0 * index))
        )
    ros.wait(lambda: len(matched) >= before + 4)
    assert matched[-1].width > 10 and matched[before].width == 0
    for role in parameters.NODES:
        sentence = f'nothing has come on /{"image" if role != "bundle" else "correspondences"} for'
        ros.wait(lambda role=role, said=sentence: said in ros.says(role).get('message', ''))
    assert {ros.says(role)['lifecycle'] for role in parameters.NODES} == {'active'}
    assert len({ros.says(role)['peak_memory_mb'] for role in parameters.NODES}) <= 3
    assert 'went forward' not in ros.log('composed')  # the first /clock sets the clock

    clock.publish(Clock(clock=to_stamp(START)))
    for role in parameters.NODES:
        ros.wait(
            lambda role=role: (
                'clock on /clock went back by 100.000 s' in ros.says(role)['last_error']
            )
        )
    images.publish(image_message(START + SECOND, picture(0.0)))
    images.publish(image_message(START + SECOND + SECOND // 20, picture(2.0)))
    ros.wait(lambda: len(matched) >= before + 6)
    assert (matched[-2].width, matched[-1].width > 10) == (0, True)
    says = ros.wait(lambda: (s := ros.says('matcher'))['processed'] == '6' and s)
    assert (says['refused'], says['dropped']) == ('0', '0')
    process.send_signal(signal.SIGINT)
    del ros.processes['composed']
    assert process.wait(30) == 0, ros.log('composed')
    assert 'Traceback' not in ros.log('composed') and 'terminate called' not in ros.log('composed')


def test_composed_nodes_read_a_weights_file_once(shipped, tmp_path):
    path, shared = tmp_path / 'w.safetensors', SharedWeights()
    weights.save(path, shipped[0], 3, 3)
    one, other = shared.load(path, 'cpu'), shared.load(path, 'cpu')
    assert one[0] is other[0]
    weights.save(path, one[0], 9, 3)
    assert shared.load(path, 'cpu')[1].version == 9
    with pytest.raises(FileNotFoundError):
        shared.load(tmp_path / 'missing.safetensors', 'cpu')
