"""What the learner and its gate are measured on: rendered scenes, recordings, and faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
import json
from pathlib import Path

from imatching_ros.bundle.bundle import Bundle
from imatching_ros.data.recording import open_recording, Recording
from imatching_ros.data.synthetic import make_scene, render_recording, Sensor
from imatching_ros.evaluation.matching import evaluate_matching, evaluation_pairs
from imatching_ros.learning.learner import Learner
from imatching_ros.matching import weights
from imatching_ros.matching.tracker import Tracker
import numpy as np
from rich.console import Console
from rich.progress import Progress
import torch

RECORDINGS = Path(__file__).resolve().parents[2] / 'shared' / 'recordings'
DIM = replace(Sensor.low_light(0.5), fixed_pattern=12.0)
#: Rendered scenes: the path through them, their surfaces, the camera.
RENDERED = {
    'indoor': ('handheld', 'mixed', DIM),
    'outdoor': ('driving', 'mixed', DIM),
    'low_texture': ('handheld', 'plain', DIM),
    'repetitive': ('handheld', 'repetitive', DIM),
    'light_change': ('handheld', 'mixed', replace(DIM, wander=0.8)),
}
REAL = ('redkitchen', 'kitti_street', 'hololens_office', 'tabletop')
TRAINED, GAP = 0.7, 5  # share of a scene that trains; images between it and what is measured
SIZE = (320, 240)  # of rendered images, px


class Part:
    """The first images of a recording."""

    def __init__(self, recording: Recording, count: int) -> None:
        self.recording, self.count = recording, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        return (item for item, _ in zip(self.recording, range(self.count), strict=False))


def opened(
    scene: str, seed: int, frames: int, cache: Path, console: Console
) -> Recording | None:
    """Return a scene, rendered where it is not in the cache; None where a recording is absent."""
    if scene in REAL:
        if not (RECORDINGS / scene).is_dir():
            console.print(f'[yellow]{scene} is left out: {RECORDINGS / scene} is not there[/]')
            return None
        return open_recording(RECORDINGS / scene)
    path, surfaces, sensor = RENDERED[scene]
    folder = cache / f'{scene}-{seed}-{frames}'
    if not folder.is_dir():
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(f'Rendering {scene} {seed}', total=frames)
            render_recording(
                folder, seed=seed, frames=frames, size=SIZE, path=path, surfaces=surfaces,
                sensor=sensor, depth_every=5,
                progress=lambda done, total: progress.update(task, completed=done),
            )
    return open_recording(folder)


class Rows(list):
    """The rows measured so far, with those that the file of an earlier run has."""

    def __init__(self, path: Path | None, key: tuple[str, ...], console: Console) -> None:
        super().__init__(json.loads(path.read_text()) if path and path.is_file() else ())
        self.path, self.key, self.console = path, key, console

    def has(self, *key: object) -> bool:
        return any(tuple(row[name] for name in self.key) == key for row in self)

    def add(self, row: dict) -> None:
        self.append(row)
        self.console.print({key: short(value) for key, value in row.items()})
        if self.path:
            self.path.write_text(json.dumps(self, indent=1) + '\n')


def short(value: object) -> object:
    """Return a figure as it is printed."""
    return round(value, 2) if isinstance(value, float) else value


# Faults ------------------------------------------------------------------------------------------

# images: good, then faulty; those that are measured
GOOD, FAULTY, FIRST_MEASURED, LAST = 40, 60, 105, 150


class Place:
    """
    A rendered room and what a camera does in it, with images on demand.

    Beside it is a recording of other images to measure on.
    """

    def __init__(self, folder: Path, sensor: Sensor, seed: int) -> None:
        self.sensor, self.seed = sensor, seed
        self.recording = open_recording(
            folder if folder.is_dir() else render_recording(
                folder, seed=seed, frames=LAST, size=SIZE, sensor=sensor, depth_every=5
            )
        )
        self.camera = self.recording.camera
        self.images = list(self.recording)[:GOOD + FAULTY]
        self.pairs = evaluation_pairs(self.recording, FIRST_MEASURED, LAST - 1, steps=(5, 10))
        self.scene, self.path = make_scene('handheld', seed, self.camera, LAST / 20.0)
        self.rng = np.random.default_rng([seed, 9])
        # the recording's own
        self.pattern = sensor.pattern(SIZE, np.random.default_rng([seed, 3]))

    def mma(self, matcher: torch.nn.Module) -> float:
        return evaluate_matching(matcher, self.recording, self.pairs).mma_1px

    def light(self, pose: np.ndarray) -> np.ndarray:
        """Return the irradiance (H, W) seen from a pose (7,)."""
        return self.scene.image(torch.from_numpy(pose).expand(4, 7), self.camera)

    def exposed(self, irradiance: np.ndarray) -> np.ndarray:
        return self.sensor.expose(
            irradiance.astype(np.float32), np.zeros(2), self.rng, self.pattern
        )

    def pose(self, k: int) -> np.ndarray:
        return self.path(np.array([k / 20.0]))[0]

    def with_fault(self, change: Callable[[int], np.ndarray]) -> list[tuple[int, np.ndarray]]:
        """Return the good images, then what ``change`` makes of the k-th."""
        after = [(self.images[k][0], change(k)) for k in range(GOOD, GOOD + FAULTY)]
        return self.images[:GOOD] + after


def _static(place: Place) -> list:
    here = place.light(place.pose(GOOD))
    return place.with_fault(lambda k: place.exposed(here))


def _rotation(place: Place) -> list:
    def turned(k: int) -> np.ndarray:
        pose = place.pose(k)
        pose[:3] = place.pose(GOOD)[:3]
        return place.exposed(place.light(pose))

    return place.with_fault(turned)


def _covered(place: Place) -> list:
    return place.with_fault(lambda k: place.exposed(np.full((240, 320), 0.01)))


def _blank(place: Place) -> list:
    return place.with_fault(lambda k: place.exposed(np.full((240, 320), 0.5)))


def _crowd(place: Place) -> list:
    """Make the right half of the view another room that moves in its own way: a bus, a crowd."""
    other, path = make_scene('handheld', place.seed + 50, place.camera, LAST / 20.0)

    def half(k: int) -> np.ndarray:
        light = place.light(place.pose(k))
        pose = torch.from_numpy(path(np.array([k / 12.0]))[0])
        light[:, 160:] = other.image(pose.expand(4, 7), place.camera)[:, 160:]
        return place.exposed(light)

    return place.with_fault(half)


def _flicker(place: Place) -> list:
    y = np.linspace(0, 2 * np.pi, 240)[:, None]

    def flickering(k: int) -> np.ndarray:
        return place.exposed(
            place.light(place.pose(k)) * (1 + 0.45 * np.sin(y + 2.4 * k)) * (0.6, 1.2)[k % 2]
        )

    return place.with_fault(flickering)


def _dropped(place: Place) -> list:
    kept = np.random.default_rng(0).random(len(place.images)) > 0.3
    return [item for item, keep in zip(place.images, kept, strict=True) if keep]


def _as_it_is(place: Place) -> list:
    return list(place.images)


FAULTS = {
    'none': _as_it_is, 'static': _static, 'rotation': _rotation, 'covered': _covered,
    'blank': _blank, 'crowd': _crowd, 'flicker': _flicker, 'dropped': _dropped,
    'focal': _as_it_is, 'rate': _as_it_is,
}


def live(learner: Learner, images: list[tuple[int, np.ndarray]], steps: int) -> Learner:
    """
    Run as on a robot.

    Images come, the weights in use change on the way, and the learner learns in between.
    """
    matcher, info = weights.loads(learner.weights())
    tracker, bundle = Tracker(matcher, info.version, learner.camera), Bundle(learner.camera)
    last = learner.step_count + steps
    for k, (stamp, image) in enumerate(images):
        correspondences = tracker.track(stamp, image)
        learner.add_image(stamp, image)
        learner.add_correspondences(correspondences)
        window = bundle.add(correspondences).window
        if window is not None:
            learner.add_window(window)
        due = last - steps + steps * (k + 1) // len(images)
        while learner.step_count < due and learner.step() is not None:
            verdict = learner.verdict()
            if verdict is not None and verdict.promoted:
                tracker.swap(weights.loads(learner.weights())[0], verdict.version)
    for _ in range(2 * steps):
        if learner.step_count >= last or learner.step() is None:
            break
        learner.verdict()
    learner.verdict(now=True)
    return learner
