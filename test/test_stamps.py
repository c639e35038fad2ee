"""The rule of stamps: of recordings, which know the next one, and of nodes, which do not."""

from hypothesis import given
from hypothesis import strategies as st
from imatching_ros.data.sieve import Sieve
from imatching_ros.data.stamps import BACK, FAR, LEAP_NS, RESTART, RESTART_NS, SAME, Stamps
import pytest

SECOND = 1_000_000_000
START = 1_700_000_000 * SECOND

steps = st.integers(SECOND // 100, SECOND // 2)
#: stamps as a camera gives them
good = st.lists(steps, min_size=3, max_size=30).map(
    lambda found: [START + sum(found[:k]) for k in range(len(found))]
)
any_stamp = st.one_of(
    st.just(0), st.integers(-(2**31) * SECOND, 2**31 * SECOND),
    st.integers(START - 20 * SECOND, START + 40 * SECOND),
)


def kept(stamps):
    """Return the stamps that a recording keeps, and how many it counts as left out."""
    sieve = Sieve()
    images = sieve.in_time((k, stamp, None) for k, stamp in enumerate(stamps))
    return [stamp for _, stamp, _ in images], sieve.counts.total()


def judged(stamps, rule=None):
    """Return what a node says of each, going on from a new beginning."""
    rule, said = rule or Stamps(), []
    for stamp in stamps:
        said.append(rule.judge(stamp))
        if said[-1] == RESTART:
            rule.restart(stamp)
    return said


@given(good)
def test_good_stamps_are_kept(stamps):
    assert kept(stamps) == (stamps, 0)
    assert judged(stamps) == [''] * len(stamps)


@given(st.lists(any_stamp, max_size=30))
def test_what_is_kept_grows_and_the_rest_is_counted(stamps):
    left, count = kept(stamps)
    assert all(a < b for a, b in zip(left, left[1:], strict=False))
    assert len(left) + count == len(stamps)
    rule, last = Stamps(), None
    for stamp in stamps:  # so it is for a node, until a new beginning
        reason = rule.judge(stamp)
        if reason == RESTART:
            assert stamp <= last - RESTART_NS
            rule.restart(stamp)
        elif not reason:
            assert last is None or stamp > last
        if reason in ('', RESTART):
            last = stamp


@given(good, st.data())
def test_one_bad_stamp_costs_a_recording_itself_and_a_neighbour_at_most(stamps, data):
    where = data.draw(st.integers(0, len(stamps) - 1))
    bad = data.draw(any_stamp)
    left, _ = kept([*stamps[:where], bad, *stamps[where + 1:]])
    assert len(left) >= len(stamps) - 2
    left, _ = kept([*stamps[:where], bad, *stamps[where:]])  # one more than there should be
    assert len(left) >= len(stamps) - 1


@given(good, st.data())
def test_one_bad_stamp_never_makes_a_node_begin_anew(stamps, data):
    where = data.draw(st.integers(1, len(stamps) - 1))
    bad = data.draw(any_stamp)
    said = judged([*stamps[:where], bad, *stamps[where:]])
    assert RESTART not in said
    if not stamps[where - 1] < bad <= stamps[where - 1] + LEAP_NS:
        assert said[where] and not any(said[:where] + said[where + 1:])


@given(good, good, st.integers(2 * SECOND, START))
def test_a_new_beginning_is_believed_with_its_second_stamp(before, after, back):
    after = [stamp - START + before[-1] - back for stamp in after]
    if after[0] > before[-2]:
        return  # it might be the last one that was ahead
    said = judged(before + after)[len(before):]
    assert said[:2] == [BACK, RESTART] and not any(said[2:])
    assert judged(before + after, Stamps(trusting=True))[len(before)] == RESTART
    left, count = kept(before + after)  # a recording goes on where its stamps do
    assert left[:len(before)] == before and all(stamp in after for stamp in left[len(before):])


@given(good, st.integers(LEAP_NS + SECOND, START))
def test_a_clock_that_is_set_ahead_is_believed(stamps, ahead):
    later = [stamp + stamps[-1] - START + ahead for stamp in stamps]
    assert kept(stamps + later) == (stamps + later, 0)
    assert judged(stamps + later)[len(stamps):] == [FAR] + [''] * (len(later) - 1)


@pytest.mark.parametrize('noughts', [1, 2, 5])
def test_noughts_among_good_stamps(noughts):
    stamps = [START + k * SECOND // 10 for k in range(10)]
    mixed = stamps[:4] + [0] * noughts + stamps[4:]
    assert kept(mixed) == (stamps, noughts)
    assert judged(mixed)[4:4 + noughts] == [BACK] * noughts
    assert kept([0] * noughts + stamps) == (stamps, noughts)
    assert judged([*stamps[:4], stamps[3], *stamps[4:]])[4] == SAME


def test_a_node_says_what_is_wrong_with_a_stamp():
    pytest.importorskip('rclpy', reason="ROS 2's rclpy is not installed")
    from imatching_ros.nodes.stamps import Timeline

    said, begun = [], []
    timeline = Timeline(False, said.append, lambda: begun.append(timeline.last))
    assert timeline.last is None
    now = START + SECOND // 10
    for stamp in (START, now):
        timeline.check(stamp)
    for stamp, sentence in (
        (now, 'a message with the same stamp as the one before is ignored; check for a second'),
        (now - SECOND // 20, 'a message with an older stamp than the one before is ignored'),
        (now + 100 * SECOND, 'a message with a stamp 100.000 s ahead of the one before'),
        (now - 100 * SECOND, 'a message with a stamp 100.000 s behind the one before'),
    ):
        with pytest.raises(ValueError, match=sentence):
            timeline.check(stamp)
        assert timeline.last == now
    timeline.check(now - 100 * SECOND + SECOND // 10)  # the second one that says so
    assert said == ['the clock went back by 99.900 s: starting afresh'] and begun == [now]
    now = timeline.last
    with pytest.raises(ValueError, match='ahead of'):
        timeline.check(now + 50 * SECOND)
    timeline.check(now + 50 * SECOND + SECOND // 10)
    assert said[1:] == ['the clock went forward by 50.100 s from one message to the next']
    timeline.forget()
    timeline.check(START - 10**6 * SECOND)
    assert len(said) == 2 and len(begun) == 1
