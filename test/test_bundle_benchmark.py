"""The benchmark of the bundle runs without its peers and writes what it promises."""

import json
from pathlib import Path
import subprocess
import sys

from imatching_ros.bundle.solver.adjust import compiled
import pytest

KEYS = {
    'keyframes', 'points', 'observations', 'solver', 'backend', 'dtype', 'threads',
    'ms_per_iteration', 'ms_to_1e-4', 'ms_to_1e-6', 'iterations_to_1e-6', 'final_cost', 'peak_mb',
}


@pytest.mark.skipif(not compiled(), reason='numba is not installed')
def test_rows_of_both_back_ends_agree(tmp_path):
    script = Path(__file__).resolve().parents[1] / 'benchmarks' / 'bundle.py'
    out = tmp_path / 'bundle.json'
    command = [
        sys.executable, str(script), '--quick', '--json', str(out), '--solver', 'eager',
        '--solver', 'cpu',
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    eager, cpu = json.loads(out.read_text())
    assert set(eager) == set(cpu) == KEYS
    assert (eager['backend'], cpu['backend']) == ('eager', 'cpu')
    assert eager['observations'] == cpu['observations'] > 2900
    assert cpu['final_cost'] == pytest.approx(eager['final_cost'], rel=1e-8)
    assert abs(cpu['iterations_to_1e-6'] - eager['iterations_to_1e-6']) <= 1
    assert 0 < cpu['ms_to_1e-4'] <= cpu['ms_to_1e-6'] and cpu['peak_mb'] > 0
