"""
The launch file and the package around it.

With launch_ros and an installed package, the whole for real.
"""

import contextlib
from dataclasses import dataclass
import importlib
import itertools
import json
import os
from pathlib import Path
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree

from imatching_ros import __version__
from imatching_ros.nodes import parameters
import launch_file
import pytest
import setuptools

ROOT = launch_file.ROOT


@pytest.fixture
def file(monkeypatch):
    """Return the launch file, run with stand-ins for what has no wheels."""
    return launch_file.LaunchFile(monkeypatch)


@pytest.fixture
def started(file):
    """Return what the launch file would start, as a function of its arguments."""
    return file.start


def test_launch_file_has_the_arguments_of_the_interface(file):
    assert list(file.arguments) == [
        'namespace', 'params_file', 'image_topic', 'camera_info_topic', 'image_transport',
        'rectified', 'external_odometry', 'use_sim_time', 'autostart', 'learning', 'composed',
        'device', 'weights', 'bag', 'camera', 'rate', 'rviz',
    ]
    assert file.arguments['autostart'] == file.arguments['learning'] == 'true'


def test_the_nodes_are_started_as_the_arguments_say(started):
    nodes = started()
    assert list(nodes) == ['matcher', 'bundle', 'learner']
    for role, node in nodes.items():
        assert (node.package, node.name, node.namespace) == ('imatching_ros', role, '')
        assert node.parameters == [
            str(ROOT / 'config' / 'imatching.yaml'),
            {'use_sim_time': False, 'autostart': True, 'image_transport': 'raw'},
        ]
        # a node ends the piece of work in hand, up to 20 s, before it is made to
        assert float(node.sigterm_timeout) > 20 and node.output == 'screen'
    nodes = started(
        namespace='robot', learning='false', use_sim_time='true', autostart='False',
        image_transport='compressed', rectified='always', device='cuda',
    )
    assert list(nodes) == ['matcher', 'bundle']
    for node in nodes.values():
        assert node.namespace == 'robot' and node.parameters[1] == {
            'use_sim_time': True, 'autostart': False, 'image_transport': 'compressed',
            'rectified': 'always', 'device': 'cuda',
        }


def test_composed_nodes_are_one_process_that_knows_which(started):
    for learning, roles in (('true', [*parameters.NODES]), ('false', ['matcher', 'bundle'])):
        (node,) = started(composed='true', learning=learning, namespace='robot').values()
        assert (node.executable, node.name, node.namespace) == ('imatching_node', None, 'robot')
        assert node.parameters[1]['nodes'] == roles


@pytest.mark.parametrize('composed', ['false', 'true'])
def test_a_node_that_is_killed_or_crashes_is_started_again_one_that_ends_is_not(
    started, tmp_path, composed
):
    nodes = started(composed=composed, bag=str(tmp_path))
    player = nodes.pop('player')
    for node in nodes.values():
        ended = {code: launch_file.is_ended(node, code) for code in (0, 2, 1, -9, -11)}
        assert ended == {0: True, 2: True, 1: False, -9: False, -11: False}
        assert 0 < node.respawn_delay < 10
    # the recording is not played twice
    assert all(launch_file.is_ended(player, code) for code in (0, 2, 1, -9))


def test_the_player_gets_the_recording_and_the_clock(started, tmp_path, monkeypatch):
    (tmp_path / 'room').mkdir()
    monkeypatch.chdir(tmp_path)
    given = {'rate': '0.5', 'camera': '1 2 3 4', 'use_sim_time': 'true', 'namespace': 'robot'}
    player = started(bag='room', **given)['player']
    assert (player.name, player.namespace) == ('player', 'robot')
    assert player.parameters[1] == {
        'use_sim_time': True, 'clock': True, 'bag': str(tmp_path / 'room'), 'rate': 0.5,
        'image_topic': '', 'camera': '1 2 3 4',
    }
    assert started(bag='room')['player'].parameters[1] == {
        'use_sim_time': False, 'clock': False, 'bag': str(tmp_path / 'room'), 'rate': 1.0,
        'image_topic': '',
    }
    weights = tmp_path / 'w.safetensors'
    weights.touch()
    assert started(weights='w.safetensors')['learner'].parameters[1]['weights'] == str(weights)


def test_a_camera_of_a_recording_with_several_is_chosen_by_the_topic_arguments(started, tmp_path):
    topics = {'image_topic': '/left/image_raw', 'camera_info_topic': '/left/info'}
    nodes = started(bag=str(tmp_path), rectified='always', **topics)
    assert set(nodes) == {'matcher', 'bundle', 'learner', 'player'}
    played = nodes['player'].parameters[1]
    assert {name: played[name] for name in topics} == topics
    assert played['bag'] == str(tmp_path) and played['rectified'] == 'always'
    # the player tells the camera of the rectified image, which nobody must rectify once more
    assert nodes['matcher'].parameters[1]['rectified'] == 'never'
    assert ('image', '/left/image_raw') in nodes['matcher'].remappings
    assert ('image', '/left/image_raw') in nodes['player'].remappings
    assert all(('camera_info', '/left/info') in node.remappings for node in nodes.values())
    alone = started(bag=str(tmp_path))['player'].parameters[1]
    assert alone['image_topic'] == '' and not {'camera_info_topic', 'rectified'} & set(alone)


@pytest.mark.parametrize(
    ('given', 'says'),
    [
        ({'rectified': 'sometimes'}, 'rectified:=sometimes must be auto, always or never'),
        ({'params_file': '/missing.yaml'}, 'params_file:=/missing.yaml does not exist'),
        ({'weights': '/missing'}, 'weights:=/missing does not exist'),
        ({'bag': '/missing'}, 'bag:=/missing does not exist'),
        ({'image_transport': 'theora'}, 'image_transport:=theora must be raw or compressed'),
        ({'learning': 'maybe'}, 'learning:=maybe must be true or false'),
        ({'bag': '/', 'rate': 'fast'}, 'rate:=fast must be a number'),
    ],
)
def test_what_the_launch_file_cannot_use_is_refused(started, given, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        started(**given)


def everything(started, folder):
    """Return all the nodes that the launch file can start, with all of its arguments given."""
    weights = folder / 'w.safetensors'
    weights.touch()
    given = {'bag': str(folder), 'weights': str(weights), 'device': 'cpu', 'rectified': 'never'}
    return started(**given, rviz='true'), started(**given, composed='true')


@pytest.fixture
def package(monkeypatch):
    """Return what setup.py tells setuptools."""
    told = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, 'setup', lambda **given: told.update(given))
    runpy.run_path('setup.py')
    return told


def test_launch_file_starts_executables_that_are_installed(started, package, tmp_path):
    apart, composed = everything(started, tmp_path)
    assert set(apart) == {*parameters.NODES, 'player', 'rviz2'}
    assert set(composed) == {'imatching', 'player'}
    scripts = dict(line.split(' = ') for line in package['entry_points']['console_scripts'])
    assert set(scripts) == {'imatching', *(f'{role}_node' for role in {*apart, *composed} - {
        'rviz2'})}
    for place in scripts.values():
        module, _, function = place.partition(':')
        assert callable(getattr(importlib.import_module(module), function))


def test_launch_file_sets_parameters_that_are_declared(started, tmp_path):
    for nodes in everything(started, tmp_path):
        for role, node in nodes.items():
            if role == 'rviz2':
                continue
            known = {'use_sim_time'} | {
                parameter.name
                for parameter in parameters.TABLE
                if role != 'player' or role in parameter.nodes
            }
            file, given = node.parameters
            assert Path(file).name == 'imatching.yaml'
            assert set(given) - {'nodes'} <= known, role


def test_launch_file_remaps_topics_that_the_nodes_have(started):
    given = {'image_topic': '/cam/image_raw', 'external_odometry': '/vio/odometry'}
    for node in started(**given).values():
        assert dict(node.remappings) == {
            'image': '/cam/image_raw', 'image/compressed': '/cam/image_raw/compressed',
            'camera_info': '/cam/camera_info', 'external_odometry': '/vio/odometry',
        }


def test_views_are_relative_to_the_namespace(started):
    given = {'rviz': 'true', 'namespace': 'robot', 'image_topic': '/cam/image_raw/compressed'}
    rviz = started(**given)['rviz2']
    assert (rviz.package, rviz.namespace) == ('rviz2', 'robot')
    assert rviz.arguments == ['-d', str(ROOT / 'config' / 'imatching.rviz')]
    shown = re.findall(r'Value: /([\w/]+)$', Path(rviz.arguments[1]).read_text(), re.MULTILINE)
    own = {f'/{topic}': topic for topic in shown if topic != 'image'}
    assert dict(rviz.remappings) == {**own, '/image': '/cam/image_raw'}


def test_views_show_topics_that_the_nodes_have(tmp_path):
    """The nodes are real, and run: their topics are those that ROS has."""
    from ros import Ros

    rviz = (ROOT / 'config' / 'imatching.rviz').read_text()
    shown = set(re.findall(r'Value: /([\w/]+)$', rviz, re.MULTILINE))
    assert {'image', 'debug/matches', 'landmarks', 'keyframes', 'odometry'} == shown
    foxglove = json.loads((ROOT / 'config' / 'foxglove.json').read_text())
    panels = foxglove['configById']

    def leaves(layout) -> list[str]:
        if isinstance(layout, str):
            return [layout]
        return leaves(layout['first']) + leaves(layout['second'])

    assert sorted(leaves(foxglove['layout'])) == sorted(panels)
    shown |= set(re.findall(r'"/([\w/]+)"', json.dumps(panels)))
    assert shown == {
        'image', 'debug/matches', 'landmarks', 'keyframes', 'odometry', 'learning', 'diagnostics',
    }
    ros = Ros(tmp_path)
    try:
        for role in parameters.NODES:
            ros.start(role)
        topics = ros.node.get_topic_names_and_types
        ros.wait(lambda: {f'/{topic}' for topic in shown} <= {name for name, _ in topics()})
    finally:
        ros.close()


def test_package_names_what_launch_and_nodes_import():
    package = ElementTree.parse(ROOT / 'package.xml').getroot()
    assert package.get('format') == '3' and package.findtext('export/build_type') == 'ament_python'
    assert re.fullmatch(r'[^@\s]+@[^@\s]+\.[a-z]+', package.find('maintainer').get('email'))
    depends = {element.text for element in package if element.tag.endswith('depend')}
    imported = set()
    for file in [launch_file.PATH, *(ROOT / 'imatching_ros' / 'nodes').glob('*.py')]:
        imported |= set(re.findall(r'^\s*(?:from|import) (\w+)', file.read_text(), re.MULTILINE))
    ros = {name for name in imported if name.endswith(('_msgs', '_srvs', '_interfaces', '_ros'))}
    ros = (ros | {'rclpy', 'launch', 'ament_index_python'}) - {'imatching_ros'}
    assert ros <= depends, ros - depends


def test_a_version_is_told_once_everywhere(package):
    described = ElementTree.parse(ROOT / 'package.xml').getroot().findtext('version')
    assert package['version'] == described == __version__


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """
    Return the installed package's launch file.

    Its kernels are compiled, which keeps a node busy once per installation.
    """
    pytest.importorskip(
        'launch_ros', reason='launch_ros is not installed (a ROS 2 installation has it)'
    )
    from ament_index_python.packages import get_package_share_directory, PackageNotFoundError

    try:
        share = Path(get_package_share_directory('imatching_ros'))
    except PackageNotFoundError:
        pytest.skip(
            'the package is not in an ament prefix: colcon build, and source install/setup.bash'
        )
    subprocess.run(
        [sys.executable, '-m', 'imatching_ros.kernels'], check=True,
        cwd=tmp_path_factory.mktemp('elsewhere'),
    )
    return share / 'launch' / 'imatching.launch.py'


RUN = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
given = [argument.split(":=") for argument in sys.argv[2:]]
service = LaunchService(noninteractive=True)
source = PythonLaunchDescriptionSource(sys.argv[1])
service.include_launch_description(LaunchDescription([IncludeLaunchDescription(source,
  launch_arguments=given)]))
sys.exit(service.run())
"""


@pytest.fixture
def launched(installed, tmp_path):
    """Start the launch file with arguments, and end what is left; the log is tmp_path / "log"."""
    from imatching_ros.replay.domain import free_domain, LOCALHOST

    processes, stack = [], contextlib.ExitStack()

    def start(*given, domain=None) -> Launched:
        domain = domain or stack.enter_context(free_domain())
        environment = os.environ | {'ROS_DOMAIN_ID': str(domain), LOCALHOST[0]: LOCALHOST[1]}
        with open(tmp_path / 'log', 'wb') as file:
            process = subprocess.Popen(
                [sys.executable, '-c', RUN, str(installed), *given], stdout=file,
                stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            )
        processes.append(process)
        return Launched(process, tmp_path / 'log', domain)

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    stack.close()


@dataclass
class Launched:
    process: subprocess.Popen
    log: Path
    domain: int

    def until(self, pattern: str, count: int = 1) -> re.Match:
        """Wait until the log has it so often, and give the last."""
        deadline = time.monotonic() + 120
        while len(found := list(re.finditer(pattern, text := self.log.read_text()))) < count:
            assert self.process.poll() is None and time.monotonic() < deadline, text
            time.sleep(0.2)
        return found[-1]

    def wait_for(self, state: str, *roles: str) -> None:
        """Until these nodes are in a state of their life cycle."""
        from lifecycle_msgs.srv import GetState
        import rclpy

        context = rclpy.Context()
        rclpy.init(args=[], context=context, domain_id=self.domain)
        executor = rclpy.executors.SingleThreadedExecutor(context=context)
        node = rclpy.create_node('manager', context=context)
        deadline = time.monotonic() + 120
        for role in roles:
            client, said = node.create_client(GetState, f'/{role}/get_state'), ''
            while said != state:
                assert time.monotonic() < deadline, f'{role} is {said}\n{self.log.read_text()}'
                # nobody answers for one that was killed
                answer = client.call_async(GetState.Request())
                rclpy.spin_until_future_complete(node, answer, executor, 2)
                said = answer.result().current_state.label if answer.done() else ''
        node.destroy_node()
        rclpy.shutdown(context=context)

    def end(self) -> str:
        """Do what Ctrl-C does; return everything that was said."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(120)
        return self.log.read_text()


@pytest.fixture
def room(tmp_path):
    from imatching_ros.data.synthetic import render_recording

    return render_recording(tmp_path / 'room', frames=10, size=(160, 128), depth_every=10)


@pytest.mark.parametrize(
    ('given', 'sentence'),
    [
        ('params_file:=/missing.yaml', 'params_file:=/missing.yaml does not exist'),
        ('weights:=/missing.safetensors', 'weights:=/missing.safetensors does not exist'),
        ('bag:=/missing', 'bag:=/missing does not exist'),
        ('image_transport:=theora', 'image_transport:=theora must be raw or compressed'),
        ('learning:=maybe', 'learning:=maybe must be true or false'),
    ],
)
def test_launch_refuses_what_cannot_be(launched, given, sentence):
    launch = launched(given)
    assert launch.process.wait(60) == 1
    assert sentence in launch.log.read_text()


@pytest.mark.parametrize('composed', ['false', 'true'])
def test_launch_plays_a_recording_and_ends_with_sigint(launched, room, composed):
    launch = launched(
        'namespace:=robot', 'image_topic:=/cam/image_raw', f'bag:={room}', f'composed:={composed}',
        'use_sim_time:=true',
    )
    launch.until('the recording has ended: 10 images')
    launch.until(r'player_node-\d\]: process has finished cleanly')
    assert '[robot.matcher]: weights of version' in launch.log.read_text()
    text = launch.end()
    for executable in ['imatching'] if composed == 'true' else parameters.NODES:
        assert re.search(rf'{executable}_node-\d\]: process has finished cleanly', text), text


def test_launch_kill_each_node_in_turn_while_a_camera_plays(launched, day, tmp_path):
    """Each comes back, the others go on meanwhile, and no message is half-written."""
    from imatching_ros.nodes.clouds import correspondences_from_cloud
    from imatching_ros.nodes.images import camera_to_info
    from imatching_ros.nodes.stamps import to_header
    from nav_msgs.msg import Odometry
    from ros import image_message, Ros, SECOND, START
    from sensor_msgs.msg import CameraInfo, Image, PointCloud2
    from std_srvs.srv import Trigger

    values = f'weights_dir: {tmp_path}/weights\n    image_qos: keep_all\n    queries: 200\n'
    (tmp_path / 'params.yaml').write_text(f'/**:\n  ros__parameters:\n    {values}')
    ros, (camera, pictures), over = Ros(tmp_path), day, threading.Event()
    images = ros.node.create_publisher(Image, 'image', 100)
    infos = ros.node.create_publisher(CameraInfo, 'camera_info', 10)
    matched = ros.listen(PointCloud2, 'correspondences', 100)
    poses = ros.listen(Odometry, 'odometry', 100)
    info = camera_to_info(camera, to_header(0, 'camera'))

    def play() -> None:
        order = itertools.cycle([*range(len(pictures)), *range(len(pictures) - 2, 0, -1)])
        for index, which in enumerate(order):
            infos.publish(info)
            images.publish(image_message(START + index * SECOND // 20, pictures[which][1]))
            if over.wait(0.1):
                return

    player = threading.Thread(target=play)
    player.start()
    try:
        launch = launched(f'params_file:={tmp_path / "params.yaml"}', domain=ros.domain)
        launch.wait_for('active', *parameters.NODES)
        ros.wait(lambda: poses)
        assert ros.call(Trigger, 'learner/rollback').success  # a version to go on from
        assert ros.call(Trigger, 'learner/save_checkpoint').success
        for role in parameters.NODES:
            started = rf'{role}_node-\d\]: process started with pid \[(\d+)\]'
            os.kill(int(launch.until(started)[1]), signal.SIGKILL)
            before = len(matched), len(poses)
            if role != 'matcher':  # nobody else's correspondences come without one
                ros.wait(lambda: len(matched) > before[0] + 5)  # noqa: B023
            if role == 'learner':
                ros.wait(lambda: len(poses) > before[1] + 5)  # noqa: B023
            launch.until(started, 2)
            launch.wait_for('active', role)
            before = len(matched), len(poses)
            ros.wait(lambda: len(matched) > before[0] + 20)  # noqa: B023
            ros.wait(lambda: len(poses) > before[1] + 5)  # noqa: B023
        launch.until('goes on from step')
        roles = ('matcher', 'learner')
        ros.wait(lambda: {ros.says(role)['model_version'] for role in roles} == {'1'})
        for message in matched:
            correspondences_from_cloud(message)
        text = launch.end()
        assert text.count('exit code -9') == 3 and 'Traceback' not in text, text
        for role in parameters.NODES:
            assert len(re.findall(rf'{role}_node-\d\]: process started', text)) == 2
            assert re.search(rf'{role}_node-\d\]: process has finished cleanly', text), text
    finally:
        over.set()
        player.join()
        ros.close()


def test_launch_does_not_start_a_refused_node_again(launched, tmp_path):
    wrong = tmp_path / 'params.yaml'
    wrong.write_text('/**/bundle:\n  ros__parameters:\n    prune_px: -1.0\n')
    launch = launched(f'params_file:={wrong}')
    launch.until(r'bundle_node-\d\]: process has died \[pid \d+, exit code 2')
    launch.until('weights of version')
    text = launch.end()
    assert "parameter 'prune_px' is -1, it must lie in [0.1, 100]" in text
    assert len(re.findall(r'bundle_node-\d\]: process started', text)) == 1


def test_launch_leaves_the_lifecycle_to_a_manager(launched):
    launch = launched('autostart:=false', 'learning:=false', 'device:=cpu')
    launch.wait_for('unconfigured', 'matcher', 'bundle')
    text = launch.end()
    assert 'weights of version' not in text and 'learner' not in text
    assert len(re.findall('process has finished cleanly', text)) == 2
