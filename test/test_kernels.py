"""What is compiled, when, where it is kept, and what is said of it: always in fresh processes."""

import json
import os
from pathlib import Path
import shutil
import subprocess
import sys

from imatching_ros import kernels
import pytest

pytest.importorskip('numba')
SOURCE = Path(kernels.__file__).parent
IMAGES, TRACKS = (f'imatching_ros.bundle.compiled.{name}' for name in ('images', 'tracks'))
# Half of the points lie two metres ahead, half of them half a metre; all are seen where they are.
AGREEING = """
import json, sys
import numpy as np
from numba.core import event
from imatching_ros import jit
from imatching_ros.bundle.compiled import images
compiled = event.RecordingListener()
with event.install_listener('numba:compile', compiled):
    jit.load(images._agreeing)
points = np.array([[0.0, 0.0, 2.0], [0.0, 0.0, 0.5]])
T = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
good = images.agreeing(T, points, np.zeros((2, 2)), 500.0, 500.0, 3.0)
print(json.dumps([len(compiled.buffer), good.tolist(), jit.is_kept(images._agreeing)]))
"""
# Of all kernels two that are compiled in a moment
TWO = f"""
from imatching_ros import jit, kernels
kernels.MODULES = {IMAGES!r}, {TRACKS!r}
jit.entries = lambda module: [vars(module).get('_agreeing') or module._survivors]
"""
PREPARE = TWO + """
import json
from numba.core import event
compiled, said = event.RecordingListener(), []
with event.install_listener('numba:compile', compiled):
    kernels.prepare(lambda *progress: said.append((*progress, kernels.state())))
print(json.dumps([len(compiled.buffer), said, kernels.state()]))
"""


@pytest.fixture
def package(tmp_path):
    """Return a folder with a copy of the package that nothing was compiled of."""
    shutil.copytree(
        SOURCE, tmp_path / 'package' / SOURCE.name, ignore=shutil.ignore_patterns('__pycache__')
    )
    return tmp_path / 'package'


@pytest.fixture(scope='module')
def compiled_once(tmp_path_factory):
    """Return a folder with a copy of the package in which an entry is compiled and kept."""
    folder = tmp_path_factory.mktemp('compiled')
    shutil.copytree(
        SOURCE, folder / SOURCE.name, ignore=shutil.ignore_patterns('__pycache__')
    )
    compiled, good, kept = run(AGREEING, folder)
    assert compiled > 0 and good == [True, True] and kept
    return folder


@pytest.fixture
def built(compiled_once, tmp_path):
    """Return a copy of that folder, which may be changed."""
    shutil.copytree(compiled_once, tmp_path / 'built')
    return tmp_path / 'built'


def start(code, package, **environment):
    given = {'PYTHONPATH': str(package), 'PYTHONDONTWRITEBYTECODE': '1', **environment}
    return subprocess.Popen(
        [sys.executable, '-c', code], cwd=package, env=os.environ | given, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )


def run(code, package, **environment):
    process = start(code, package, **environment)
    out, error = process.communicate()
    assert process.returncode == 0, error
    return json.loads(out)


def nowhere(package):
    """Return an environment in which no folder can be written, not even by root."""
    (package / SOURCE.name / '__pycache__').touch()
    file = package / 'file'
    file.touch()
    return {'NUMBA_CACHE_DIR': str(file / 'numba'), 'XDG_CACHE_HOME': str(file)}


def test_the_first_process_compiles_and_says_how_far_it_is_the_second_one_does_not(
    package, tmp_path
):
    folder = {'NUMBA_CACHE_DIR': str(tmp_path / 'kept')}
    compiled, said, state = run(PREPARE, package, **folder)
    assert compiled > 0 and state == ''
    compiling = 'compiling for this processor, once: '
    assert said[0] == [0, 2, 'agreeing', compiling + '1 of 2']
    assert said[1] == [1, 2, 'survivors', compiling + '2 of 2']
    assert said[2][:3] == [2, 2, ''] and len(said) == 3
    assert run(PREPARE, package, **folder) == [0, [], '']
    # For another processor, and back
    compiled, *_ = run(AGREEING, package, NUMBA_CPU_NAME='generic', **folder)
    assert compiled > 0
    assert run(AGREEING, package, **folder)[0] == 0


def test_two_processes_that_begin_at_once_compile_once(package, tmp_path):
    both = [start(PREPARE, package, NUMBA_CACHE_DIR=str(tmp_path / 'kept')) for _ in range(2)]
    counts = sorted(json.loads(process.communicate()[0])[0] for process in both)
    assert counts[0] == 0 < counts[1]


@pytest.mark.parametrize('file, old, new, expected', [
    ('bundle/solver/problem.py', 'MIN_DEPTH = 1e-6', 'MIN_DEPTH = 1.0', [True, False]),
    ('bundle/solver/compiled/poses.py', '1 - 2 * (x * x + y * y)', '-1 - 2 * (x * x + y * y)',
     [False, False]),
])
def test_what_other_files_say_is_noticed(built, file, old, new, expected):
    path = built / SOURCE.name / file
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text('# A word more changes nothing.\n' + text)
    assert run(AGREEING, built) == [0, [True, True], True]
    path.write_text(text.replace(old, new))
    compiled, good, _ = run(AGREEING, built)
    assert compiled > 0 and good == expected


def test_a_file_that_is_not_whole_is_compiled_anew(built):
    (kept,) = (built / SOURCE.name / '__pycache__').glob('*.kernel')
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2])
    compiled, good, _ = run(AGREEING, built)
    assert compiled > 0 and good == [True, True]
    assert run(AGREEING, built)[0] == 0


def test_where_no_folder_can_be_written_it_compiles_and_says_what_to_set(package):
    environment = nowhere(package)
    compiled, good, kept = run(AGREEING, package, **environment)
    assert compiled > 0 and good == [True, True] and not kept
    compiled, said, state = run(PREPARE, package, **environment)
    assert compiled > 0 and len(said) == 3
    assert 'set NUMBA_CACHE_DIR' in state and environment['NUMBA_CACHE_DIR'] in state


def test_without_numba_plain_torch_does_the_work_and_says_so(package):
    code = """
import json, sys
sys.modules['numba'] = None
import torch
from imatching_ros import kernels
from imatching_ros.bundle.registration import refine
from imatching_ros.bundle.solver.robust import Kernel
kernels.prepare()
T = torch.tensor([0.0, 0, 0, 0, 0, 0, 1]).double()
points = torch.tensor([[0.0, 0, 2], [1, 0, 2], [0, 1, 3], [-1, 0, 4]]).double()
xy, cov = points[:, :2] / points[:, 2:], torch.tensor([1.0, 0, 1]).double().expand(4, 3)
found = refine(T + 0.01, points, xy, cov, torch.tensor([500.0, 500.0]).double(), Kernel())
print(json.dumps([bool(torch.allclose(found[:3], T[:3], atol=1e-6)), kernels.state()]))
"""
    right, state = run(code, package)
    assert right and 'numba cannot be imported' in state and 'plain torch' in state


def test_nothing_is_compiled_behind_ones_back(package):
    code = """
import json, sys
import imatching_ros.cli, imatching_ros.bundle.bundle, imatching_ros.learning.learner
from imatching_ros import kernels
print(json.dumps(['numba' in sys.modules, kernels.state()]))
"""
    assert run(code, package) == [False, 'the kernels are not loaded yet']


def test_every_function_is_compiled_for_one_kind_of_arguments():
    from imatching_ros import jit

    called = {}
    for name in kernels.MODULES:
        for kernel in jit.entries(kernels.load(name)):
            called |= {each: each.py_func for each in kernel._cache.parts[0]}
            assert len(kernel.overloads) == 1
    assert len(called) > 40
    for each, function in called.items():
        signatures = function.declared[0]
        assert len(each.overloads) in (0, len(signatures)), function.__name__  # 0: from disk


def test_the_visible_step(package, tmp_path):
    process = start(TWO + 'kernels.show()', package, NUMBA_CACHE_DIR=str(tmp_path / 'kept'))
    assert 'compiling for this processor, once: 2 of 2' in process.communicate()[1]
    done = subprocess.run(
        [sys.executable, '-m', 'imatching_ros.kernels'], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.strip() == 'the kernels are compiled for this processor'
