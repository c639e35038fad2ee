"""The benchmark of the gate makes candidates, asks about each, and draws what was said."""

import argparse
import json
from pathlib import Path
import sys

import cv2
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'benchmarks'))
import gate  # noqa: E402


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    """Return the rows of a short scene with a few candidates, and what to measure it with."""
    folder = tmp_path_factory.mktemp('bank')
    options = argparse.Namespace(scenes=['indoor'], seeds=[0], lights=[], frames=110, steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, 'RUNS', {'learn': ({}, (2,)), 'rate10': ({'rate': 0.05}, (2,))})
        patch.setattr(gate, 'MIXES', (0.5,))
        patch.setattr(gate, 'NOISES', (0.3,))
        patch.setattr('imatching_ros.learning.tune.ENOUGH', 1)
        rows = gate.Rows(folder / 'rows.json', ('scene', 'seed', 'candidate'), gate.console)
        gate.measure(options, rows, folder)
        again = gate.Rows(folder / 'rows.json', ('scene', 'seed', 'candidate'), gate.console)
        gate.measure(options, again, folder)
    return rows, again


def test_each_candidate_has_a_row_and_what_it_is_worth(measured):
    rows, again = measured
    assert [row['candidate'] for row in rows] == ['learn2', 'rate102', 'mix0.5', 'noise0.3']
    assert json.loads(rows.path.read_text()) == list(rows) == list(again)
    for row in rows:
        assert row['evidence'] > 4 and row['seconds'] > 0 and row['reason']
    spoilt = {row['candidate']: row for row in rows}['noise0.3']
    assert spoilt['true_gain'] < -5 and spoilt['gain'] < -2 and not spoilt['promoted']


def test_what_was_said_is_summed_up_and_drawn(measured, tmp_path, capsys):
    rows, _ = measured
    gate.summary(rows)
    gate.agreement(rows, [{**row, 'promoted': False} for row in rows])
    gate.plot(rows, tmp_path / 'gate.png')
    said = capsys.readouterr().out
    assert '4 candidates, 4 of known worth' in said
    same = sum(not row['promoted'] for row in rows)
    assert f'the same word on {same} of 4 candidates' in said
    assert cv2.imread(str(tmp_path / 'gate.png')).std() > 5
