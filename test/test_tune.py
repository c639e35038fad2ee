"""Tuning on a recording, offline."""

from imatching_ros.learning.options import LearnerOptions
from imatching_ros.learning.tune import tune
from imatching_ros.matching.tracker import TrackerOptions
from lessons import same
import pytest
import torch

# Images that give a few lessons and one window to judge by, and points that are enough for them
SHORT, FEW = 50, TrackerOptions(queries=200)


def test_a_tune_that_was_interrupted_goes_on_to_the_same_bits(
    shipped, night, tmp_path, monkeypatch
):
    monkeypatch.setattr('imatching_ros.learning.tune.VALIDATION', 0.0)
    monkeypatch.setattr('imatching_ros.learning.tune.ENOUGH', 1)
    camera, images = night
    options = LearnerOptions(verdict_every=6, steps_per_solve=2, seed=3)

    told = []

    def run(folder, on_step=lambda *_: None):
        return tune(
            *shipped, [(camera, images[:SHORT])], 8, epochs=2, options=options,
            tracker_options=FEW, folder=folder, on_step=on_step,
            on_frame=lambda done, total: told.append((done, total)),
        )

    whole, all_of_it = run(tmp_path / 'whole')
    assert told[-1] == (2 * SHORT, 2 * SHORT) and len(told) == 2 * SHORT

    def interrupt(at):
        def on_step(learner, step, verdict):
            if learner.step_count == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / 'parts', on_step)

    interrupt(7)  # in the second epoch, after a checkpoint at 6
    resumed, parts = run(tmp_path / 'parts')
    assert parts.resumed == 6 and all_of_it.resumed == 0 and parts.refused == []
    assert resumed.weights() == whole.weights() and resumed.step_count == whole.step_count == 8
    for one, two in zip(resumed.state()[0].values(), whole.state()[0].values(), strict=True):
        assert torch.equal(one, two)
    assert [(s.step, s.loss) for s in parts.steps] == [(s.step, s.loss) for s in all_of_it.steps]
    assert [v.figures for v in parts.verdicts] == [v.figures for v in all_of_it.verdicts]
    # What another call has left is not mixed with this one.
    with pytest.raises(ValueError, match='parts was left by a run with other images or options'):
        tune(*shipped, [(camera, images[:SHORT])], 9, options=options, folder=tmp_path / 'parts')


def test_the_last_images_judge_and_the_gate_may_end_it(shipped, night, seen, monkeypatch):
    monkeypatch.setattr('imatching_ros.learning.tune.PATIENCE', 2)
    monkeypatch.setattr('imatching_ros.learning.tune.VALIDATION', 0.4)
    monkeypatch.setattr('imatching_ros.learning.tune.ENOUGH', 1)
    camera, images = night
    options = LearnerOptions(rate=1e-8, verdict_every=1)  # it learns nothing
    told = []
    learner, history = tune(
        *shipped, [(camera, images)], 50, epochs=1, options=options,
        on_frame=lambda done, total: told.append((done, total)),
    )
    assert told[0] == (1, 75) and told[-1] == (75, 75)  # 80 less the gap
    assert (
        learner.step_count == 2
        and len(history.verdicts) == 2
        and '2 verdicts in a row' in history.stopped
    )
    stamps = [stamp for stamp, _ in images]
    assert (
        max(map(stamps.index, seen['trained'])) < 48 - 5
        and min(map(stamps.index, seen['measured'])) >= 48
    )


def test_tuning_twice_gives_the_same_bits(shipped, night):
    camera, images = night
    options = LearnerOptions(verdict_every=3, seed=3)
    (one, first), (two, second) = (
        tune(
            *shipped, [(camera, images[:SHORT])], 3, epochs=1, options=options,
            tracker_options=FEW,
        )
        for _ in range(2)
    )
    assert one.weights() == two.weights() and one.step_count == 3 and len(first.verdicts) == 1
    assert same(one.candidate.matcher.state_dict(), two.candidate.matcher.state_dict())
    assert [(s.step, s.loss, s.rows) for s in first.steps] == [
        (s.step, s.loss, s.rows) for s in second.steps
    ]
    assert [v.figures for v in first.verdicts] == [v.figures for v in second.verdicts]


def test_a_recording_that_teaches_nothing_is_named(shipped, night):
    camera, images = night
    still = [(stamp, images[0][1]) for stamp, _ in images[:12]]
    for frames, count in ((images[:12], r'\d'), (still, '0'), ([], '0')):
        with pytest.raises(
            ValueError, match=rf'^the recordings gave {count} solved windows, too few .*$'
        ):
            tune(*shipped, [(camera, frames)], 5)
