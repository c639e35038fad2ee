"""
All parameters of the nodes in one table.

Declaration, validation, ``config/imatching.yaml`` and ``docs/parameters.md`` follow from it; write
the files anew with ``python -m imatching_ros.nodes.parameters > config/imatching.yaml`` and
``python -m imatching_ros.nodes.parameters --markdown > docs/parameters.md``.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from dataclasses import dataclass
import json
import math
import sys
import textwrap
from typing import Any, TypeVar

Value = bool | int | float | str | tuple[float, ...] | tuple[str, ...]
Options = TypeVar('Options')

NODES = ('matcher', 'bundle', 'learner')  #: the three
OTHERS = ('imatching', 'player')  #: the three in one process; a camera's stand-in


@dataclass(frozen=True)
class Parameter:
    """
    What there is to know of one parameter.

    ``low`` and ``high`` are inclusive; ``choices`` are all that a text, or one of several, may be.
    """

    name: str
    nodes: tuple[str, ...]
    default: Value
    description: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    read_only: bool = False
    option: str = ''  #: the core's option that it sets: "group.field" or "group.field.field"

    def refusal(self, value: Any) -> str | None:
        """Return why a value is refused, in one sentence, or None where it is right."""
        if isinstance(self.default, tuple):
            return self._list_refusal(value)
        if type(value) is not type(self.default):
            return f"parameter '{self.name}' takes a {type(self.default).__name__}, not {value!r}"
        if self.choices and value not in self.choices:
            return (
                f"parameter '{self.name}' is '{value}', it must be one of "
                f'{", ".join(self.choices)}'
            )
        # written so that NaN is refused
        if self.low is not None and not self.low <= value <= self.high:
            return (
                f"parameter '{self.name}' is {value:g}, it must lie in [{self.low:g}, "
                f'{self.high:g}]'
            )
        return None

    def _list_refusal(self, value: Any) -> str | None:
        kind = type(self.default[0])
        if isinstance(value, str | bytes) or not all(type(item) is kind for item in _items(value)):
            return f"parameter '{self.name}' takes a list of {kind.__name__}, not {value!r}"
        items = _items(value)
        if self.choices and not (items and set(items) <= set(self.choices)):
            return (
                f"parameter '{self.name}' is {list(items)}, it must name one or more of "
                f'{", ".join(self.choices)}'
            )
        if kind is float and (
            len(items) != len(self.default) or not all(map(math.isfinite, items))
        ):
            return (
                f"parameter '{self.name}' is {list(items)}, it must be {len(self.default)} "
                'finite numbers'
            )
        return None


def _items(value: Any) -> tuple[Any, ...]:
    return tuple(value) if hasattr(value, '__iter__') else (value,)


_M, _B, _L = (('matcher',), ('bundle',), ('learner',))
_ALL = NODES

TABLE: tuple[Parameter, ...] = (
    # Life
    Parameter('autostart', _ALL, True,
              'Configure and activate at start, and end the process where that is refused; false: '
              'a lifecycle manager does it.', read_only=True),
    Parameter('nodes', ('imatching',), NODES,
              'The nodes that imatching_node runs in its one process.', choices=NODES,
              read_only=True),
    Parameter('device', ('matcher', 'learner'), 'cpu',
              'Where torch computes: cpu, cuda, cuda:1, …', read_only=True),
    # What comes in and how
    Parameter('image_transport', ('matcher', 'learner'), 'raw',
              "raw: sensor_msgs/Image on 'image'; compressed: sensor_msgs/CompressedImage on "
              "'image/compressed'.", choices=('raw', 'compressed'), read_only=True),
    Parameter('image_qos', _ALL, 'sensor_data',
              'sensor_data: the newest image counts, thirty may wait, and what is overwritten '
              'among them nobody counts; keep_all: for replay, everything from image to result is '
              'reliable and kept until it is read.',
              choices=('sensor_data', 'keep_all'), read_only=True),
    Parameter('processing_mode', _M, 'latest',
              'latest: the newest image is matched, older waiting ones are dropped and counted; '
              'all: every image is matched, up to queue_size may wait.', choices=('latest', 'all'),
              read_only=True),
    Parameter('queue_size', _ALL, 200,
              "Messages that may wait for this node's core; the oldest beyond are dropped and "
              'counted.', 1, 100_000, read_only=True),
    Parameter('threads', _ALL, 1,
              'Threads of one torch operation, for the whole process; 0 leaves the choice to '
              'torch.', 0, 256, read_only=True),
    Parameter('rectified', (*_ALL, 'player'), 'auto',
              "always: images are rectified, so camera_info's P describes them; never: they are "
              "raw, so K and D do; auto: rectified where the last part of the image topic's name "
              'begins with image_rect, or a part is rect, rectified or rectify, or it is one of '
              "kitti2bag's.",
              choices=('auto', 'always', 'never'), read_only=True),
    # Weights
    Parameter('weights', ('matcher', 'learner'), '',
              'Weights file to start with; empty: the shipped ones. ~/reload_weights reads it '
              'again.'),
    Parameter('weights_dir', _L, '',
              'Folder that receives each promoted version, and in checkpoints/ what a learner '
              'that is started again goes on from; empty: versions are only published, and only '
              '~/save_checkpoint writes, to the working folder.', read_only=True),
    # Tracking
    Parameter('queries', _M, 600, 'Points per keyframe.', 8, 20_000, read_only=True,
              option='tracker.queries'),
    Parameter('references', _M, 2, 'Past keyframes that each image is matched with.', 1, 10,
              read_only=True, option='tracker.references'),
    Parameter('round_trip_px', _M, 1.0, 'A match must come back to its query this closely, px.',
              0.1, 50.0, option='tracker.round_trip_px'),
    Parameter('agreement_px', _M, 3.0, 'The references of one track must agree this closely, px.',
              0.1, 50.0, option='tracker.agreement_px'),
    Parameter('parallax', _M, 0.03,
              "A keyframe is due when the median point moved this share of the image's width.",
              0.001, 0.5, option='tracker.parallax'),
    Parameter('survivors', _M, 0.6,
              'A keyframe is due when fewer than this share of the points found at first are '
              'still found.', 0.0, 1.0, option='tracker.survivors'),
    # The lower level; bundle and learner must have the same
    Parameter('window_keyframes', _B, 8, 'Keyframes of the window; the oldest leave.', 3, 100,
              read_only=True, option='bundle.keyframes'),
    Parameter('kernel', ('bundle', 'learner'), 'huber', 'Robust kernel of the reprojection error.',
              choices=('none', 'huber', 'cauchy', 'geman_mcclure'), read_only=True,
              option='bundle.adjust.kernel.name'),
    Parameter('kernel_scale', ('bundle', 'learner'), 2.0,
              'Scale of the kernel, standard deviations.', 0.01, 100.0, read_only=True,
              option='bundle.adjust.kernel.scale'),
    Parameter('prune_px', ('bundle', 'learner'), 3.0,
              'An observation farther from its landmark than this is pruned, undistorted px.', 0.1,
              100.0, read_only=True, option='bundle.prune_px'),
    Parameter('min_parallax_deg', _B, 1.0,
              "Widest angle between a landmark's rays must reach this, degrees.", 0.01, 30.0,
              read_only=True, option='bundle.min_parallax_deg'),
    Parameter('min_landmarks', _B, 20,
              'Fewer inliers than this and a frame, or a map, is not trusted.', 6, 10_000,
              read_only=True, option='bundle.min_landmarks'),
    Parameter('lost_frames', _B, 15, 'Frames without a pose before a new map is begun.', 1,
              100_000, read_only=True, option='bundle.patience'),
    # Beside another odometry
    Parameter('poses', _B, 'own',
              'own: poses are solved, and external_odometry, where it comes, gives them their '
              'scale; external: they are those of external_odometry, only landmarks are solved.',
              choices=('own', 'external'), read_only=True, option='bundle.poses'),
    Parameter('camera_pose', _B, (0.0,) * 7,
              "Pose of the camera's optical frame in the child frame of external_odometry: x y z "
              'qx qy qz qw. All zero: the two frames are one, or tf2 knows.', read_only=True),
    # The upper level
    Parameter('learning_rate', _L, 5e-4, "Adam's learning rate.", 1e-8, 0.1,
              option='learner.rate'),
    Parameter('clip', _L, 1.0, 'Largest norm of a gradient.', 1e-6, 1e6, option='learner.clip'),
    Parameter('verdict_every', _L, 30, 'Gradient steps between two verdicts of the gate.', 1,
              100_000, option='learner.verdict_every'),
    Parameter('duty', _L, 1.0, "Share of one processor's time that learning may take.", 0.01, 1.0,
              option='learner.duty'),
    Parameter('max_age', _L, 3,
              'Versions by which the weights behind a window may be older than those in use.', 0,
              1000, option='learner.max_age'),
    Parameter('lessons', _L, 24, 'Windows that are remembered.', 1, 1000, read_only=True,
              option='learner.lessons'),
    Parameter('seed', _L, 0, 'Of the order of lessons.', 0, 2**31 - 1, read_only=True,
              option='learner.seed'),
    # What goes out
    Parameter('vins_features', _M, False,
              'Publish feature_tracker/feature in the form that VINS-Fusion reads.',
              read_only=True),
    Parameter('world_frame', _B, 'map', 'Frame of odometry, keyframes and landmarks.',
              read_only=True),
    Parameter('publish_tf', _B, False,
              "Publish world_frame to the camera's optical frame on /tf; needs tf2_ros.",
              read_only=True),
    Parameter('map_dir', _B, '',
              'Folder for trajectory.txt and landmarks.ply of ~/save_map; empty: the working '
              'folder.'),
    # The learner's pace
    Parameter('enabled', _L, True,
              'Learn; false: watch only, weights stay as they are. ~/enable sets it too.'),
    # The player
    Parameter('bag', ('player',), '',
              'Recording to play: rosbag1, rosbag2, MCAP, a video file or a folder of pictures.',
              read_only=True),
    Parameter('camera', ('player',), '',
              "Instead of the recording's camera_info: fx fy cx cy [model] [d ...], pixels, or a "
              'calibration yaml.', read_only=True),
    Parameter('rate', ('player',), 1.0, "How fast to play, times the recording's own pace.", 0.001,
              1000.0, read_only=True),
    Parameter('image_topic', ('player',), '',
              'Image topic in the recording; empty, or one that it does not have: its only one.',
              read_only=True),
    Parameter('camera_info_topic', ('player',), '',
              'camera_info topic in the recording; empty: the one beside the images.',
              read_only=True),
    Parameter('clock', ('player',), False, "Publish the recording's time on /clock.",
              read_only=True),
)


def of(node: str) -> tuple[Parameter, ...]:
    """Return the parameters of one node, in the order of the table."""
    return tuple(parameter for parameter in TABLE if node in parameter.nodes)


def options(defaults: Options, group: str, node: str, value: Callable[[str], Any]) -> Options:
    """
    Return a core object's options, as the parameters of ``node`` set them.

    These are ``defaults``, but for the fields that the ``option`` of a parameter names in
    ``group``.
    """
    for parameter in of(node):
        head, _, path = parameter.option.partition('.')
        if head == group:
            defaults = _replaced(defaults, path.split('.'), value(parameter.name))
    return defaults


def _replaced(options: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    return dataclasses.replace(
        options, **{name: _replaced(getattr(options, name), rest, value) if rest else value}
    )


def declare(ros_node: Any, node: str, apply: Callable[[dict[str, Value]], None]) -> dict[str, str]:
    """
    Declare the parameters of ``node``, with descriptors, and refuse wrong values from then on.

    Changes that come later together are either all refused or go to ``apply`` together, which may
    refuse them by ValueError. Where a value given at start is wrong the parameter has its default,
    and the returned dictionary says why, one sentence under its name, until a right one is set.
    """
    from rcl_interfaces.msg import (
        FloatingPointRange,
        IntegerRange,
        ParameterDescriptor,
        SetParametersResult,
    )

    known = {parameter.name: parameter for parameter in of(node)}
    wrong = {}
    for name, override in ros_node._parameter_overrides.items():
        if name in known and (reason := known[name].refusal(override.value)):
            wrong[name] = reason
    for parameter in known.values():
        descriptor = ParameterDescriptor(
            description=parameter.description,
            read_only=parameter.read_only,
            additional_constraints=f'one of {", ".join(parameter.choices)}'
            if parameter.choices
            else '',
        )
        if isinstance(parameter.default, float):
            descriptor.floating_point_range = [
                FloatingPointRange(from_value=parameter.low, to_value=parameter.high)
            ]
        elif type(parameter.default) is int:
            descriptor.integer_range = [
                IntegerRange(from_value=parameter.low, to_value=parameter.high, step=1)
            ]
        default = (
            list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        )
        ros_node.declare_parameter(
            parameter.name, default, descriptor, ignore_override=parameter.name in wrong
        )

    def check(changes: list[Any]) -> SetParametersResult:
        ours = {c.name: c.value for c in changes if c.name in known}
        reasons = [
            reason for name, value in ours.items() if (reason := known[name].refusal(value))
        ]
        if ours and not reasons:
            try:
                apply(ours)
            except ValueError as error:
                reasons = [str(error)]
        if not reasons:
            for name in ours:
                wrong.pop(name, None)
        return SetParametersResult(successful=not reasons, reason='; '.join(reasons))

    ros_node.add_on_set_parameters_callback(check)
    return wrong


def to_yaml() -> str:
    """
    Return ``config/imatching.yaml``.

    It has every parameter with its default, what it means and what it may be.
    """
    lines = [
        '# Parameters of imatching_ros, with their defaults. Written by: python -m '
        'imatching_ros.nodes.parameters',
    ]
    for node in (*NODES, *OTHERS):
        lines += ['', f'/**/{node}:', '  ros__parameters:']
        for parameter in of(node):
            comment = ' '.join((parameter.description, *_limits(parameter)))
            lines += [
                f'    # {line}' for line in textwrap.wrap(comment, 106, break_on_hyphens=False)
            ]
            lines.append(f'    {parameter.name}: {yaml_scalar(parameter.default)}')
    return '\n'.join(lines) + '\n'


def to_markdown() -> str:
    """Return ``docs/parameters.md``, which has the same in tables."""
    lines = [
        '# Parameters',
        '',
        'Written by `python -m imatching_ros.nodes.parameters --markdown`. What is not '
        'read-only may change while the',
        'node runs; several changes in one `set_parameters_atomically` are made together, or '
        'none of them.',
    ]
    for node in (*NODES, *OTHERS):
        lines += ['', f'## {node}', '', '| name | type | default | meaning |', '|---|---|---|---|']
        for parameter in of(node):
            kind, default = _kind(parameter.default), yaml_scalar(parameter.default)
            meaning = ' '.join((parameter.description, *_limits(parameter)))
            lines.append(f'| `{parameter.name}` | {kind} | `{default}` | {meaning} |')
    return '\n'.join(lines) + '\n'


def _limits(parameter: Parameter) -> list[str]:
    limits = []
    if parameter.choices:
        limits.append(f'One of {", ".join(parameter.choices)}.')
    if parameter.low is not None:
        limits.append(f'From {_number(parameter.low)} to {_number(parameter.high)}.')
    if parameter.read_only:
        limits.append('Read-only.')
    return limits


def _kind(value: Value) -> str:
    """Return the type as ROS calls it."""
    if isinstance(value, tuple):
        return f'{_kind(value[0])} array'
    return {bool: 'bool', int: 'integer', float: 'double', str: 'string'}[type(value)]


def _number(value: float) -> str:
    return f'{value:g}' if isinstance(value, float) else str(value)


def yaml_scalar(value: Value) -> str:
    """Return a value as YAML writes it, on a command line or in a file."""
    if isinstance(value, list | tuple):
        return f'[{", ".join(map(yaml_scalar, value))}]'
    if isinstance(value, float) and math.isfinite(value):
        text = repr(value)  # YAML 1.1 reads 1e-05 as text: a number needs its point
        return text if '.' in text or 'e' not in text else text.replace('e', '.0e')
    return json.dumps(value)


if __name__ == '__main__':
    print(to_markdown() if sys.argv[1:] == ['--markdown'] else to_yaml(), end='')
