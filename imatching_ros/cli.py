"""The command line: what `imatching` and its commands take, and how they end."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
import importlib
import os
from pathlib import Path
import sys

from . import __version__
from .commands import Nothing

Add = Callable[..., argparse.Action]  #: add_argument of a command's parser


def _fraction(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f'{text} is not between 0 and 1')
    return value


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition('x')
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f'{text} is not a size like 640x480')
    return int(width), int(height)


def _camera(add: Add) -> None:
    add('--image-topic', help='where the bag has several cameras')
    add('--camera-info-topic', help='where it does not lie beside the image topic')
    add(
        '--camera', metavar='CAMERA',
        help='instead of camera_info, after the recording: fx fy cx cy [model] [d ...], pixels, '
             'or a calibration yaml of ROS or Kalibr (default: camera_info; of a video or '
             'pictures, camera_info.yaml or intrinsics.txt beside them)',
    )
    add(
        '--rectified', choices=('auto', 'always', 'never'), default='auto',
        help="whether camera_info's P describes the images, or K and D (default: auto, by the "
             "image topic's name)",
    )


def _learning(add: Add, seconds: float) -> None:
    add('--out', type=Path, metavar='DIR', help='run folder (default: a new one in runs/)')
    add('--weights', type=Path, metavar='W', help='to start from (default: the shipped ones)')
    add('--no-learn', dest='learn', action='store_false', help='match and solve only')
    add(
        '--train-fraction', type=_fraction, default=0.7,
        help='of the images; the rest is measured (default: 0.7)',
    )
    add(
        '--learn-seconds', type=float, default=seconds,
        help=f'that the learner may go on after its part was played (default: {seconds:g})',
    )


def _demo(add: Add) -> None:
    _learning(add, 120.0)
    add('--seed', type=int, default=0, help='of the scene, the path and the noise')


def _replay(add: Add) -> None:
    add('bag', type=Path, metavar='BAG', help='rosbag1, rosbag2 (sqlite3, MCAP), or its folder')
    _camera(add)
    _learning(add, 60.0)


def _tune(add: Add) -> None:
    add(
        'bag', type=Path, nargs='+', metavar='BAG',
        help='recording, video file or folder of pictures',
    )
    add(
        '--out', type=Path, required=True, metavar='W',
        help='weights file; if it exists, go on from it',
    )
    add(
        '--objective', choices=('imatching', 'sgp'), default='imatching',
        help="the bundle's reprojection error, or, to compare with, two-view geometry alone "
             '(default: imatching)',
    )
    add('--weights', type=Path, metavar='W', help='to start from (default: --out, or the shipped)')
    add('--run-dir', type=Path, metavar='DIR', help='for the report (default: a new one in runs/)')
    add('--steps', type=int, default=400, help='gradient steps (default: 400)')
    add(
        '--train-fraction', type=_fraction, default=0.7, help="of each bag's images (default: 0.7)"
    )
    add('--seed', type=int, default=0)
    _camera(add)


def _evaluate(add: Add) -> None:
    add('data', type=Path, metavar='DATA', help='a recording with ground truth')
    add('--weights', type=Path, nargs='+', metavar='W', help='default: the shipped ones')
    add(
        '--first', type=_fraction, default=0.0,
        help='where to begin, as a share of the recording (default: 0)',
    )
    add(
        '--pairs', type=int, default=20, help='for each step of 5, 10 and 20 images (default: 20)'
    )
    _camera(add)


def _export(add: Add) -> None:
    add(
        'bag', type=Path, nargs='?', metavar='BAG',
        help='rosbag1, rosbag2 (sqlite3, MCAP), or its folder',
    )
    add(
        '--colmap', type=Path, metavar='DIR', help='for images/, database.db and the model sparse/'
    )
    add('--map', type=Path, metavar='DIR', help='for trajectory.txt and landmarks.ply')
    add('--onnx', type=Path, metavar='DIR', help='for encode.onnx and match.onnx, for TensorRT')
    add('--size', type=_size, metavar='WxH', help="of the graphs' images (default: the BAG's)")
    add('--weights', type=Path, metavar='W', help='default: the shipped ones')
    _camera(add)


#: Each command, the module of ``commands/`` that runs it: what it takes, and what it does
COMMANDS: dict[str, tuple[Callable[[Add], None], str]] = {
    'demo': (
        _demo, 'Render a recording, play it through the nodes, and measure before and after.',
    ),
    'replay': (
        _replay, 'Play a recording through the three nodes without loss and write a run folder.',
    ),
    'tune': (
        _tune,
        'Fine-tune on recordings, deterministic by seed; go on with an interrupted run.',
    ),
    'evaluate': (
        _evaluate,
        'Measure matching accuracy, pose accuracy and trajectory error of weights, side by side.',
    ),
    'export': (
        _export,
        'Write a recording for COLMAP or as trajectory and point cloud; the network as ONNX.',
    ),
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """
    Return the options of a command line, and the name of the command as ``command``.

    Ends the process where it is asked for help, or with exit code 2 where it cannot be understood.
    """
    parser = argparse.ArgumentParser(
        prog='imatching',
        description="Makes a feature matcher better on a robot's own video, without labels.",
    )
    parser.add_argument('--version', action='version', version=__version__)
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    for name, (add_arguments, does) in COMMANDS.items():
        add_arguments(commands.add_parser(name, help=does, description=does).add_argument)
    return parser.parse_args(_joined(arguments))


def _joined(arguments: Sequence[str]) -> list[str]:
    """
    Return the arguments with the words that follow ``--camera`` as one.

    These are all numbers, and a word before the last of them: the lens model's name. What follows,
    perhaps a recording's name, is left alone.
    """
    words = list(arguments)
    if '--camera' not in words:
        return words
    start = words.index('--camera') + 1
    if words[start:start + 1] == [] or words[start].startswith('--'):
        return words  # argparse says that something is missing
    numbers = [start + k for k, word in enumerate(words[start:]) if _is_number(word)]
    end = start
    while end in numbers or end > start and end + 1 in numbers and words[end][:1] != '-':
        end += 1
    end = max(end, start + 1)
    return [*words[:start - 1], f'--camera={" ".join(words[start:end])}', *words[end:]]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Run the command line.

    Wrong input ends with one sentence and exit code 2, good input from which nothing could be had
    with one sentence and exit code 1.
    """
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        # not before it is named: what the commands import takes seconds
        importlib.import_module(f'.commands.{options.command}', __package__).run(options)
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get('IMATCHING_TRACEBACK'):
            raise
        print(f'imatching: {error}', file=sys.stderr)
        sys.exit(2)
    except Nothing as nothing:
        print(f'imatching: {nothing}', file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == '__main__':
    main()
