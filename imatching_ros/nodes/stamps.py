"""Time as ROS messages have it, which stamps of a node's inputs go on, and when a clock jumps."""

from __future__ import annotations

from collections.abc import Callable

from builtin_interfaces.msg import Time
from rclpy.clock import Clock, JumpHandle, JumpThreshold, TimeJump
from rclpy.duration import Duration
from std_msgs.msg import Header

from ..data.stamps import LEAP_NS, RESTART, RESTART_NS, SAME, Stamps


def to_ns(stamp: Time) -> int:
    """
    Return a ROS stamp in nanoseconds.

    Raises ValueError where its nanoseconds make a second or more, so that it is none.
    """
    if stamp.nanosec >= 1_000_000_000:
        raise ValueError(
            f'the stamp {stamp.sec} s and {stamp.nanosec} ns is no time: nanoseconds end at '
            '999999999'
        )
    return stamp.sec * 1_000_000_000 + stamp.nanosec


def to_stamp(ns: int) -> Time:
    """Return nanoseconds as a ROS stamp."""
    sec, nanosec = divmod(int(ns), 1_000_000_000)
    return Time(sec=sec, nanosec=nanosec)


def to_header(ns: int, frame_id: str) -> Header:
    """Return a header with a stamp given in nanoseconds."""
    return Header(stamp=to_stamp(ns), frame_id=frame_id)


class Timeline:
    """The stamps of a node's inputs, by the rule of ``data.stamps``."""

    def __init__(
        self, judged: bool, fault: Callable[[str], None], restart: Callable[[], None]
    ) -> None:
        """
        Begin without a stamp.

        judged: whether who sends the inputs has judged their stamps. fault: is told of jumps.
        restart: is called, in the thread that checks, where the stamps begin again.
        """
        self._judged, self._fault, self._restart = judged, fault, restart
        self.forget()

    @property
    def last(self) -> int | None:
        """The newest stamp that was good, ns."""
        return self._stamps.last

    def forget(self) -> None:
        """Take the next stamp as the first."""
        self._stamps = Stamps(self._judged)

    def check(self, stamp: int) -> None:
        """
        Go on to the stamp (ns) of the next input.

        Where the stamps begin again, which takes a second message to believe, ``restart`` is
        called first. Raises ValueError for a stamp that does not go on.
        """
        last = self.last
        reason = self._stamps.judge(stamp)
        if reason == RESTART:
            self._fault(f'the clock went back by {(last - stamp) / 1e9:.3f} s: starting afresh')
            self._restart()
            self._stamps.restart(stamp)
        elif reason and abs(stamp - last) < RESTART_NS:
            what = 'the same stamp as' if reason == SAME else 'an older stamp than'
            raise ValueError(
                f'a message with {what} the one before is ignored; check for a second publisher'
            )
        elif reason:
            where = 'ahead of' if stamp > last else 'behind'
            raise ValueError(
                f'a message with a stamp {abs(stamp - last) / 1e9:.3f} s {where} the one before '
                'is ignored, unless the next one goes on from it; check the clocks'
            )
        elif last is not None and stamp - last > LEAP_NS:
            seconds = (stamp - last) / 1e9
            self._fault(f'the clock went forward by {seconds:.3f} s from one message to the next')


def watch_clock(
    clock: Clock, fault: Callable[[str], None], restart: Callable[[], None]
) -> JumpHandle:
    """
    Have ``fault`` told when the clock jumps, and ``restart`` called when it goes back.

    The watch lasts as long as what is returned.
    """

    def jumped(jump: TimeJump) -> None:
        seconds = jump.delta.nanoseconds / 1e9
        if clock.now().nanoseconds <= jump.delta.nanoseconds:
            return  # from zero: the clock was set
        if seconds > 0:
            fault(f'the clock on /clock went forward by {seconds:.3f} s')
            return
        fault(f'the clock on /clock went back by {-seconds:.3f} s: starting afresh')
        restart()

    threshold = JumpThreshold(
        min_forward=Duration(nanoseconds=LEAP_NS),
        min_backward=Duration(nanoseconds=-RESTART_NS),
        on_clock_change=False,
    )
    return clock.create_jump_callback(threshold, post_callback=jumped)
