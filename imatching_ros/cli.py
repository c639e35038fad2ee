"""The commands: imatching demo, replay, tune, evaluate, export."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
import importlib.metadata
import os
from pathlib import Path
import sys
import time
from typing import Any

from rich.console import Console
from rich.text import Text

from . import __version__, kernels

GAP = 5  #: images between the last that trained and the first that is measured
PICTURE_STEP = 10  #: images between the two of the report's picture
DEMO_FRAMES, DEMO_SEED = 300, 0

#: What is printed may be a path with brackets in it, which rich would take for a colour
console = Console(markup=False, emoji=False, highlight=False)


class Nothing(Exception):
    """A command did all that it could and has nothing to show; its text says why."""


def demo(options: argparse.Namespace) -> None:
    """Render a recording, play it through the nodes, and measure before and after."""
    from rich.progress import Progress

    from .data.recording import open_recording
    from .data.synthetic import render_recording, Sensor

    run_dir = _run_dir(options.out, 'demo')
    with Progress(console=console) as progress:
        task = progress.add_task('Rendering', total=DEMO_FRAMES)
        folder = render_recording(
            run_dir / 'recording',
            seed=options.seed,
            frames=DEMO_FRAMES,
            sensor=replace(Sensor.low_light(0.5), fixed_pattern=12.0),
            depth_every=5,
            progress=lambda done, total: progress.update(task, completed=done),
        )
    _replay(open_recording(folder), run_dir, options, 'a room rendered with a low-light camera')


def replay(options: argparse.Namespace) -> None:
    """Play a recording through the three nodes without loss and write a run folder."""
    recording = _open(options.bag, options)
    _replay(recording, _run_dir(options.out, 'replay'), options, str(options.bag))


def tune(options: argparse.Namespace) -> None:
    """Fine-tune on recordings, deterministic by seed; go on with an interrupted run."""
    import shutil

    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )
    import torch

    from .evaluation.report import Pictures
    from .learning.options import LearnerOptions
    from .learning.tune import TooFewWindowsError
    from .learning.tune import tune as run
    from .matching import weights

    torch.manual_seed(options.seed)
    checkpoints = options.out.with_name(options.out.name + '.checkpoints')
    # --out may hold what it had promoted by then
    interrupted = sorted(checkpoints.glob('epoch_0.safetensors'))
    start = options.weights or next((p for p in (*interrupted, options.out) if p.is_file()), None)
    start = start or weights.default_path()
    matcher, info = weights.load(start)
    _say(f'starting from {start}, version {info.version}')
    recordings = [_open(bag, options) for bag in options.bag]
    kernels.show()
    with console.status('Looking through the images'):
        counts = [sum(1 for _ in recording) for recording in recordings]
    for recording in recordings:
        _say_notes(recording)
    splits = [round(count * options.train_fraction) for count in counts]
    run_dir = _run_dir(options.run_dir, 'tune')
    epochs, started = 2, time.perf_counter()
    columns = (
        TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        frames = progress.add_task('Tracking', total=None)
        bar = progress.add_task('Learning', total=options.steps)

        def on_step(learner, step, verdict) -> None:
            if step:
                progress.update(
                    bar, completed=step.step, description=f'Learning, loss {step.loss:.3f}'
                )
            if verdict:
                kept = 'promoted' if verdict.promoted else 'not promoted'
                progress.console.print(
                    f'step {verdict.step}: {kept}, {verdict.reason}',
                    style='green' if verdict.promoted else None,
                )
                if verdict.promoted:
                    weights.write(options.out, learner.weights())

        try:
            learner, history = run(
                matcher,
                info,
                [(r.camera, _First(r, n)) for r, n in zip(recordings, splits, strict=True)],
                options.steps,
                epochs=epochs,
                options=LearnerOptions(seed=options.seed, objective=options.objective),
                folder=checkpoints,
                on_frame=lambda done, total: progress.update(frames, completed=done, total=total),
                on_step=on_step,
            )
        except TooFewWindowsError as error:
            raise Nothing(str(error)) from None
    if history.resumed:
        _say(f'went on from step {history.resumed} of an interrupted run')
    for note in filter(None, (*history.refused, history.stopped)):
        _warn(note)
    weights.write(options.out, learner.weights())
    # Not from the files: where --out is gone on from, `start` is overwritten by now
    tuned, _ = weights.loads(learner.weights())
    before, after, pictures = _measure(recordings[0], splits[0], [matcher, tuned])
    figures = {
        'input': {
            'frames': sum(map(len, recordings)), 'frames_matched': sum(splits), 'dropped': 0,
            'true_poses': _true_poses(recordings[0]),
        },
        'matching': {'before': before, 'after': after},
        'learning': {
            'steps': learner.step_count,
            'windows': learner.windows,
            'promotions': learner.promotions,
            'rollbacks': learner.rollbacks,
            'seconds': time.perf_counter() - started,
            'model_version': learner.version,
        },
        'latency_ms': {
            'learner_step_p50': _median([1e3 * step.seconds for step in history.steps])
        },
    }
    pictures = replace(
        pictures or Pictures(),
        loss=[(step.step, step.loss) for step in history.steps],
        events=[
            _event(v.step, v.promoted, v.rolled_back, v.version, v.reason)
            for v in history.verdicts
        ],
    )
    _report(run_dir, figures, pictures, f'tune {recordings[0].bag.name}')
    shutil.rmtree(checkpoints, ignore_errors=True)
    _say(f'weights, version {learner.version}: {options.out}')


def evaluate(options: argparse.Namespace) -> None:
    """Measure matching accuracy, pose accuracy and trajectory error of weights, side by side."""
    from rich.table import Table
    import torch

    from .bundle.bundle import Bundle
    from .evaluation.matching import evaluate_matching, evaluation_pairs
    from .evaluation.report import ACCURACY
    from .evaluation.trajectory import trajectory_accuracy
    from .matching import weights
    from .matching.tracker import Tracker
    from .pipeline import track_and_solve

    recording = _open(options.data, options)
    first = round(len(recording) * options.first)
    pairs = evaluation_pairs(recording, first, len(recording) - 1, per_step=options.pairs)
    if not pairs:
        raise Nothing(_why_no_pairs(recording, first))
    kernels.show()
    title = f'{options.data}, images {first} to {len(recording) - 1}, {len(pairs)} pairs'
    table = Table(title=Text(title))
    columns = (*ACCURACY.values(), 'ATE, % of path')
    table.add_column('')
    rows = []
    for path in options.weights or [weights.default_path()]:
        matcher, info = weights.load(path)
        accuracy = evaluate_matching(matcher, recording, pairs)
        tracker, bundle = (
            Tracker(matcher, info.version, recording.camera),
            Bundle(recording.camera),
        )
        for _ in track_and_solve(recording, tracker, bundle):
            pass
        stamps = sorted(bundle.trajectory)
        poses = (
            torch.stack([bundle.trajectory[stamp] for stamp in stamps])
            if stamps
            else torch.empty(0, 7)
        )
        ate = trajectory_accuracy(stamps, poses, recording.ground_truth).ate_percent
        rows.append([getattr(accuracy, key) for key in ACCURACY] + [ate])
        header = Text(f'{Path(path).stem}\nversion {info.version}')
        table.add_column(header, justify='right')
    for index, label in enumerate(columns):
        table.add_row(label, *('–' if row[index] is None else f'{row[index]:.2f}' for row in rows))
    console.print(table)
    _say_notes(recording)


def export(options: argparse.Namespace) -> None:
    """Write a recording for COLMAP or as trajectory and point cloud; the network as ONNX."""
    if options.onnx is None and options.colmap is None and options.map is None:
        raise ValueError('say what to write: --colmap DIR, --map DIR, --onnx DIR, or several')
    if options.bag is None and (options.colmap or options.map):
        raise ValueError('--colmap and --map are of a recording: imatching export BAG ...')
    if options.onnx:
        _export_onnx(options)
    if options.colmap or options.map:
        _export_recording(options)


def _export_onnx(options: argparse.Namespace) -> None:
    from .export.onnx import ENCODE, MATCH, write_onnx
    from .matching import weights

    size = options.size
    if size is None:
        if options.bag is None:
            raise ValueError(
                'the graphs are for images of one size: --size WxH, or a BAG to take it from'
            )
        camera = _open(options.bag, options).camera
        size = camera.width, camera.height
    matcher, info = weights.load(options.weights or weights.default_path())
    with console.status('Exporting, about ten seconds'):
        write_onnx(options.onnx, matcher, info, size)
    _say(
        f'ONNX: {ENCODE} and {MATCH} of version {info.version} for images of '
        f'{size[0]}x{size[1]}, in {options.onnx}'
    )


def _export_recording(options: argparse.Namespace) -> None:
    import cv2
    from rich.progress import track as progress

    from .bundle.bundle import Bundle
    from .export.colmap import camera_model, DATABASE, image_name, IMAGES, write_colmap
    from .matching import weights
    from .matching.tracker import Tracker
    from .nodes.run_files import write_map
    from .pipeline import track_and_solve

    recording = _open(options.bag, options)
    matcher, info = weights.load(options.weights or weights.default_path())
    pictures = options.colmap and options.colmap / IMAGES
    if pictures:  # what cannot be is refused before the work
        camera_model(recording.camera)
        if (options.colmap / DATABASE).exists():
            raise FileExistsError(f'{options.colmap / DATABASE} exists; choose another folder')
        pictures.mkdir(parents=True, exist_ok=True)
    kernels.show()
    tracker, bundle = Tracker(matcher, info.version, recording.camera), Bundle(recording.camera)
    keyframes, landmarks = [], {}
    for frame in progress(
        track_and_solve(recording, tracker, bundle), 'Matching and solving',
        total=len(recording), console=console,
    ):  # fmt: skip
        window = frame.estimate.window
        if window is not None:
            landmarks.update(zip(window.track.tolist(), window.points, strict=True))
        if pictures and not frame.camera.goes_on_from(recording.camera):
            raise ValueError(
                f'the camera of {options.bag} changes within the recording, and a COLMAP model '
                'of it has one: export the parts, or give --camera'
            )
        if frame.is_keyframe:
            keyframes.append(frame.correspondences)
            file = pictures and pictures / image_name(frame.stamp)
            if file and not cv2.imwrite(str(file), frame.image):
                raise OSError(f'{file} could not be written')
    _say_notes(recording)
    if options.map and bundle.trajectory:
        write_map(
            options.map,
            {stamp: T.numpy() for stamp, T in bundle.trajectory.items()},
            {track: point.numpy() for track, point in landmarks.items()},
        )
        _say(
            f'map: {len(bundle.trajectory)} poses, {len(landmarks)} landmarks in {options.map}'
        )
    if options.colmap:
        written = write_colmap(
            options.colmap, recording.camera, keyframes, bundle.trajectory, landmarks,
            bundle.options.prune_px,
        )
        _say(
            f'COLMAP: {written.images} images, {written.posed} posed; {written.pairs} pairs, '
            f'{written.verified} '
            f'verified; {written.points} points in {written.observations} observations, '
            f'{written.error_px:.2f} px RMS; '
            f'in {options.colmap}'
        )
    if not bundle.trajectory:
        last = frame.estimate
        raise Nothing(
            f'none of the {len(recording)} images of {recording.bag} got a pose '
            f'({last.reason or last.status}), so there is no map; '
            'the camera must move sideways past things that have texture'
        )
    if bundle.maps > 1:
        _warn(f'{bundle.maps} maps were begun; each has a scale of its own')


def _replay(recording: Any, run_dir: Path, options: argparse.Namespace, title: str) -> None:
    from .evaluation.report import Pictures
    from .evaluation.trajectory import trajectory_accuracy
    from .matching import weights
    from .replay import replay as play

    result = play(
        recording,
        run_dir,
        learn=options.learn,
        train_fraction=options.train_fraction,
        learn_seconds=options.learn_seconds,
        weights=options.weights,
    )
    for note in result.notes:
        _warn(note)
    trajectory = trajectory_accuracy(
        result.keyframe_stamps, result.keyframe_poses, recording.ground_truth
    )
    matchers = [weights.load(path)[0] for path in (result.weights_before, result.weights_after)]
    before, after, pictures = _measure(recording, result.train_frames, matchers)
    _say_notes(recording)

    def count(node: str, key: str) -> int | None:
        value = result.figure(node, key)
        return None if value is None else int(value)

    steps = [event.values for event in result.learning if event.kind == 'step']
    verdicts = [event.values for event in result.learning if event.kind == 'verdict']
    figures = {
        'input': {
            'frames': result.sent,
            'frames_matched': result.matched,
            'keyframes': count('bundle', 'keyframes'),
            'keyframes_posed': len(result.keyframe_stamps),
            'dropped': result.dropped,
            'true_poses': _true_poses(recording),
        },
        'trajectory': trajectory,
        'matching': {'before': before, 'after': after},
        'learning': {
            'steps': count('learner', 'steps'),
            'windows': count('learner', 'windows'),
            'promotions': count('learner', 'promotions'),
            'rollbacks': count('learner', 'rollbacks'),
            'seconds': result.learning_seconds if steps else None,
            'model_version': int(result.frame_models.max()),
        },
        'latency_ms': {
            f'{node}_{quantile}': result.figure(node, f'latency_{quantile}_ms')
            for node in ('matcher', 'bundle')
            for quantile in ('p50', 'p95')
        }
        | {'learner_step_p50': result.figure('learner', 'step_p50_ms')},
        'throughput_hz': result.throughput_hz,
        'peak_memory_mb': result.peak_memory_mb,
    }
    pictures = replace(
        pictures or Pictures(),
        trajectory=trajectory,
        loss=[(int(values['step']), float(values['loss'])) for values in steps],
        events=[
            _event(
                int(v['step']), v['promoted'] == 'true', v['rolled_back'] == 'true',
                int(v['version']), v['reason'],
            )
            for v in verdicts
        ],
    )
    _report(run_dir, figures, pictures, title)


def _measure(recording: Any, train_frames: int, matchers: Sequence[Any]) -> tuple[Any, Any, Any]:
    """
    Return the accuracy before and after on images that did not train, and their picture.

    None where it cannot be had.
    """
    from .evaluation.matching import accuracy, evaluation_pairs, match_pairs
    from .evaluation.report import Pictures

    first = train_frames + GAP if train_frames else 0
    pairs = evaluation_pairs(recording, first, len(recording) - 1)
    if not pairs:
        return None, None, None
    matched = []
    for when, matcher in zip(('before', 'after'), matchers, strict=True):
        with console.status(
            f'Measuring the weights {when} on {len(pairs)} pairs that did not train'
        ):
            matched.append(list(match_pairs(matcher, recording, pairs)))
    # The pair whose matches changed the median way: neither the prettiest nor the worst
    change = [
        float(
            (after.error_px[after.visible] < 1).float().mean()
            - (before.error_px[before.visible] < 1).float().mean()
        )
        for before, after in zip(*matched, strict=True)
    ]
    typical = sorted(range(len(pairs)), key=change.__getitem__)[len(pairs) // 2]
    pictures = Pictures(before=matched[0][typical], after=matched[1][typical])
    return accuracy(matched[0]), accuracy(matched[1]), pictures


def _report(run_dir: Path, figures: dict[str, Any], pictures: Any, title: str) -> None:
    from .evaluation.report import console_table, write_report

    names = ('torch', 'numpy', 'pypose', 'poselib', 'rosbags', 'ros-kilted-rclpy')
    versions = {'imatching_ros': __version__, 'python': sys.version.split()[0]}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    command = 'imatching ' + ' '.join(sys.argv[1:])
    path = write_report(
        run_dir, figures, pictures, title=title, command=command, versions=versions
    )
    console.print(console_table(figures))
    _say(f'report: {path.resolve()}')


def _true_poses(recording: Any) -> int:
    return 0 if recording.ground_truth is None else len(recording.ground_truth[0])


def _why_no_pairs(recording: Any, first: int) -> str:
    if recording.ground_truth is None:
        return (
            f'{recording.bag} has no ground truth, so there is nothing to measure against; '
            'put groundtruth.txt (TUM) beside it, or record a PoseStamped topic with '
            '"ground_truth" in its name'
        )
    return (
        f'no two images of {recording.bag}, from number {first} on and 5, 10 or 20 apart, have '
        'a true pose within a millisecond of their stamps; choose another --first, or check the '
        "ground truth's stamps"
    )


def _say_notes(recording: Any) -> None:
    for note in recording.notes():
        _warn(note)


def _event(step: int, promoted: bool, rolled_back: bool, version: int, reason: str) -> Any:
    from .evaluation.pictures import Event

    return Event(
        step, 'rollback' if rolled_back else 'promoted' if promoted else 'refused', version, reason
    )


def _say(sentence: str, style: str | None = None) -> None:
    """Print a line whole, whatever the terminal's width: it may be a path to be copied."""
    console.print(sentence, style=style, soft_wrap=True)


def _warn(sentence: str) -> None:
    _say(sentence, 'yellow')


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


class _First:
    """The first images of a recording, as often as they are asked for."""

    def __init__(self, recording: Any, count: int) -> None:
        self.recording, self.count = recording, count
        self.camera_of = recording.camera_of

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        return (item for item, _ in zip(self.recording, range(self.count), strict=False))


def _open(path: Path, options: argparse.Namespace) -> Any:
    from .data.video import open_images

    return open_images(
        path, options.image_topic, options.camera_info_topic, options.camera, options.rectified
    )


def _run_dir(given: Path | None, command: str) -> Path:
    path = given or Path('runs') / f'{command}-{time.strftime("%Y%m%d-%H%M%S")}'
    path.mkdir(parents=True, exist_ok=True)
    return path


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='imatching',
        description="Makes a feature matcher better on a robot's own video, without labels.",
    )
    parser.add_argument('--version', action='version', version=__version__)
    commands = parser.add_subparsers(required=True, metavar='COMMAND')

    def command(function, name: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        added.set_defaults(function=function)
        return added

    def topics(added: argparse.ArgumentParser) -> None:
        added.add_argument('--image-topic', help='where the bag has several cameras')
        added.add_argument(
            '--camera-info-topic', help='where it does not lie beside the image topic'
        )
        added.add_argument(
            '--camera', metavar='CAMERA',
            help='instead of camera_info, after the recording: fx fy cx cy [model] [d ...], '
                 'pixels, or a calibration yaml of ROS or Kalibr (default: camera_info; of a '
                 'video or pictures, camera_info.yaml or intrinsics.txt beside them)',
        )  # fmt: skip
        added.add_argument(
            '--rectified', choices=('auto', 'always', 'never'), default='auto',
            help="whether camera_info's P describes the images, or K and D (default: auto, by "
                 "the image topic's name)",
        )  # fmt: skip

    def learning(added: argparse.ArgumentParser, seconds: float) -> None:
        added.add_argument(
            '--out', type=Path, metavar='DIR', help='run folder (default: a new one in runs/)'
        )
        added.add_argument(
            '--weights', type=Path, metavar='W', help='to start from (default: the shipped ones)'
        )
        added.add_argument(
            '--no-learn', dest='learn', action='store_false', help='match and solve only'
        )
        added.add_argument(
            '--train-fraction', type=_fraction, default=0.7,
            help='of the images; the rest is measured (default: 0.7)',
        )
        added.add_argument(
            '--learn-seconds', type=float, default=seconds,
            help=f'that the learner may go on after its part was played (default: {seconds:g})',
        )  # fmt: skip

    added = command(demo, 'demo')
    learning(added, 120.0)
    added.add_argument(
        '--seed', type=int, default=DEMO_SEED, help='of the scene, the path and the noise'
    )

    added = command(replay, 'replay')
    added.add_argument(
        'bag', type=Path, metavar='BAG', help='rosbag1, rosbag2 (sqlite3, MCAP), or its folder'
    )
    topics(added)
    learning(added, 60.0)

    added = command(tune, 'tune')
    added.add_argument(
        'bag',
        type=Path,
        nargs='+',
        metavar='BAG',
        help='recording, video file or folder of pictures',
    )
    added.add_argument(
        '--out',
        type=Path,
        required=True,
        metavar='W',
        help='weights file; if it exists, go on from it',
    )
    added.add_argument(
        '--objective', choices=('imatching', 'sgp'), default='imatching',
        help="the bundle's reprojection error, or, to compare with, two-view geometry alone "
             '(default: imatching)',
    )  # fmt: skip
    added.add_argument(
        '--weights', type=Path, metavar='W', help='to start from (default: --out, or the shipped)'
    )
    added.add_argument(
        '--run-dir', type=Path, metavar='DIR', help='for the report (default: a new one in runs/)'
    )
    added.add_argument('--steps', type=int, default=400, help='gradient steps (default: 400)')
    added.add_argument(
        '--train-fraction', type=_fraction, default=0.7, help="of each bag's images (default: 0.7)"
    )
    added.add_argument('--seed', type=int, default=0)
    topics(added)

    added = command(evaluate, 'evaluate')
    added.add_argument('data', type=Path, metavar='DATA', help='a recording with ground truth')
    added.add_argument(
        '--weights', type=Path, nargs='+', metavar='W', help='default: the shipped ones'
    )
    added.add_argument(
        '--first', type=_fraction, default=0.0,
        help='where to begin, as a share of the recording (default: 0)',
    )
    added.add_argument(
        '--pairs', type=int, default=20, help='for each step of 5, 10 and 20 images (default: 20)'
    )
    topics(added)

    added = command(export, 'export')
    added.add_argument(
        'bag',
        type=Path,
        nargs='?',
        metavar='BAG',
        help='rosbag1, rosbag2 (sqlite3, MCAP), or its folder',
    )
    added.add_argument(
        '--colmap', type=Path, metavar='DIR', help='for images/, database.db and the model sparse/'
    )
    added.add_argument(
        '--map', type=Path, metavar='DIR', help='for trajectory.txt and landmarks.ply'
    )
    added.add_argument(
        '--onnx', type=Path, metavar='DIR', help='for encode.onnx and match.onnx, for TensorRT'
    )
    added.add_argument(
        '--size', type=_size, metavar='WxH', help="of the graphs' images (default: the BAG's)"
    )
    added.add_argument('--weights', type=Path, metavar='W', help='default: the shipped ones')
    topics(added)
    return parser


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
    options = _parser().parse_args(_joined(sys.argv[1:] if arguments is None else arguments))
    try:
        options.function(options)
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
