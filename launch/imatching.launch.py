"""Starts matcher, bundle and learner beside a camera, or beside a recording with ``bag:=``."""

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, EmitEvent, OpaqueFunction
from launch.events import matches_action
from launch.events.process import ShutdownProcess
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

PACKAGE = 'imatching_ros'

ARGUMENTS = (
    ('namespace', '', 'Namespace of the nodes and of their topics.'),
    ('params_file', '', "Parameter file; empty: the package's config/imatching.yaml."),
    ('image_topic', 'image', "The camera's image topic, without /compressed."),
    ('camera_info_topic', '', 'Its camera_info; empty: the one beside image_topic.'),
    ('image_transport', 'raw', 'raw or compressed.'),
    (
        'rectified', '',
        "Whether the images are rectified: auto (by their topic's name), always or never; empty: "
        'what the parameter file says.',
    ),
    (
        'external_odometry', 'external_odometry',
        'Topic of another odometry (nav_msgs/Odometry), for scale or poses.',
    ),
    ('use_sim_time', 'false', 'Take the time from /clock.'),
    ('autostart', 'true', 'Configure and activate the nodes; false: a lifecycle manager does it.'),
    ('learning', 'true', 'Start the learner.'),
    ('composed', 'false', 'Run the nodes in one process.'),
    (
        'device', '',
        'Where torch computes, such as cpu or cuda; empty: what the parameter file says.',
    ),
    ('weights', '', 'Weights file to start with; empty: what the parameter file says.'),
    (
        'bag', '',
        'A recording to play: rosbag1, rosbag2, MCAP, a video file or a folder of pictures.',
    ),
    (
        'camera', '',
        "Instead of the recording's camera_info: 'fx fy cx cy [model] [d ...]' or a yaml file.",
    ),
    ('rate', '1.0', 'How fast to play it.'),
    ('rviz', 'false', "Start RViz with the package's config/imatching.rviz."),
)

END_S = '25'  #: longer than a node takes to end the piece of work in hand; then SIGTERM
RESTART_S = 1.0  #: after which a node that was killed, or crashed, is started again
#: a node's exit code where a parameter or a file is wrong: starting it again would not help
REFUSED = 2
VIEWS = ('debug/matches', 'landmarks', 'keyframes', 'odometry')


def start(context):
    """Return the nodes, once the arguments have their values."""
    given = {name: LaunchConfiguration(name).perform(context) for name, _, _ in ARGUMENTS}
    share = Path(get_package_share_directory(PACKAGE))
    params_file = Path(given['params_file'] or share / 'config' / 'imatching.yaml').expanduser()
    if not params_file.is_file():  # ROS only warns of it, and runs on defaults
        raise FileNotFoundError(
            f'params_file:={params_file} does not exist; name a parameter file, or leave it out'
        )
    if given['image_transport'] not in ('raw', 'compressed'):
        raise ValueError(f'image_transport:={given["image_transport"]} must be raw or compressed')

    def truth(name):
        if given[name].lower() not in ('true', 'false'):
            raise ValueError(f'{name}:={given[name]} must be true or false')
        return given[name].lower() == 'true'

    def file(name):
        path = Path(given[name]).expanduser().resolve()
        if not path.exists():
            raise FileNotFoundError(f'{name}:={given[name]} does not exist')
        return str(path)

    image = given['image_topic'].removesuffix('/compressed')
    camera_info = given['camera_info_topic'] or '/'.join([*image.split('/')[:-1], 'camera_info'])
    remappings = [
        ('image', image), ('image/compressed', f'{image}/compressed'),
        ('camera_info', camera_info),
        ('external_odometry', given['external_odometry']),
    ]
    time = {'use_sim_time': truth('use_sim_time')}
    common = {**time, 'autostart': truth('autostart'), 'image_transport': given['image_transport']}
    if given['rectified'] not in ('', 'auto', 'always', 'never'):
        raise ValueError(f'rectified:={given["rectified"]} must be auto, always or never')
    if given['device']:
        common['device'] = given['device']
    if given['weights']:
        common['weights'] = file('weights')
    if given['bag']:
        common['rectified'] = 'never'  # the player tells the finished camera
    elif given['rectified']:
        common['rectified'] = given['rectified']

    def node(role, name, parameters, **options):
        return Node(
            package=PACKAGE, executable=f'{role}_node', name=name, namespace=given['namespace'],
            parameters=[str(params_file), parameters], remappings=remappings, output='screen',
            sigterm_timeout=END_S, **options,
        )

    def kept_alive(role, name, parameters):
        def ended(event, _):
            if event.returncode in (0, REFUSED):
                return [
                    EmitEvent(event=ShutdownProcess(process_matcher=matches_action(event.action)))
                ]

        return node(role, name, parameters, respawn=True, respawn_delay=RESTART_S, on_exit=ended)

    roles = ['matcher', 'bundle', 'learner'] if truth('learning') else ['matcher', 'bundle']
    if truth('composed'):
        nodes = [kept_alive('imatching', None, {**common, 'nodes': roles})]
    else:
        nodes = [kept_alive(role, role, common) for role in roles]
    if given['bag']:
        try:
            rate = float(given['rate'])
        except ValueError:
            raise ValueError(f'rate:={given["rate"]} must be a number') from None
        played = {**time, 'bag': file('bag'), 'rate': rate, 'clock': time['use_sim_time']}
        # What names the camera's topics names the recording's too: it may hold several cameras
        played['image_topic'] = '' if image == 'image' else image
        for name in ('camera_info_topic', 'camera', 'rectified'):
            if given[name]:
                played[name] = given[name]
        nodes.append(node('player', 'player', played))
    if truth('rviz'):
        # The views are absolute in RViz's file, and relative to the namespace here
        views = [(f'/{topic}', topic) for topic in VIEWS] + [('/image', image)]
        config = ['-d', str(share / 'config' / 'imatching.rviz')]
        nodes.append(
            Node(package='rviz2', executable='rviz2', namespace=given['namespace'],
                 arguments=config,
                 parameters=[time], remappings=views)
        )
    return nodes


def generate_launch_description():
    """Return the arguments, and what they start."""
    arguments = [
        DeclareLaunchArgument(name, default_value=default, description=description)
        for name, default, description in ARGUMENTS
    ]
    return LaunchDescription([*arguments, OpaqueFunction(function=start)])
