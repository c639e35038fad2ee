"""
Nodes that are killed, that hang, and whose disk is full.

The others go on, and what comes back learns on.
"""

import contextlib
import itertools
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip('rclpy', reason="ROS 2's rclpy is not installed")

from imatching_ros.matching import weights  # noqa: E402,I100
from imatching_ros.nodes import parameters  # noqa: E402
from imatching_ros.nodes.clouds import correspondences_from_cloud  # noqa: E402
from imatching_ros.nodes.images import camera_to_info  # noqa: E402
from imatching_ros.nodes.qos import latched, lossless  # noqa: E402
from imatching_ros.nodes.stamps import to_header, to_ns  # noqa: E402
from imatching_ros.replay.domain import free_domain  # noqa: E402
from nav_msgs.msg import Odometry  # noqa: E402
from ros import image_message, Ros, SECOND, START  # noqa: E402
from sensor_msgs.msg import CameraInfo, Image, PointCloud2  # noqa: E402
from std_msgs.msg import UInt8MultiArray  # noqa: E402
from std_srvs.srv import Trigger  # noqa: E402


class Robot(Ros):
    """All three nodes, and a camera that looks to and fro."""

    def __init__(self, folder, day, stops=False) -> None:
        super().__init__(folder, stops)
        camera, images = day
        pictures = [image for _, image in images]
        self.given = {
            'matcher': {'processing_mode': 'all', 'queries': 200},
            'bundle': {},
            'learner': {'weights_dir': str(folder / 'weights')},
        }
        self.folder, self.now = folder / 'weights', START
        self.order = itertools.cycle([*pictures, *pictures[-2:0:-1]])
        self.info = camera_to_info(camera, to_header(0, 'camera'))
        self.images = self.node.create_publisher(Image, 'image', lossless())
        self.infos = self.node.create_publisher(CameraInfo, 'camera_info', lossless())
        self.matched = self.listen(PointCloud2, 'correspondences', lossless())
        self.odometry = self.listen(Odometry, 'odometry', lossless())
        self.weights = self.listen(UInt8MultiArray, 'weights', latched())

    def begin(self, role: str) -> None:
        """Start a node, and wait until it takes part."""
        self.heard['/diagnostics'].clear()
        self.start(role, image_qos='keep_all', **self.given[role])
        self.wait(lambda: self.says(role).get('lifecycle') == 'active')
        running = self.processes.keys()
        self.wait(lambda: self.infos.get_subscription_count() == len(running))
        self.wait(
            lambda: self.images.get_subscription_count() == len(running & {'matcher', 'learner'})
        )
        time.sleep(0.3)

    def kill(self, role: str) -> None:
        process = self.processes.pop(role)
        process.kill()
        process.wait()

    def play(self, count: int) -> None:
        """Return the next images, each of which the matcher must answer, whole."""
        self.infos.publish(self.info)
        for _ in range(count):
            self.now += SECOND // 20
            self.images.publish(image_message(self.now, next(self.order)))
            self.wait(
                lambda: self.matched and to_ns(self.matched[-1].header.stamp) == self.now
            )
            correspondences_from_cloud(self.matched[-1])

    def play_until(self, condition) -> None:
        for _ in range(20):
            self.play(10)
            time.sleep(0.2)
            if condition():
                return
        said = {role: self.says(role) for role in self.processes}
        raise AssertionError(f'in vain in 200 images: {said}')

    def play_until_posed(self) -> None:
        """How many images a map takes depends on how the camera moves in them."""
        before = len(self.odometry)
        self.play_until(lambda: len(self.odometry) > before)

    def version(self, role: str) -> int:
        return int(self.says(role).get('model_version', -1))


@contextlib.contextmanager
def running(robot):
    try:
        for role in parameters.NODES:
            robot.begin(role)
        yield robot
    finally:
        robot.close()


@pytest.fixture(scope='module')
def robot(tmp_path_factory, day):
    with running(Robot(tmp_path_factory.mktemp('robot'), day)) as robot:
        yield robot


def test_fault_two_runs_at_once_are_not_given_one_domain():
    with free_domain() as domain:
        with pytest.raises(RuntimeError, match='no ROS domain is free'):
            with free_domain([domain]):
                pass
        with free_domain() as other:
            assert other != domain


def test_fault_learner_that_hangs_costs_the_matcher_no_image(day, tmp_path):
    with running(Robot(tmp_path, day, stops=True)) as robot:
        # It hears the camera's images before it has found the matcher, and what that makes of them
        received = lambda: int(robot.says('learner').get('received', 0))  # noqa: E731
        robot.play_until(lambda: received() > len(robot.matched) + 20)
        time.sleep(2.0)  # it says once a second what it has received
        robot.processes['learner'].send_signal(signal.SIGSTOP)
        try:
            before, answered = received(), len(robot.matched)
            robot.play(40)
            assert len(robot.matched) == answered + 40
        finally:
            robot.processes['learner'].send_signal(signal.SIGCONT)
        robot.wait(
            lambda: robot.says('learner').get('waiting') == '0' and received() >= before + 80
        )
        assert robot.says('matcher')['dropped'] == robot.says('matcher')['refused'] == '0'


def test_fault_full_disk_keeps_no_weights_from_the_matcher(robot):
    """
    The limit on a file's size stands for the disk's.

    Either way the system refuses the write.
    """
    learner = robot.processes['learner']
    robot.play(5)
    robot.wait(lambda: robot.version('learner') >= 0 and robot.says('learner')['processed'] != '0')
    before = robot.version('learner')
    resource.prlimit(learner.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        assert robot.call(Trigger, 'learner/rollback').success
        robot.wait(lambda: robot.version('matcher') == robot.version('learner') == before + 1)
        assert 'could not be written' in robot.says('learner')['last_error']
        refused = robot.call(Trigger, 'learner/save_checkpoint')
        assert not refused.success and 'too large' in refused.message.lower()
        assert not [path for path in robot.folder.rglob('*') if path.is_file()], (
            'nothing half-written'
        )
    finally:
        resource.prlimit(
            learner.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        )
    assert robot.call(Trigger, 'learner/save_checkpoint').success
    assert [weights.load(path) for path in robot.folder.rglob('version_*.safetensors')]


def test_kill_learner_goes_on_from_its_last_checkpoint(robot):
    before = robot.version('learner') + 1
    assert robot.call(Trigger, 'learner/rollback').success
    assert robot.call(Trigger, 'learner/save_checkpoint').success
    robot.wait(lambda: robot.version('matcher') == robot.version('learner') == before)
    robot.kill('learner')
    robot.play(10)
    assert robot.version('matcher') == before
    robot.begin('learner')
    robot.play(5)
    robot.wait(lambda: robot.version('learner') == before)
    assert robot.call(Trigger, 'learner/rollback').success
    robot.wait(lambda: robot.version('matcher') == before + 1)  # a version is never given twice


def test_kill_bundle_begins_a_new_map_and_the_matcher_misses_nothing(robot):
    robot.kill('bundle')
    robot.play(10)
    robot.begin('bundle')
    robot.play_until_posed()
    assert robot.says('matcher')['dropped'] == robot.says('matcher')['refused'] == '0'


def test_kill_matcher_comes_back_with_the_weights_that_were_in_use(robot):
    version = robot.version('learner')
    robot.kill('matcher')
    robot.begin('matcher')
    robot.wait(lambda: robot.version('matcher') == version)
    robot.play_until_posed()


def test_fault_images_of_another_size_and_stamps_from_nowhere_reach_nobody(robot):
    """Two publishers: the second one's camera is another, and its clock is wrong."""
    robot.play(5)
    robot.wait(lambda: robot.says('matcher').get('waiting') == '0')
    before = {role: int(robot.says(role)['refused']) for role in ('matcher', 'learner')}
    image = next(robot.order)
    for index in range(10):
        robot.images.publish(image_message(robot.now + (index - 5) * 1000 * SECOND, image[:100]))
        robot.play(1)
        assert len(correspondences_from_cloud(robot.matched[-1])), (
            'tracking was not disturbed'
        )
    for role in before:
        robot.wait(lambda role=role: int(robot.says(role)['refused']) == before[role] + 10)
        assert (
            'publish the camera_info that belongs to the image' in robot.says(role)['last_error']
        )


def test_fault_one_bad_stamp_loses_no_map(robot):
    """Nor does one make the learner forget."""
    robot.play_until_posed()
    robot.wait(lambda: robot.says('matcher').get('waiting') == '0')
    maps = robot.says('bundle')['maps']
    before = {role: int(robot.says(role)['refused']) for role in ('matcher', 'learner')}
    for stamp in (0, robot.now - 100 * SECOND, robot.now + 10**8 * SECOND):
        robot.images.publish(image_message(stamp, next(robot.order)))
        robot.play(2)
        assert len(correspondences_from_cloud(robot.matched[-1]))
    for role in before:
        robot.wait(lambda role=role: int(robot.says(role)['refused']) == before[role] + 3)
        assert 'unless the next one goes on from it' in robot.says(role)['last_error']
    assert robot.says('bundle')['maps'] == maps


def test_fault_two_publishers_of_one_camera_are_said(robot):
    """Each image comes twice, the second time as it is or of half a second ago."""
    second = robot.node.create_publisher(Image, 'image', lossless())
    robot.connect(second, 2)
    robot.play(5)
    robot.wait(lambda: robot.says('matcher').get('waiting') == '0')
    before = {role: int(robot.says(role)['refused']) for role in ('matcher', 'learner')}
    for index in range(10):
        robot.play(1)
        second.publish(image_message(robot.now - index % 2 * SECOND // 2, next(robot.order)))
    robot.play(1)
    assert len(correspondences_from_cloud(robot.matched[-1]))
    for role in before:
        robot.wait(lambda role=role: int(robot.says(role)['refused']) == before[role] + 10)
        assert 'check for a second publisher' in robot.says(role)['last_error']
    robot.node.destroy_publisher(second)


def test_fault_weights_file_cut_in_the_middle(tmp_path):
    """At a start it ends the matcher, later the matcher keeps what it has."""
    data = weights.default_path().read_bytes()
    path, ros = tmp_path / 'w.safetensors', Ros(tmp_path)
    path.write_bytes(data)
    try:
        ros.start('matcher', weights=str(path))
        ros.wait(lambda: ros.says('matcher').get('lifecycle') == 'active')
        path.write_bytes(data[:len(data) // 2])
        refused = ros.call(Trigger, 'matcher/reload_weights')
        assert not refused.success and f'{path}: not a safetensors file, or cut' in refused.message
        ros.wait(lambda: 'cut short' in ros.says('matcher')['last_error'])
        assert ros.says('matcher')['model_version'] == '0'
        ros.end('matcher')
        assert ros.start('matcher', weights=str(path)).wait(60) == 2
        assert ros.log('matcher').startswith(f'matcher: {path}: not a safetensors file, or cut')
        assert len(ros.log('matcher').splitlines()) == 1
        del ros.processes['matcher']
    finally:
        ros.close()


STOPPED = """
import signal, rclpy
from nav_msgs.msg import Odometry
from sensor_msgs.msg import PointCloud2
rclpy.init()
node = rclpy.create_node('consumer')
node.create_subscription(PointCloud2, 'correspondences', lambda _: None, 10)
node.create_subscription(Odometry, 'odometry', lambda _: None, 10)
rclpy.spin(node)
"""


def test_fault_slow_consumer_holds_nobody_up(day, tmp_path):
    """One that has stopped reading altogether, under the QoS of a robot."""
    camera, pictures = day
    ros = Ros(tmp_path, stops=True)
    try:
        ros.start('matcher', queries=200)
        ros.start('bundle')
        images = ros.node.create_publisher(Image, 'image', 10)
        infos = ros.node.create_publisher(CameraInfo, 'camera_info', 10)
        matched = ros.listen(PointCloud2, 'correspondences', 10)
        ros.connect(images)
        ros.connect(infos, 2)
        ros.processes['consumer'] = consumer = subprocess.Popen(
            [sys.executable, '-c', STOPPED], env=os.environ | ros.settings
        )
        for topic, readers in (('correspondences', 3), ('odometry', 1)):
            ros.wait(lambda: ros.node.count_subscribers(topic) == readers)  # noqa: B023
        infos.publish(camera_to_info(camera, to_header(0, 'camera')))
        stamps = itertools.count(START, SECOND // 20)

        def play() -> None:
            before = len(matched)
            images.publish(image_message(next(stamps), pictures[before % len(pictures)][1]))
            ros.wait(lambda: len(matched) > before, timeout=20)

        # The bundle may find the matcher later than this process does
        while ros.says('bundle').get('received', '0') == '0':
            play()
            time.sleep(0.1)
        time.sleep(2.0)  # it says once a second what it has received
        missed = len(matched) - int(ros.says('bundle')['received'])
        consumer.send_signal(signal.SIGSTOP)
        for _ in range(150):  # many times what a reader's queue holds
            play()
        for role, count in (('matcher', len(matched)), ('bundle', len(matched) - missed)):
            ros.wait(lambda role=role, n=str(count): ros.says(role)['processed'] == n, timeout=60)
            assert ros.says(role)['dropped'] == ros.says(role)['refused'] == '0'
        consumer.send_signal(signal.SIGCONT)
    finally:
        ros.close()


def test_fault_nothing_unforeseen_was_said(robot):
    """Runs last: of all that the tests above have done to the nodes."""
    for role in robot.processes:
        assert 'unexpected' not in robot.log(role) and 'Traceback' not in robot.log(role), (
            robot.log(role)
        )
