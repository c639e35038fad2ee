"""What the tests of several rooms share: recordings rendered once, and the shipped matcher."""

import copy
from dataclasses import replace
import os

from imatching_ros import kernels
from imatching_ros.data.recording import open_recording
from imatching_ros.data.synthetic import render_recording, Sensor
from imatching_ros.learning import objectives, verdict
from imatching_ros.matching import weights
from lessons import recorded, TRAINED
import pytest
import torch

SIZE = (320, 240)
#: The inner loop, `pytest -m quick`: no process is started, no network trained
QUICK = (
    'adjoint', 'camera', 'compiled_views', 'evaluation', 'files', 'geometry', 'images',
    'messages', 'prior', 'recording', 'report', 'stamps', 'video',
)
# small tensors: on a busy machine, threads that wait for one another cost most of the time
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Mark the tests of the inner loop."""
    for item in items:
        if item.path.stem.removeprefix('test_') in QUICK:
            item.add_marker('quick')


@pytest.fixture(scope='session', autouse=True)
def compiled():
    """Have the kernels compiled first: what a test reads of a command is not about that."""
    kernels.prepare()


@pytest.fixture(scope='session', autouse=True)
def busy_disk():
    """Let no test wait for the disk: none of them ends with a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, 'fsync', lambda descriptor: None)
        yield


@pytest.fixture(scope='session')
def shipped():
    """Return the shipped matcher, which is to be copied before it is changed, and its info."""
    return weights.load(weights.default_path())


@pytest.fixture(scope='session')
def worn(shipped):
    """Return weights that have much to learn: the shipped ones, shaken."""
    matcher, generator = copy.deepcopy(shipped[0]), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in matcher.fine_head.parameters():
            parameter += 0.5 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return matcher, weights.dumps(matcher, 0, 0)[1]


@pytest.fixture(scope='session')
def daylight(tmp_path_factory):
    """Return the folder of a room seen for two seconds by a good camera."""
    return render_recording(
        tmp_path_factory.mktemp('rendered') / 'daylight', frames=40, size=SIZE, depth_every=5
    )


@pytest.fixture(scope='session')
def dusk(tmp_path_factory):
    """Return the folder of a room seen for four seconds by a bad camera: much is to be learned."""
    return render_recording(
        tmp_path_factory.mktemp('rendered') / 'dusk',
        seed=1,
        frames=80,
        size=SIZE,
        sensor=replace(Sensor.low_light(0.2), fixed_pattern=20.0),
        depth_every=5,
    )


@pytest.fixture(scope='session')
def day(daylight):
    """Return the camera and the images (stamp, (H, W) uint8) of the daylight recording."""
    recording = open_recording(daylight)
    return recording.camera, list(recording)


@pytest.fixture(scope='session')
def night(dusk):
    """Return the camera and the images (stamp, (H, W) uint8) of the recording in dim light."""
    recording = open_recording(dusk)
    return recording.camera, list(recording)


@pytest.fixture(scope='session')
def events(shipped, night):
    """Return what the nodes would say of the first part of the recording in dim light."""
    return recorded(shipped[0], night[0], night[1][:TRAINED])


@pytest.fixture
def seen(monkeypatch):
    """Return the stamps that steps train on and that the gate measures on, as they happen."""
    used = {'trained': set(), 'measured': set()}
    match, gather = objectives.match, verdict.gather

    def trained(matcher, lesson, pairs, *more):
        stamps = lesson.window.stamps.tolist()
        used['trained'] |= {
            stamps[index] for pair in pairs for index in (pair.reference, pair.target)
        }
        return match(matcher, lesson, pairs, *more)

    def measured(matcher, clip, options):
        used['measured'] |= set(clip.stamps)
        return gather(matcher, clip, options)

    monkeypatch.setattr(objectives, 'match', trained)
    monkeypatch.setattr(verdict, 'gather', measured)
    return used
