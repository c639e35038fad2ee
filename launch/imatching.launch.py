"""Starts matcher, bundle and learner beside a camera, or beside a recording with ``bag:=``."""

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from launch import LaunchDescription

PACKAGE = "imatching_ros"

ARGUMENTS = (
    ("namespace", "", "Namespace of the nodes and of their topics."),
    ("params_file", "", "Parameter file; empty: the package's config/imatching.yaml."),
    ("image_topic", "image", "The camera's image topic, without /compressed."),
    ("camera_info_topic", "", "Its camera_info; empty: the one beside image_topic."),
    ("image_transport", "raw", "raw or compressed."),
    ("use_sim_time", "false", "Take the time from /clock."),
    ("learning", "true", "Start the learner."),
    ("weights", "", "Weights file to start with; empty: what the parameter file says."),
    ("bag", "", "A recording to play: rosbag1, rosbag2 or MCAP."),
    ("rate", "1.0", "How fast to play it."),
)


def start(context):
    """The nodes, once the arguments have their values."""
    given = {name: LaunchConfiguration(name).perform(context) for name, _, _ in ARGUMENTS}
    params_file = Path(
        given["params_file"] or Path(get_package_share_directory(PACKAGE)) / "config" / "imatching.yaml"
    ).expanduser()
    if not params_file.is_file():  # ROS only warns of it, and runs on defaults
        raise FileNotFoundError(f"params_file:={params_file} does not exist; name a parameter file, or leave it out")
    if given["image_transport"] not in ("raw", "compressed"):
        raise ValueError(f"image_transport:={given['image_transport']} must be raw or compressed")

    image = given["image_topic"].removesuffix("/compressed")
    camera_info = given["camera_info_topic"] or "/".join([*image.split("/")[:-1], "camera_info"])
    remappings = [("image", image), ("image/compressed", f"{image}/compressed"), ("camera_info", camera_info)]
    use_sim_time = {"use_sim_time": given["use_sim_time"].lower() == "true"}

    def node(role, **parameters):
        return Node(
            package=PACKAGE,
            executable=f"{role}_node",
            name=role,
            namespace=given["namespace"],
            parameters=[str(params_file), use_sim_time, parameters],
            remappings=remappings,
            output="screen",
        )

    images = {"image_transport": given["image_transport"]}
    if given["weights"]:
        images["weights"] = str(Path(given["weights"]).expanduser().resolve())
    nodes = [node("matcher", **images), node("bundle")]
    if given["learning"].lower() == "true":
        nodes.append(node("learner", **images))
    if given["bag"]:
        bag = str(Path(given["bag"]).expanduser().resolve())
        nodes.append(node("player", bag=bag, rate=float(given["rate"]), clock=use_sim_time["use_sim_time"]))
    return nodes


def generate_launch_description():
    """The arguments, and what they start."""
    arguments = [
        DeclareLaunchArgument(name, default_value=default, description=description)
        for name, default, description in ARGUMENTS
    ]
    return LaunchDescription([*arguments, OpaqueFunction(function=start)])
