"""What the commands share: a recording's images, words on the terminal, the run folder."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
import importlib.metadata
from pathlib import Path
import sys
import time
from typing import Any

from rich.console import Console

from .. import __version__
from ..data.recording import Recording
from ..data.video import open_images
from ..data.video import Pictures as Video
from ..evaluation import measure
from ..evaluation.pictures import Pictures
from ..evaluation.report import console_table, write_report
from ..matching.protocol import Matcher

#: Packages whose versions stand in the report
PACKAGES = ('torch', 'numpy', 'pypose', 'poselib', 'rosbags', 'ros-kilted-rclpy')

#: What is printed may be a path with brackets in it, which rich would take for a colour
console = Console(markup=False, emoji=False, highlight=False)


def say(sentence: str, style: str | None = None) -> None:
    """Print a line whole, whatever the terminal's width: it may be a path to be copied."""
    console.print(sentence, style=style, soft_wrap=True)


def warn(sentence: str) -> None:
    """Print a line that the user should not overlook."""
    say(sentence, 'yellow')


def warn_of(recording: Recording | Video) -> None:
    """Print what the user should know of a recording's images, once they were read."""
    for note in recording.notes():
        warn(note)


def open_given(path: Path, options: argparse.Namespace) -> Recording | Video:
    """Return the images of a recording, a video or a folder, with the camera that was given."""
    return open_images(
        path, options.image_topic, options.camera_info_topic, options.camera, options.rectified
    )


def true_poses(recording: Recording | Video) -> int:
    """Return how many true poses a recording has."""
    return 0 if recording.ground_truth is None else len(recording.ground_truth[0])


def run_folder(given: Path | None, command: str) -> Path:
    """Return the run folder, which is made: the one that was given, or a new one in runs/."""
    path = given or Path('runs') / f'{command}-{time.strftime("%Y%m%d-%H%M%S")}'
    path.mkdir(parents=True, exist_ok=True)
    return path


def compare(
    recording: Recording | Video, train_frames: int, before: Matcher, after: Matcher
) -> measure.Comparison:
    """Compare two matchers on images that did not train, and say so while it lasts."""
    with console.status('Measuring') as status:
        return measure.compare(
            recording, train_frames, before, after,
            on_start=lambda when, pairs: status.update(
                f'Measuring the weights {when} on {pairs} pairs that did not train'
            ),
        )


def report(run_dir: Path, figures: Mapping[str, Any], pictures: Pictures, title: str) -> None:
    """Write the report of a run, and print its figures and where it is."""
    versions = {'imatching_ros': __version__, 'python': sys.version.split()[0]}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    command = 'imatching ' + ' '.join(sys.argv[1:])
    path = write_report(
        run_dir, figures, pictures, title=title, command=command, versions=versions
    )
    console.print(console_table(figures))
    say(f'report: {path.resolve()}')
