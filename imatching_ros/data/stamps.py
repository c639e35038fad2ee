"""Which stamps of a stream of images go on: the one rule of recordings and of nodes."""

from __future__ import annotations

RESTART_NS = 1_000_000_000  #: a stamp this far behind the last one may be a new beginning
LEAP_NS = 10_000_000_000  #: a stamp further ahead of the last one than this is doubted

#: Why an image is left out; each completes "3 images were left out: 2 …".
SAME = 'with the stamp of another'
BACK = 'with a stamp that goes back'
AHEAD = 'with a stamp ahead of those after it'
FAR = 'with a stamp far from the others'
#: The stamps have begun anew: a node does so too, a recording leaves the image out.
RESTART = 'with a stamp of a new beginning'


def goes_on(before: int, stamp: int) -> bool:
    """Return whether ``stamp`` follows ``before`` (ns) as one image's follows another's."""
    return 0 < stamp - before <= LEAP_NS


class Stamps:
    """
    The stamps of one stream, judged one after the other.

    A stamp that jumps, back by ``RESTART_NS`` or more or ahead by more than ``LEAP_NS``, is
    believed only when the next one goes on from it, so that no single bad stamp counts for more
    than itself. Where the next one is known already, as in a recording, none is doubted for long.
    """

    def __init__(self, trusting: bool = False) -> None:
        """
        Begin with no stamp.

        Where ``trusting``, whoever sends the stamps has judged them, so a jump is believed at
        once.
        """
        self.last: int | None = None  #: the newest that was good, ns
        self._before: int | None = None  # the good one before that
        self._doubtful: int | None = None  # the newest, where it jumped
        self._trusting = trusting

    def judge(self, stamp: int, following: int | None = None) -> str:
        """
        Return why the image of this stamp, ns, is left out, or nothing where it is good.

        ``RESTART`` is the answer where the stamps have gone back for good; ``restart`` then begins
        with this one. ``following``: the stamp of the next image, where it is known.
        """
        doubtful, self._doubtful = self._doubtful, None
        known = following is not None
        if self.last is None:
            if known and not goes_on(stamp, following):
                return SAME if stamp == following else FAR
        elif goes_on(self.last, stamp):
            if known and self.last < following < stamp:
                return AHEAD
        elif 0 <= self.last - stamp < RESTART_NS:
            return SAME if stamp == self.last else BACK
        else:
            ahead = stamp > self.last
            if self._before is not None and self._before < stamp < self.last <= stamp + LEAP_NS:
                return BACK  # not this one is wrong: the last one was ahead
            believed = self._trusting or (doubtful is not None and goes_on(doubtful, stamp))
            believed |= known and ahead and goes_on(stamp, following)
            if not believed:
                self._doubtful = stamp
                return FAR if ahead else BACK
            if not ahead:
                self._doubtful = stamp
                return RESTART
        self._before, self.last = self.last, stamp
        return ''

    def restart(self, stamp: int) -> None:
        """Forget the stamps before this one, and go on from it."""
        self.last, self._before, self._doubtful = stamp, None, None
