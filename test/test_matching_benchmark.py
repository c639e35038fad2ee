"""
benchmarks/matching.py.

Every method is given the same pairs, and the truth is the truth for all.
"""

import json
from pathlib import Path
import subprocess
import sys

import pytest

BENCHMARK = Path(__file__).resolve().parent.parent / 'benchmarks' / 'matching.py'
FIELDS = 'data step method mma_1px mma_2px mma_5px auc_5 auc_10 auc_20 matches ms pairs'.split()


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp('matching') / 'rows.json'
    command = [
        sys.executable, str(BENCHMARK), '--quick', '--data', 'room', '--threads', '1', '--json',
        str(file),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    return json.loads(file.read_text())


def test_each_step_has_a_row_for_each_method(rows):
    assert all(list(row) == FIELDS for row in rows)
    methods = {row['method'] for row in rows}
    assert {'imatching', 'sift', 'orb', 'klt'} <= methods
    for step in (1, 5, 10, 20):
        assert {row['method'] for row in rows if row['step'] == step} == methods


def test_sub_pixel_methods_are_seen_to_be_sub_pixel(rows):
    """
    On a clean rendered room with neighbouring images.

    A truth half a pixel off would fail this for KLT and SIFT.
    """
    near = {row['method']: row for row in rows if row['step'] == 1}
    for method in ('klt', 'sift', 'imatching'):
        assert near[method]['mma_1px'] > 90
        assert near[method]['matches'] > 200
    assert near['orb']['mma_1px'] < near['klt']['mma_1px']
