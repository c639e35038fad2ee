"""What the learner takes in, learns, promotes and forgets."""

import copy
from dataclasses import replace
import itertools

from imatching_ros.bundle.options import BundleOptions
from imatching_ros.data.recording import open_recording
from imatching_ros.evaluation.matching import evaluate_matching, evaluation_pairs
from imatching_ros.learning import learner as learner_module
from imatching_ros.learning import objectives
from imatching_ros.learning.learner import Learner
from imatching_ros.learning.memory import Memory
from imatching_ros.learning.options import LearnerOptions
from imatching_ros.matching import weights
from lessons import MEASURED, same, state, taught, teach
import numpy as np
import pytest
import torch


def test_windows_become_lessons_and_one_is_held_out(shipped, night, events):
    learner = taught(shipped, night, events)
    assert len(learner.inputs.lessons) >= 2 and len(learner.inputs.held_out) == 1
    assert learner.windows >= 3 and learner.ready
    assert learner.version == 0 and learner.weights() == Learner(*shipped, night[0]).weights()
    windows = [e[3] for e in events if e[3]]
    assert not learner.add_window(windows[-1])  # nothing new in it
    assert learner.verdict(now=True) is None  # nothing was learned yet


def test_a_window_without_its_images_is_not_remembered(shipped, night, events):
    windows = [e[3] for e in events if e[3]]
    learner = Learner(*shipped, night[0])
    assert (
        not learner.add_window(windows[0])
        and learner.step() is None
        and learner.verdict(now=True) is None
    )
    for _, _, correspondences, _ in events:
        learner.add_correspondences(correspondences)
    assert not learner.add_window(windows[0]) and learner.windows == 0
    for stamp, image, _, _ in events:
        learner.add_image(stamp, image)
    assert learner.add_window(windows[0]) and learner.windows == 1


def test_what_is_disabled_takes_nothing_in(shipped, night, events):
    learner = Learner(*shipped, night[0])
    learner.enabled = False
    assert teach(learner, events).windows == 0 and learner.step() is None


def test_buffers_are_bounded(shipped, night, events):
    learner = taught(shipped, night, events, images=9, new_keyframes=1)
    assert len(learner.inputs.images) == len(learner.inputs.messages) == 9
    assert list(learner.inputs.images) == [e[0] for e in events[-9:]]  # the newest
    # Windows whose oldest image is gone are not lessons, the rest are few.
    assert learner.windows < sum(e[3] is not None for e in events)
    learner = taught(shipped, night, events, lessons=2, judged=3, new_keyframes=1)
    assert learner.windows > 5
    assert len(learner.inputs.lessons) == 2 and 1 <= len(learner.inputs.held_out) <= 3


def test_the_callers_image_may_change_afterwards(shipped, night, events):
    one, two = Learner(*shipped, night[0]), Learner(*shipped, night[0])
    for stamp, image, correspondences, window in events:
        buffer = image.copy()
        for learner, given in ((one, buffer), (two, image)):
            learner.add_image(stamp, given)
            learner.add_correspondences(correspondences)
            if window is not None:
                learner.add_window(window)
        buffer[:] = 0
    assert one.step().loss == two.step().loss


def test_what_is_measured_never_trains(shipped, night, events, seen):
    # As online: windows that overlap come while the learner trains.
    learner = Learner(
        *shipped, night[0], LearnerOptions(held_out=4, new_keyframes=1, verdict_every=4)
    )
    verdicts = 0
    for event in events:
        teach(learner, [event])
        if event[3] is not None:
            for _ in range(3):
                learner.step()
                verdicts += learner.verdict() is not None
    assert verdicts >= 2 and len(seen['trained']) >= 3 and len(seen['measured']) > 3
    assert not seen['trained'] & seen['measured']
    # nor do the probes' images
    trained = [
        torch.tensor(image) for stamp, image, *_ in events if stamp in seen['trained']
    ]
    probes = [probe for held in learner.inputs.held_out for probe in held.probes]
    assert probes
    for probe, image in itertools.product(probes, trained):
        assert not torch.equal(probe.images[0, 0], image)


def test_a_gradient_that_is_not_finite_is_skipped(shipped, night, events):
    learner = taught(shipped, night, events)
    assert learner.step().step == 1
    skipped = learner.skipped
    parameter = learner.candidate.matcher.log_scale_fine
    before = copy.deepcopy(learner.candidate.matcher.state_dict())
    hook = parameter.register_hook(lambda gradient: gradient * torch.nan)
    assert learner.step() is None and learner.skipped == skipped + 1 and learner.step_count == 1
    assert same(learner.candidate.matcher.state_dict(), before)
    hook.remove()
    assert learner.step().step == 2
    after = learner.candidate.matcher.state_dict()
    assert not same(after, before) and all(value.isfinite().all() for value in after.values())


@pytest.fixture(scope='module')
def promoted(worn, night, events):
    """Return a learner whose first candidate was promoted, and the verdict."""
    learner = taught(worn, night, events, verdict_every=12)
    steps = [learner.step() for _ in range(12)]
    return learner, learner.verdict(), steps


def test_what_is_learned_is_promoted_and_explains_unseen_windows_better(worn, promoted):
    learner, verdict, steps = promoted
    assert verdict.promoted and not verdict.rolled_back and verdict.step == 12
    assert verdict.version == learner.version == 1 and learner.promotions == 1
    figures = verdict.figures
    assert figures['reprojection_1px'] > 1.07 * figures['reprojection_1px_before']
    assert figures['gain'] == pytest.approx(
        figures['reprojection_1px'] - figures['reprojection_1px_before'], abs=1e-3
    )
    assert verdict.reason.startswith('better: ') and '\n' not in verdict.reason
    matcher, info = weights.loads(learner.weights())
    assert (info.version, info.parent) == (1, 0) and not same(
        matcher.state_dict(), worn[0].state_dict()
    )
    assert [step.step for step in steps] == list(range(1, 13))
    assert all(np.isfinite(step.loss) and step.loss > 0 and step.rows > 100 for step in steps)


def test_what_is_learned_makes_matches_of_later_images_truer(worn, dusk, promoted):
    # Against depth and poses, which neither the learner nor its gate ever saw.
    recording = open_recording(dusk)
    pairs = evaluation_pairs(recording, MEASURED, len(recording) - 1, steps=(5, 10))
    before = evaluate_matching(worn[0], recording, pairs)
    after = evaluate_matching(weights.loads(promoted[0].weights())[0], recording, pairs)
    assert before.points > 1000
    assert after.mma_1px > 1.07 * before.mma_1px and after.mma_2px > 1.05 * before.mma_2px


def test_a_spoilt_candidate_is_refused_and_goes_back(shipped, night, events):
    # A learning rate a hundred times too large spoils any network.
    learner = taught(shipped, night, events, rate=0.03, verdict_every=1, patience=3)
    verdicts = []
    for _ in range(3):
        assert learner.step() is not None
        verdicts.append(learner.verdict())
        if len(verdicts) == 2:
            assert not same(learner.candidate.matcher.state_dict(), shipped[0].state_dict())
    assert [v.promoted for v in verdicts] == [False] * 3
    assert [v.rolled_back for v in verdicts] == [False, False, True]
    assert 'goes back' in verdicts[2].reason
    assert verdicts[-1].figures['known_1px'] < verdicts[-1].figures['known_1px_before'] - 10
    assert (learner.version, learner.rollbacks, learner.promotions) == (0, 1, 0)
    assert same(learner.candidate.matcher.state_dict(), shipped[0].state_dict())
    assert same(state(learner.weights()), shipped[0].state_dict())


def test_a_candidate_under_which_every_window_falls_apart_starts_again(shipped, night, events):
    learner = taught(
        shipped, night, events, rate=1.0, steps_per_solve=1, verdict_every=1000, lessons=1
    )
    learner.bundle = BundleOptions(min_landmarks=300)
    for _ in range(40):
        learner.step()
        if learner.rollbacks:
            break
    assert learner.rollbacks == 1 and learner.ready
    assert same(learner.candidate.matcher.state_dict(), shipped[0].state_dict())
    result = learner.step()
    assert result is not None and result.loss < 2


def test_rollback_and_reset_restore_bit_by_bit_and_the_version_grows(worn, promoted, events):
    learner = copy.deepcopy(promoted[0])
    learner.options = replace(learner.options, verdict_every=4, max_age=100)
    versions, kept = [0, learner.version], [data for data, _ in learner.history()]
    for _ in range(60):
        learner.step()
        verdict = learner.verdict()
        if verdict is not None and verdict.promoted:
            versions.append(learner.version)
            kept.append(learner.weights())
        if len(kept) == 3:
            break
    assert len(kept) == 3 and versions == sorted(set(versions))
    version = learner.rollback()
    assert version == versions[-1] + 1 == learner.version
    assert same(state(learner.weights()), state(kept[-2])) and not same(
        state(kept[-1]), state(kept[-2])
    )
    assert weights.loads(learner.weights())[1].version == version
    # Judged from now on against what is in use now: no better than itself.
    learner.step()
    verdict = learner.verdict(now=True)
    assert verdict.figures['reprojection_1px_before'] == pytest.approx(
        measured(learner, kept[-2]), abs=1e-4
    )
    version = learner.reset()
    assert version > versions[-1] + 1 and learner.version == version
    assert same(state(learner.weights()), worn[0].state_dict())
    assert not learner.ready and learner.step() is None
    assert teach(learner, events).ready and learner.step().rows > 0


def measured(learner, data):
    """Return the share of consistent corners, percent, of some weights on what is held out."""
    error = torch.cat([e.error for e in learner.gather(weights.loads(data)[0])])
    return float(100 * (error < 1).float().mean())


def test_rollback_without_a_past_is_the_beginning(shipped, night):
    learner = Learner(*shipped, night[0])
    assert learner.rollback() == 1 and learner.rollback() == 2
    assert same(state(learner.weights()), shipped[0].state_dict())
    assert learner.reset() == 3 and same(state(learner.weights()), shipped[0].state_dict())


def test_memory_is_of_all_times():
    memory = Memory(8)
    for item in range(100):
        memory.add(item)
        assert item in memory and len(memory) == min(item + 1, 8)
    kept = list(memory)
    assert kept[0] == 0 and kept[-4:] == [96, 97, 98, 99]
    assert max(b - a for a, b in zip(kept, kept[1:], strict=False)) < 60
    for most in (1, 2, 3):
        few = Memory(most)
        for item in range(10):
            few.add(item)
        assert len(few) == most and few[most - 1] == 9


@pytest.mark.parametrize('most', [5, 6, 8, 24])
def test_half_of_the_memory_is_spread_over_all_the_time_before(most):
    memory = Memory(most)
    for item in range(400):
        memory.add(item)
        if item >= 2 * most:
            kept = list(memory)
            new = most // 2
            assert kept[0] == 0 and kept[-new:] == list(range(item - new + 1, item + 1))
            gaps = np.diff(kept[:most - new + 1])
            assert gaps.max() < 1.7 * gaps.mean()


def test_what_takes_the_newest_ones_place_takes_its_time_too():
    one, two = Memory(6), Memory(6)
    for item in range(60):
        one.add(item)
        two.add('a first version of it')
        two.add(item, instead=True)
        assert list(two) == list(one)
    two.add('newer', instead=True)
    assert list(two) == [*list(one)[:-1], 'newer']


def test_windows_of_old_weights_are_dropped_and_counted(shipped, night, events):
    learner = Learner(*shipped, night[0], LearnerOptions(max_age=1))
    learner.use(shipped[0], parent=0)
    assert teach(learner, events).windows > 0 and learner.stale == 0  # one version old
    learner = Learner(*shipped, night[0], LearnerOptions(max_age=1))
    for version in range(2):
        learner.use(shipped[0], parent=version)
    windows = sum(e[3] is not None for e in events)
    assert teach(learner, events).windows == 0 and 3 <= learner.stale <= windows


def test_duty_is_the_share_of_time_that_steps_take(shipped, night, events, monkeypatch):
    learner = taught(shipped, night, events, duty=0.25)
    assert learner.rest() == 0
    now = [100.0]
    monkeypatch.setattr(learner_module.time, 'monotonic', lambda: now[0])
    real = objectives.match

    def slow(*arguments):
        now[0] += 2.0
        return real(*arguments)

    monkeypatch.setattr(objectives, 'match', slow)
    assert learner.step().seconds == pytest.approx(2.0)
    assert learner.rest() == pytest.approx(6.0)  # two of eight seconds are a quarter
    now[0] += 5.0
    assert learner.rest() == pytest.approx(1.0)
    now[0] += 5.0
    assert learner.rest() == 0
    for wrong in ({'duty': 0.0}, {'duty': 1.5}, {'objective': 'luck'}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LearnerOptions(**wrong)
