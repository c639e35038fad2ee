"""What lasts: checkpoints under crashes, damage and foreign files."""

import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import time

from imatching_ros.geometry.camera import Camera
from imatching_ros.learning import checkpoints
from imatching_ros.learning.learner import Learner
from imatching_ros.matching import weights
import pytest
import safetensors.torch
import torch

CAMERA = Camera(320, 240, 256.0, 256.0, 159.5, 119.5)

WRITER = """
import sys
from imatching_ros.geometry.camera import Camera
from imatching_ros.learning import checkpoints
from imatching_ros.learning.learner import Learner
from imatching_ros.matching import weights
learner = Learner(*weights.load(weights.default_path()), Camera(320, 240, 256.0, 256.0, 159.5,
  119.5))
notes, refused = checkpoints.resume(sys.argv[1], learner)
print(learner.step_count, *refused, flush=True)
while True:
    learner.step_count += 1
    for parameter in learner.candidate.matcher.parameters():
        parameter.data.fill_(learner.step_count)
    if learner.step_count % 5 == 0:
        learner.use(learner.candidate.matcher, parent=learner.version)
    checkpoints.save(sys.argv[1], learner, told=learner.step_count)
    print(learner.step_count, flush=True)
"""


def learner_at(shipped, step):
    learner = Learner(*shipped, CAMERA)
    learner.step_count = step
    for parameter in learner.candidate.matcher.parameters():
        parameter.data.fill_(step)
    return learner


@pytest.fixture
def fresh(shipped):
    return Learner(*shipped, CAMERA)


def test_what_is_saved_is_what_comes_back(shipped, fresh, tmp_path):
    learner = learner_at(shipped, 7)
    optimiser = learner.candidate.optimiser
    for parameter in learner.candidate.matcher.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    optimiser.step()
    learner.use(learner.candidate.matcher, parent=0)
    learner.promotions = 1
    path = checkpoints.save(tmp_path, learner, place='kitchen')
    assert checkpoints.resume(tmp_path, fresh) == ({'place': 'kitchen'}, [])
    assert (fresh.step_count, fresh.promotions, fresh.version) == (7, 1, 1)
    assert fresh.weights() == learner.weights()
    for one, two in zip(fresh.state()[0].items(), learner.state()[0].items(), strict=True):
        assert one[0] == two[0] and torch.equal(one[1], two[1])
    # ... and goes on alike
    for each in (learner, fresh):
        for parameter in each.candidate.matcher.parameters():
            parameter.grad = torch.full_like(parameter, 0.1)
        each.candidate.optimiser.step()
    assert torch.equal(fresh.candidate.matcher.log_cov, learner.candidate.matcher.log_cov)
    manifest = json.loads(path.read_text())
    assert (
        manifest['version'] == 1
        and manifest['parent'] == 0
        and manifest['family'] == 'expectation'
    )
    assert manifest['sha256'] == learner.history()[-1][1].sha256
    assert {'verdict', 'data', 'step_count'} <= manifest['learner'].keys()
    assert weights.load(tmp_path / 'version_0001.safetensors')[1].version == 1
    assert fresh.rollback() == 2  # the past came along
    assert weights.loads(fresh.weights())[0].log_cov.tolist() == shipped[0].log_cov.tolist()


def test_only_the_newest_are_kept(shipped, tmp_path):
    learner = learner_at(shipped, 0)
    for step in range(6):
        learner.step_count = step
        checkpoints.save(tmp_path, learner, keep=2)
    (tmp_path / '.state_00000000.safetensors.99999').write_bytes(b'left by a crash')
    (tmp_path / 'notes.txt').write_text('mine')
    checkpoints.save(tmp_path, learner, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        'checkpoint_00000005.json', 'checkpoint_00000006.json', 'notes.txt',
        'state_00000005.safetensors', 'state_00000006.safetensors', 'version_0000.safetensors',
    ]


@pytest.fixture(scope='module')
def two(shipped, tmp_path_factory):
    """Return a folder with checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp('two')
    for step in (1, 2):
        checkpoints.save(folder, learner_at(shipped, step), said=step)
    return folder


def cut(folder):
    path = folder / 'state_00000001.safetensors'
    path.write_bytes(path.read_bytes()[:100_000])


def flip(folder):
    path = folder / 'state_00000001.safetensors'
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def rewrite(folder, **changes):
    path = folder / 'checkpoint_00000001.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def other_network(folder):
    """Return weights that are whole, but of a network of other shapes."""
    path = folder / 'state_00000001.safetensors'
    path.write_bytes(safetensors.torch.save({'candidate.weight': torch.zeros(3)}))
    rewrite(folder, state={'file': path.name, 'sha256': checkpoints._digest(path)})


@pytest.mark.parametrize(
    'spoil, reason',
    [
        (cut, 'state_00000001.safetensors does not have the sha256'),
        (flip, 'state_00000001.safetensors does not have the sha256'),
        (
            lambda f: (f / 'state_00000001.safetensors').unlink(),
            'state_00000001.safetensors is missing',
        ),
        (
            lambda f: (f / 'checkpoint_00000001.json').write_text('{"format": 1, "ver'),
            'checkpoint_00000001.json',
        ),
        (
            lambda f: (f / 'checkpoint_00000001.json').write_text('[]'),
            "not a checkpoint's manifest",
        ),
        (lambda f: rewrite(f, format=9), 'its format is 9'),
        (lambda f: rewrite(f, family='superglue'), "family 'superglue'"),
        (lambda f: rewrite(f, sha256='0'), 'not those that it names'),
        (lambda f: rewrite(f, learner={}), 'does not fit'),
        (other_network, 'does not fit the expectation network'),
    ],
)
def test_a_damaged_or_foreign_checkpoint_is_refused_and_the_one_before_is_used(
    two, fresh, tmp_path, spoil, reason
):
    folder = tmp_path / 'copy'
    shutil.copytree(two, folder)
    spoil(folder)
    notes, refused = checkpoints.resume(folder, fresh)
    assert notes == {'said': 1} and fresh.step_count == 1
    assert fresh.candidate.matcher.log_cov.tolist() == [1.0, 1.0]
    assert len(refused) == 1 and reason in refused[0] and '\n' not in refused[0]


def test_where_nothing_is_whole_nothing_changes(two, fresh, tmp_path):
    assert checkpoints.resume(tmp_path / 'nowhere', fresh) == (None, [])
    folder = tmp_path / 'copy'
    shutil.copytree(two, folder)
    (folder / 'version_0000.safetensors').write_bytes(b'no weights')
    before = fresh.state()[0]
    notes, refused = checkpoints.resume(folder, fresh)
    assert (
        notes is None and len(refused) == 2 and all('version_0000' in reason for reason in refused)
    )
    assert all(
        torch.equal(one, two)
        for one, two in zip(before.values(), fresh.state()[0].values(), strict=True)
    )


class Crash(BaseException):
    """What ends the process here."""


def crash_after(patched, operations):
    """Let the process end after so many calls of all that touches the disk."""
    left = [operations]

    def counted(function):
        def call(*args, **kwargs):
            if left[0] == 0:
                raise Crash
            left[0] -= 1
            return function(*args, **kwargs)

        return call

    for owner, name in ((os, 'replace'), (os, 'fsync'), (os, 'open'), (Path, 'unlink')):
        patched.setattr(owner, name, counted(getattr(owner, name)))
    return left


def test_a_crash_at_any_operation_leaves_the_old_or_the_new_one(
    shipped, fresh, two, tmp_path, monkeypatch
):
    for operations in range(40):
        folder = tmp_path / str(operations)
        shutil.copytree(two, folder)
        learner = learner_at(shipped, 3)
        learner.use(learner.candidate.matcher, parent=0)
        with monkeypatch.context() as patched:
            left = crash_after(patched, operations)
            try:
                checkpoints.save(folder, learner, keep=1, said=3)
            except Crash:
                pass
            done = left[0] > 0
        notes, refused = checkpoints.resume(folder, fresh)
        assert notes in ({'said': 2}, {'said': 3}) and refused == []
        assert fresh.candidate.matcher.log_cov.tolist() == [float(notes['said'])] * 2
        if done:
            break
    assert operations >= 8 and notes == {'said': 3}


def test_a_process_killed_at_any_moment_loses_at_most_one_update(shipped, tmp_path):
    environment = os.environ | {'OMP_NUM_THREADS': '1'}
    told = 0
    for delay in (0.013, 0.081, 0.049):
        process = subprocess.Popen(
            [sys.executable, '-c', WRITER, tmp_path],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        begun = process.stdout.readline().split()
        # the one in hand may have been whole; none is refused
        assert begun == [str(told)] or begun == [str(told + 1)]
        told = int(begun[0])
        while (line := process.stdout.readline()) and int(line) < told + 3:
            pass
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
        process.wait()
        told = int((rest or [line])[-1])
    learner = Learner(*shipped, CAMERA)
    notes, refused = checkpoints.resume(tmp_path, learner)
    assert refused == [] and told <= notes['told'] <= told + 1 and told >= 9
    assert set(learner.candidate.matcher.log_cov.tolist()) == {float(notes['told'])}
    assert learner.version == notes['told'] // 5
