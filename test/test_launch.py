"""The launch file and the package around it; with launch_ros and an installed package, the whole for real."""

import ast
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from imatching_ros.nodes import parameters

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch" / "imatching.launch.py"
TREE = ast.parse(LAUNCH.read_text(), str(LAUNCH))


def calls(name: str) -> list[ast.Call]:
    return [n for n in ast.walk(TREE) if isinstance(n, ast.Call) and getattr(n.func, "id", None) == name]


def arguments() -> list[str]:
    table = next(n.value for n in TREE.body if isinstance(n, ast.Assign) and n.targets[0].id == "ARGUMENTS")
    return [name for name, _, _ in ast.literal_eval(table)]


def console_scripts() -> set[str]:
    return set(re.findall(r'"(\w+) = ', (ROOT / "setup.py").read_text().replace('f"', '"')))


def test_launch_file_has_the_arguments_of_the_interface():
    compile(TREE, str(LAUNCH), "exec")
    assert arguments() == [
        "namespace", "params_file", "image_topic", "camera_info_topic", "image_transport", "use_sim_time", "learning",
        "weights", "bag", "rate",
    ]  # fmt: skip


def test_launch_file_starts_executables_that_are_installed():
    roles = {call.args[0].value for call in calls("node")}
    assert roles == {*parameters.NODES, "player"}
    assert {f"{role}_node" for role in roles} <= console_scripts()


def test_launch_file_sets_parameters_that_are_declared():
    for call in calls("node"):
        declared = {parameter.name for parameter in parameters.of(call.args[0].value)}
        assert {keyword.arg for keyword in call.keywords if keyword.arg} <= declared
    images = re.findall(r'images\["(\w+)"\]|images = \{"(\w+)"', LAUNCH.read_text())
    given = {name for pair in images for name in pair if name}
    assert given == {"image_transport", "weights"}
    for role in ("matcher", "learner"):
        assert given <= {parameter.name for parameter in parameters.of(role)}


def test_launch_file_remaps_topics_that_the_nodes_have():
    sources = {pair.elts[0].value for pair in ast.walk(TREE) if isinstance(pair, ast.Tuple) and len(pair.elts) == 2
               and isinstance(pair.elts[0], ast.Constant) and not isinstance(pair.elts[1], ast.Constant)}  # fmt: skip
    assert sources == {"image", "image/compressed", "camera_info"}
    nodes = "".join((ROOT / "imatching_ros" / "nodes" / f"{name}.py").read_text() for name in ("matcher", "core_node"))
    for topic in sources:
        assert f'"{topic}"' in nodes


def test_package_names_what_launch_and_nodes_import():
    package = ElementTree.parse(ROOT / "package.xml").getroot()
    assert package.get("format") == "3" and package.findtext("export/build_type") == "ament_python"
    assert re.fullmatch(r"[^@\s]+@[^@\s]+\.[a-z]+", package.find("maintainer").get("email"))
    depends = {element.text for element in package if element.tag.endswith("depend")}
    imported = set()
    for file in [LAUNCH, *(ROOT / "imatching_ros" / "nodes").glob("*.py")]:
        imported |= set(re.findall(r"^\s*(?:from|import) (\w+)", file.read_text(), re.MULTILINE))
    ros = {name for name in imported if name.endswith(("_msgs", "_srvs", "_interfaces", "_ros"))}
    ros = (ros | {"rclpy", "launch", "ament_index_python"}) - {"imatching_ros"}
    assert ros <= depends, ros - depends
    version = re.search(r'__version__ = "(.+)"', (ROOT / "imatching_ros" / "__init__.py").read_text())[1]
    assert package.findtext("version") == version and f'version="{version}"' in (ROOT / "setup.py").read_text()


@pytest.fixture
def installed():
    """The installed package's launch file."""
    pytest.importorskip("launch_ros", reason="launch_ros is not installed (a ROS 2 installation has it)")
    from ament_index_python.packages import PackageNotFoundError, get_package_share_directory

    try:
        share = Path(get_package_share_directory("imatching_ros"))
    except PackageNotFoundError:
        pytest.skip("the package is not in an ament prefix: colcon build, and source install/setup.bash")
    return share / "launch" / "imatching.launch.py"


RUN = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
given = [argument.split(":=") for argument in sys.argv[2:]]
service = LaunchService()
source = PythonLaunchDescriptionSource(sys.argv[1])
service.include_launch_description(LaunchDescription([IncludeLaunchDescription(source, launch_arguments=given)]))
sys.exit(service.run())
"""


def start(launch_file, log, *given) -> subprocess.Popen:
    from imatching_ros.nodes.replay import free_domain

    environment = os.environ | {"ROS_DOMAIN_ID": str(free_domain()), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
    with open(log, "wb") as file:
        return subprocess.Popen(
            [sys.executable, "-c", RUN, str(launch_file), *given], stdout=file, stderr=subprocess.STDOUT,
            env=environment, start_new_session=True,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("params_file:=/missing.yaml", "params_file:=/missing.yaml does not exist"),
        ("image_transport:=theora", "image_transport:=theora must be raw or compressed"),
    ],
)
def test_launch_refuses_what_cannot_be(installed, tmp_path, given, sentence):
    process = start(installed, tmp_path / "log", given)
    assert process.wait(60) == 1
    assert sentence in (tmp_path / "log").read_text()


def test_launch_plays_a_recording_and_ends_with_sigint(installed, tmp_path):
    from imatching_ros.data.synthetic import render_recording

    folder = render_recording(tmp_path / "room", frames=10, size=(160, 128), depth_every=10)
    log = tmp_path / "log"
    process = start(installed, log, "namespace:=robot", "image_topic:=/cam/image_raw", f"bag:={folder}")
    deadline = time.monotonic() + 120
    while "the recording has ended: 10 images" not in (text := log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, text
        time.sleep(0.2)
    assert "[robot.matcher]: weights of version" in text
    process.send_signal(signal.SIGINT)
    process.wait(60)
    text = log.read_text()
    for role in (*parameters.NODES, "player"):
        assert re.search(rf"{role}_node-\d\]: process has finished cleanly", text), text
