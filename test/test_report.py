"""report.json holds every figure or null; report.html stands alone and says what is missing."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
import json
import re

import cv2
from imatching_ros.evaluation.figures import complete
from imatching_ros.evaluation.matching import MatchingAccuracy, Pair, PairMatches
from imatching_ros.evaluation.pictures import (
    ERROR_CLASSES,
    error_counts,
    Event,
    learning_svg,
    matches_svg,
    Pictures,
)
from imatching_ros.evaluation.report import console_table, write_report
from imatching_ros.evaluation.trajectory import trajectory_accuracy
from imatching_ros.geometry import lie
import numpy as np
import pytest
from rich.console import Console
import torch

KEYS = {
    'input': {'frames', 'frames_matched', 'keyframes', 'dropped', 'true_poses'},
    'trajectory': {'ate_m', 'path_m', 'ate_percent'},
    'matching': {'before', 'after'},
    'learning': {'steps', 'windows', 'promotions', 'rollbacks', 'seconds', 'model_version'},
    'latency_ms': {'matcher_p50', 'matcher_p95', 'bundle_p50', 'bundle_p95', 'learner_step_p50'},
}
ACCURACY = {'mma_1px', 'mma_2px', 'mma_5px', 'auc_5', 'auc_10', 'auc_20'}


def _matches(shift: float, depth: bool = True) -> PairMatches:
    """
    Lucas-Kanade on an image and itself moved by 6 px.

    The truth is off by ``shift``, which makes the error.
    """
    noise = np.random.default_rng(0).uniform(0, 255, (120, 166)).astype(np.float32)
    image = cv2.normalize(
        cv2.GaussianBlur(noise, (0, 0), 2), None, 0, 255, cv2.NORM_MINMAX
    ).astype(np.uint8)
    reference, target = image[:, 6:].copy(), image[:, :-6].copy()
    queries = np.stack(
        np.meshgrid(np.arange(20.0, 140.0, 10.0), np.arange(20.0, 100.0, 10.0)), -1
    ).reshape(-1, 2)
    queries = queries.astype(np.float32)
    uv = torch.as_tensor(cv2.calcOpticalFlowPyrLK(reference, target, queries, None)[0])
    queries = torch.as_tensor(queries)
    visible = torch.full((len(queries),), depth)
    true_uv = torch.where(visible[:, None], queries + torch.tensor([6.0, shift]), torch.nan)
    error = (uv - true_uv).norm(dim=-1)
    pair = Pair(0, 500_000_000, lie.identity(), True)
    return PairMatches(pair, reference, target, queries, uv, true_uv, visible, error, 1.0, 2.0)


def _trajectory():
    positions = np.cumsum(np.random.default_rng(1).normal(size=(60, 3)) * (1, 1, 0.1), axis=0)
    truth = np.concatenate((positions, np.tile((0.0, 0.0, 0.0, 1.0), (60, 1))), 1)
    estimate = truth.copy()
    estimate[:, :3] += np.random.default_rng(2).normal(size=(60, 3)) * 0.05
    return trajectory_accuracy(np.arange(60), estimate, (np.arange(60), truth), tolerance_ns=0)


def _full():
    trajectory = _trajectory()
    figures = {
        'input': {'frames': 150, 'frames_matched': 150, 'keyframes': 31, 'dropped': 0},
        'trajectory': trajectory,
        'matching': {
            'before': MatchingAccuracy(41.2, 60.0, 80.0, 30.0, 40.0, 50.0, 60, 12000),
            'after': MatchingAccuracy(55.0, 66.0, 79.0, 33.0, 44.0, 50.0, 60, 12000),
        },
        'learning': {
            'steps': 200, 'windows': 20, 'promotions': 2, 'rollbacks': 1, 'seconds': 61.0,
            'model_version': 2,
        },
        'latency_ms': {
            'matcher_p50': 70.0, 'matcher_p95': np.float32(90.0), 'bundle_p50': float('nan'),
        },
        'throughput_hz': 9.5,
        'peak_memory_mb': None,
    }
    loss = [(step, 1.0 / step + 0.2) for step in range(1, 201)]
    events = [
        Event(50, 'promoted', 1, 'better by <9 %>', (36.2, 48.0, 0.7)), Event(90, 'refused'),
        Event(120, 'rollback', 0), Event(200, 'promoted', 2),
    ]
    return figures, Pictures(_matches(3.0), _matches(0.2), trajectory, loss, events)


class _Page(HTMLParser):
    """Collects references and checks that the tags nest."""

    VOID = {'meta', 'br', 'img', 'link', 'input', 'hr'}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.text = ''
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.references += [
            value
            for name, value in attrs
            if name.split(':')[-1] in ('src', 'href', 'data', 'srcset')
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def _read(folder):
    def refuse(token):
        raise AssertionError(f'{token} is not JSON')

    figures = json.loads((folder / 'report.json').read_text(), parse_constant=refuse)
    text = (folder / 'report.html').read_text()
    return figures, text, _Page(text)


def _assert_keys(figures):
    for section, keys in KEYS.items():
        assert keys <= figures[section].keys()
    assert (
        ACCURACY <= figures['matching']['before'].keys()
        and ACCURACY <= figures['matching']['after'].keys()
    )
    assert {'throughput_hz', 'peak_memory_mb'} <= figures.keys()


def test_a_full_report(tmp_path):
    figures, pictures = _full()
    run = tmp_path / 'run'
    path = write_report(
        run, figures, pictures, title='demo <1>', command='imatching demo',
        versions={'torch': '2.13'},
    )
    assert path == run / 'report.html'
    assert sorted(file.name for file in run.iterdir()) == ['report.html', 'report.json']
    written, text, page = _read(run)
    _assert_keys(written)
    assert (
        written['matching']['before']['mma_1px'] == 41.2
        and written['matching']['after']['pairs'] == 60
    )
    assert written['latency_ms']['matcher_p95'] == 90.0
    assert (
        written['latency_ms']['bundle_p50'] is None
        and written['latency_ms']['learner_step_p50'] is None
    )
    assert written['trajectory']['ate_m'] == pytest.approx(pictures.trajectory.ate_m)
    assert (written['command'], written['versions']) == ('imatching demo', {'torch': '2.13'})
    assert (
        'mma@1px 41.2\u00a0% → 55.0\u00a0%' in page.text
        and '+33.5 %' in page.text
        and '-1.2 %' in page.text
    )
    for words in (
        'demo <1>', 'imatching demo', '2.13', 'better by <9 %>', 'ground truth', 'running median',
        'v2',
    ):
        assert words in page.text
    assert text.count('data:image/jpeg;base64,') == 4
    assert 'not available' not in page.text


def test_the_page_needs_nothing_from_outside(tmp_path):
    figures, pictures = _full()
    write_report(tmp_path, figures, pictures)
    _, text, page = _read(tmp_path)
    assert page.references and all(
        value.startswith(('data:image/', '#')) for value in page.references
    )
    assert not page.tags & {'script', 'link', 'iframe', 'object'}
    assert 'http' not in text and '@import' not in text
    assert all(target.startswith('#') for target in re.findall(r"url\(['\"]?([^)]*)\)", text))
    ids = re.findall(r'<(?:clipPath|path)[^>]*? id="([^"]+)"', text)
    assert len(ids) == len(set(ids))  # two plots on one page must not cut each other's pictures
    assert page.open == []


def test_missing_pieces_are_said_to_be_missing(tmp_path):
    write_report(tmp_path, {'input': {'frames': 51, 'frames_matched': 51}})
    figures, text, page = _read(tmp_path)
    _assert_keys(figures)
    assert figures['trajectory'] == {'ate_m': None, 'path_m': None, 'ate_percent': None}
    assert figures['matching']['before'] == dict.fromkeys(ACCURACY)
    assert '51 of 51 frames matched' in page.text
    assert page.text.count('not available: no ground truth in the recording') == 2
    assert 'not available: no gradient step in this run' in page.text
    assert '<svg' not in text


def test_each_verdicts_evidence_is_drawn_where_there_is_some():
    """Also of a verdict whose figures do not say how sure it was."""
    _, pictures = _full()
    drawn = learning_svg(pictures.loss, pictures.events)
    assert 'corners that agree, %' in drawn and 'candidate, promoted' in drawn
    without = [replace(event, evidence=None) for event in pictures.events]
    plain = learning_svg(pictures.loss, without)
    assert 'corners that agree' not in plain and 'promoted' in plain
    names = 'reprojection_1px_before', 'reprojection_1px', 'gain_error'
    told = dict(zip(names, (36.2, 48.0, 0.7), strict=True))
    for figures, evidence in ((told, (36.2, 48.0, 0.7)), (told | {'gain_error': np.inf}, None)):
        event = Event.of_verdict(50, True, False, 1, 'better', figures)
        assert event.evidence == evidence and event.kind == 'promoted'


def test_no_ground_truth_is_said_only_where_that_is_so(tmp_path):
    write_report(tmp_path, {'input': {'frames': 51, 'frames_matched': 51, 'true_poses': 51}})
    _, _, page = _read(tmp_path)
    assert 'no ground truth' not in page.text
    assert 'not available: no two of the images that were measured' in page.text
    assert 'not available: fewer than three poses with ground truth' in page.text


def test_without_depth_the_pose_is_the_headline_and_matches_are_not_judged(tmp_path):
    before = MatchingAccuracy(None, None, None, 10.0, 20.0, 30.0, 12, 0)
    after = MatchingAccuracy(None, None, None, 10.0, 25.0, 30.0, 12, 0)
    matches = _matches(0.0, depth=False)
    write_report(
        tmp_path, {'matching': {'before': before, 'after': after}}, Pictures(matches, matches)
    )
    _, text, page = _read(tmp_path)
    assert 'pose auc@10° 20.0\u00a0% → 25.0\u00a0%' in page.text
    assert 'not available: no depth in the recording' in page.text
    assert not any(f'stroke="{colour}"' in text for _, colour, _ in ERROR_CLASSES)


def test_matches_are_coloured_by_their_error():
    good, bad = _matches(0.0), _matches(3.0)
    total = len(good.queries)
    assert error_counts(good)[0] > 0.9 * total and error_counts(bad)[2] > 0.9 * total
    assert sum(error_counts(good)) == total
    svg = matches_svg(bad)
    assert svg.count(f'stroke="{ERROR_CLASSES[2][1]}"') == error_counts(bad)[2]
    bad.error_px[0] = bad.uv[0] = torch.nan
    bad.error_px[0] = torch.inf
    assert error_counts(bad)[3] >= 1 and 'nan' not in matches_svg(bad)


def test_learning_without_events_or_loss_still_draws(tmp_path):
    write_report(tmp_path, {'learning': {'steps': 1}}, Pictures(loss=[(1, 0.5)]))
    assert 'running median' in (tmp_path / 'report.html').read_text()
    write_report(tmp_path, {}, Pictures(events=[Event(3, 'refused', None, 'no better')]))
    assert 'no better' in (tmp_path / 'report.html').read_text()
    write_report(tmp_path, {}, Pictures(loss=[(1, float('nan')), (2, float('nan'))]))


def test_figures_are_completed_without_losing_any():
    figures = complete(
        {'input': {'frames': 3, 'extra': (1, 2)}, 'seed': np.int64(7), 'bad': float('inf')}
    )
    assert figures['input'] == {
        'frames': 3, 'frames_matched': None, 'keyframes': None, 'dropped': None,
        'true_poses': None, 'extra': [1, 2],
    }
    assert figures['seed'] == 7 and type(figures['seed']) is int and figures['bad'] is None
    json.dumps(figures, allow_nan=False)


@pytest.mark.parametrize('full', [True, False])
def test_the_console_table_fits_in_80_columns(full):
    console = Console(width=80, record=True, force_terminal=False)
    console.print(console_table(_full()[0] if full else {}))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80 and '…' not in text
    if full:
        assert re.search(r'MMA at 1 px +41\.2 +55\.0 +\+33\.5 %', text)
        assert '150 of 150' in text and '9.5 Hz' in text
    else:
        assert 'not available: no ground truth in the recording' in text
