"""What the gate lets through, and what it goes by."""

from dataclasses import replace
from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st
from imatching_ros.bundle.options import BundleOptions
from imatching_ros.learning import evidence, verdict
from imatching_ros.learning.candidate import interpolated
from imatching_ros.learning.evidence import Evidence, gather
from imatching_ros.learning.verdict import consider, judge, mean_and_error
from imatching_ros.matching.protocol import Matches
from lessons import same, taught
import numpy as np
import pytest
import torch


def witnessed(share, known=0.4, points=4000, views=40, seed=0, wander=0.0):
    """
    Return evidence in which a share of the points is consistent, and of the known warps.

    The points' luck is that of the seed; ``wander`` is the spread of the share among the views.
    """
    g = torch.Generator().manual_seed(seed)
    luck, point = torch.rand(points, generator=g), torch.arange(points)
    shares = share + wander * torch.linspace(-1, 1, views)
    view, corner = point % views, point // views
    return Evidence(
        torch.where(luck < shares[view], 0.5, torch.inf), view, corner,
        torch.where(torch.linspace(0, 1, 500) < known, 0.5, 3.0), 3.0,
    )


def test_what_is_consistent_more_often_is_better():
    before = witnessed(0.40)
    assert judge([witnessed(0.43)], [before]).mark == 1
    assert judge([witnessed(0.37)], [before]).mark == -1
    assert judge([before], [before]).mark == 0
    assert judge([witnessed(0.43, points=20)], [witnessed(0.40, points=20)]).mark == 0
    # Two clips are two witnesses
    said = judge([witnessed(0.43), witnessed(0.43)], [before, before])
    assert said.mark == 1 and said.figures['gain'] == pytest.approx(3.0, abs=0.5)
    assert said.reason.startswith('better: 43') and '40 held-out images' in said.reason


def test_points_of_one_image_err_together():
    before = witnessed(0.40)
    shifted = witnessed(0.43, wander=0.25)
    said = judge([shifted], [before])
    assert said.mark == 0 and said.figures['gain'] > 2
    # The same points as if each were an image of its own
    alone = torch.arange(len(before.view))
    assert judge([replace(shifted, view=alone)], [replace(before, view=alone)]).mark == 1


def test_matches_of_one_corner_err_together():
    before = witnessed(0.40, points=8000, views=80)
    better = before.corner < 8  # of a hundred corners: all that they show may be luck
    some = replace(before, error=torch.where(better, 0.5, before.error))
    assert 3 < judge([some], [before]).figures['gain'] < 6
    assert judge([some], [before]).figures['gain_error'] > 1
    spread = replace(before, error=torch.where(torch.rand(8000) < 0.08, 0.5, before.error))
    assert judge([spread], [before]).figures['gain_error'] < 0.6


def test_corners_of_two_clips_are_not_the_same_corners():
    before = witnessed(0.40, points=8000, views=80)
    some = replace(before, error=torch.where(before.corner < 8, 0.5, before.error))
    later = [replace(e, view=e.view + 80) for e in (some, before)]
    once, twice = judge([some], [before]), judge([some, later[0]], [before, later[1]])
    assert twice.figures['gain'] == pytest.approx(once.figures['gain'])
    error = once.figures['gain_error'] / 2**0.5
    assert twice.figures['gain_error'] == pytest.approx(error, rel=0.02)
    assert twice.figures['images'] == 160


def test_the_standard_error_is_the_spread_of_many_means():
    view, corner = torch.arange(600) % 20, torch.arange(600) // 20
    g = torch.Generator().manual_seed(0)
    said = [
        mean_and_error(
            0.3 + torch.randn(20, generator=g)[view] + torch.randn(30, generator=g)[corner],
            view, corner,
        )
        for _ in range(400)
    ]
    mean, error = np.array(said).T
    assert mean.mean() == pytest.approx(0.3, abs=0.05)
    assert error.mean() == pytest.approx(mean.std(), rel=0.1)
    # By hand: of two views that differ by one in all, by none in what corners show
    x, one, two = (torch.tensor(v) for v in ([1.0, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]))
    assert mean_and_error(x, one, two) == (0.5, 0.5)
    # One view, or one point, says nothing about others
    assert mean_and_error(x, one, torch.zeros(4)) == (0.5, np.inf)
    assert mean_and_error(x[:1], one[:1], two[:1]) == (0.0, np.inf)


def test_a_true_gain_may_lose_known_warps_but_not_most_of_them():
    before = witnessed(0.40, known=0.43)
    assert judge([witnessed(0.45, known=0.29)], [before]).mark == 1
    said = judge([witnessed(0.45, known=0.10)], [before])
    assert said.mark == -1 and said.reason.startswith('collapsed: 10 %')


@given(
    st.floats(0.05, 0.9), st.floats(-0.04, 0.04), st.integers(1, 3), st.integers(2, 30),
    st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_a_word_and_its_opposite(share, gain, clips, views, seed):
    """Whoever is better than another, that one is worse than he, by as much."""
    one = [witnessed(share, views=views, seed=seed + k) for k in range(clips)]
    two = [witnessed(share + gain, views=views, seed=seed + k) for k in range(clips)]
    there, back = judge(two, one), judge(one, two)
    assert there.mark == -back.mark
    assert there.figures['gain'] == pytest.approx(-back.figures['gain'], abs=1e-4)
    assert there.figures['gain_error'] == pytest.approx(back.figures['gain_error'], abs=1e-4)
    assert abs(there.mark) <= (abs(there.figures['gain']) > 0)


def test_evidence_is_gathered_until_the_word_is_sure(monkeypatch):
    """A sure word needs two clips, one that is not sure needs all; the newest come first."""
    asked = []

    class Seen:
        def __init__(self, stamp):
            self.stamps = [stamp]

    def gathered(matcher, clip, options):
        asked.append((matcher, clip.stamps[0]))
        return witnessed(matcher)

    monkeypatch.setattr(verdict, 'gather', gathered)
    monkeypatch.setattr(verdict, 'interpolated', lambda first, second, share: first)
    clips = [Seen(k) for k in range(5)]
    known = {}
    said, taken = consider(0.45, 0.40, clips, BundleOptions(), known)
    assert said.mark == 1 and taken == 0.45 and said.share == 1
    assert [stamp for _, stamp in asked] == [4, 4, 0, 0] and set(known) == {(4,), (0,)}
    assert set(said.evidence) == {(4,), (0,)}
    del asked[:]
    said, _ = consider(0.40, 0.40, clips, BundleOptions(), known)
    assert said.mark == 0
    # The weights in use are asked once for each clip, the candidate and its half everywhere
    assert sorted(stamp for _, stamp in asked) == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4]
    consider(0.45, 0.40, clips[3:], BundleOptions(), known)
    assert set(known) == {(3,), (4,)}  # what is not held out any more is forgotten


def test_what_lies_halfway_is_asked_where_the_candidate_is_not_surely_better(monkeypatch):
    """Numbers for matchers: what is right grows up to 1, and falls from there on."""
    monkeypatch.setattr(verdict, 'gather', lambda matcher, clip, options: witnessed(
        0.5 - 0.1 * abs(matcher - 1)
    ))
    monkeypatch.setattr(
        verdict, 'interpolated', lambda first, second, share: first + share * (second - first)
    )
    clips = [SimpleNamespace(stamps=[k]) for k in range(2)]
    said, taken = consider(2.0, 0.0, clips, BundleOptions(), {})  # both as far from the best
    assert said.mark == 1 and taken == 1.0 and said.share == 0.5
    assert said.reason.endswith(', with 50 % of the way to the candidate')
    # It is the evidence of what is taken, for this is what the next one is compared with
    assert torch.equal(said.evidence[0,].error, witnessed(0.5).error)
    said, taken = consider(0.0, 0.0, clips, BundleOptions(), {})
    assert said.mark == 0 and taken == 0.0 and said.share == 1 and 'way' not in said.reason
    said, taken = consider(3.0, 0.0, clips, BundleOptions(), {})
    assert said.mark == -1 and taken == 3.0  # what is surely worse is not asked by halves


def test_what_has_no_pair_is_not_judged():
    with pytest.raises(ValueError, match='argument'):
        judge([witnessed(0.5)] * 2, [witnessed(0.4)])


def test_weights_between_two_are_between_them(shipped):
    other = interpolated(shipped[0], shipped[0], 1.0)
    for parameter in other.parameters():
        parameter.data += 1.0
    between = interpolated(shipped[0], other, 0.25)
    for ours, first in zip(between.parameters(), shipped[0].parameters(), strict=True):
        assert torch.allclose(ours, first + 0.25, atol=1e-6)
    assert same(interpolated(shipped[0], other, 0.0).state_dict(), shipped[0].state_dict())
    with pytest.raises(ValueError, match='argument'):  # another network
        interpolated(shipped[0], torch.nn.Identity(), 0.5)
    one, two = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    two(torch.randn(8, 2))
    assert interpolated(one, two, 0.5).num_batches_tracked == 0  # what is counted has no middle


class Wrong(torch.nn.Module):
    """A matcher whose matches are changed on the way."""

    def __init__(self, matcher, change):
        super().__init__()
        self.matcher, self.change = matcher, change

    def encode(self, images):
        return self.matcher.encode(images)

    def match(self, reference, target, queries, around=None):
        matches = self.matcher.match(reference, target, queries)
        return Matches(self.change(queries, matches.uv), *list(vars(matches).values())[1:])


def moved(queries, uv):
    return uv + 2.0


def identical(queries, uv):
    return queries.clone()


def in_one_place(queries, uv):
    return torch.full_like(uv, 100.0)


def enlarged(queries, uv):
    """Each match is drawn away from the image's centre: a bend that a focal length explains."""
    centre = uv.new_tensor([160.0, 120.0])
    return centre + 1.02 * (uv - centre)


def scattered(queries, uv):
    g = torch.Generator().manual_seed(0)
    return uv + 0.5 * torch.randn(uv.shape, generator=g)


def half_lost(queries, uv):
    g = torch.Generator().manual_seed(0)
    lost = torch.rand(uv.shape[:2], generator=g) < 0.1
    return torch.where(lost.unsqueeze(-1), uv.flip(-2), uv)


@pytest.mark.parametrize(
    'change', [identical, in_one_place, moved, enlarged, scattered, half_lost],
    ids=lambda change: change.__name__,
)
def test_what_matches_worse_is_refused(shipped, night, events, change):
    """Also where all matches are wrong together, so that poses bend and none contradicts."""
    learner = taught(shipped, night, events)
    wrong = learner.gather(Wrong(shipped[0], change))
    assert judge(wrong, learner.gather(shipped[0])).mark == -1


def test_a_point_is_told_by_the_other_views_alone(shipped, night, events):
    """The error of a match is its own, and moves no other view's point."""
    learner = taught(shipped, night, events)
    clip = learner.inputs.held_out[0]
    camera, count = clip.lesson.camera, 6
    rng = np.random.default_rng(0)
    T = torch.zeros(count, 7, dtype=torch.float64)
    T[:, 0], T[:, 6] = torch.linspace(0, 0.5, count), 1.0
    points = torch.from_numpy(rng.uniform((-1, -1, 3), (1, 1, 5), (50, 3)))
    seen = points[:, None] - T[None, :, :3]
    xy = seen[..., :2] / seen[..., 2:]
    usable = torch.ones(count, dtype=torch.bool)
    exact = evidence._left_out(T, xy, usable, clip.lesson)
    assert exact.max() < 1e-6
    pixel = 1 / camera.fx
    xy[:, 2, 1] += 1.5 * pixel  # across the motion
    xy[:, 4, 0] += 30 * pixel  # along it
    error = evidence._left_out(T, xy, usable, clip.lesson)
    assert error[:, 2] == pytest.approx(1.5, abs=0.1)
    assert (error[:, 4] > 20).all()
    assert (error[:, [0, 1, 3, 5]] < 1).all()  # three good views and one that is a little off
    few = usable.clone()
    few[:3] = False  # of the views left, each has two others
    assert evidence._left_out(T, xy, few, clip.lesson).isinf().all()


def test_corners_are_looked_for_between_the_keyframes_too(shipped, night, events):
    learner = taught(shipped, night, events)
    clip = learner.inputs.held_out[0]
    keyframes = clip.keyframes
    stamps = [stamp for stamp, _ in clip.between]
    assert stamps and keyframes[0] < min(stamps) and max(stamps) < keyframes[-1]
    assert not set(stamps) & set(clip.lesson.window.stamps.tolist())
    found = gather(shipped[0], clip, learner.bundle)
    assert set(found.view.tolist()) == set(clip.stamps)
    # They are no worse than keyframes: their poses are found
    between = torch.isin(found.view, torch.tensor(stamps))
    shares = [(found.error[mask] < 1).double().mean() for mask in (between, ~between)]
    assert shares[0] > 0.8 * shares[1] > 0.1
