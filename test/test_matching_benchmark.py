"""
benchmarks/matching.py.

Every method is given the same pairs, and the truth is the truth for all.
"""

import json
from pathlib import Path
import subprocess
import sys

import cv2
import pytest

BENCHMARK = Path(__file__).resolve().parent.parent / 'benchmarks' / 'matching.py'
FIELDS = (
    'data step method mma_1px mma_2px mma_5px auc_5 auc_10 auc_20 matches right '
    'ms ms_p95 ms_describe ms_match pairs peak_mb'
).split()


def benchmark(*arguments) -> str:
    command = [sys.executable, str(BENCHMARK), '--threads', '1', *map(str, arguments)]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=240
    ).stdout


@pytest.fixture(scope='module')
def ran(tmp_path_factory):
    """Return the rows of one quick run, and what it printed."""
    file = tmp_path_factory.mktemp('matching') / 'rows.json'
    said = benchmark('--quick', '--data', 'room', '--json', file)
    return json.loads(file.read_text()), said


@pytest.fixture(scope='module')
def rows(ran):
    return ran[0]


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


def test_the_summary_names_each_peer_and_each_figure_that_ours_is_behind_in(ran):
    rows, said = ran
    lines = said.splitlines()
    for step in (1, 5, 10, 20):
        start = lines.index(next(line for line in lines if line.startswith(f'room, step {step}:')))
        ahead = lines[start].split('ahead of: ')[1].split(', ')
        here = {row['method']: row for row in rows if row['step'] == step}
        for peer in here.keys() - {'imatching'}:
            ours, theirs = here['imatching'], here[peer]
            higher_is_better = ('mma_1px', 'mma_2px', 'auc_5', 'auc_10', 'auc_20')
            behind = [
                figure
                for figure in higher_is_better
                if ours[figure] is not None and ours[figure] < theirs[figure]
            ] + ['ms'] * (ours['ms'] > theirs['ms'])
            assert (peer in ahead) == (not behind)
            if behind:
                line = next(x for x in lines[start:] if x.startswith(f'    behind {peer}:'))
                assert line.split(': ')[1].split()[::2] == behind


def test_hard_pairs_are_drawn(tmp_path):
    said = benchmark('--pictures', tmp_path, '--pair', 'repetition')
    (file,) = tmp_path.iterdir()
    assert file.name == 'repetition.png'
    picture = cv2.imread(str(file))
    methods = [line for line in said.splitlines() if line.startswith('repetition, ')]
    assert picture.shape == (len(methods) * (480 + 26), 2 * 640, 3)
    kept, right = (int(methods[0].split(', ')[k].split()[i]) for k, i in ((1, 1), (2, 0)))
    assert 'imatching' in methods[0] and kept > 300 and right > 0.8 * kept
    # the marks have the colour that the title's counts speak of
    assert (picture == (90, 200, 50)).all(-1).sum() > 20 * right / 2
