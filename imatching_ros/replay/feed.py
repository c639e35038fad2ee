"""What feeds the nodes: the recording's images, as fast as the slowest node takes them."""

from __future__ import annotations

from collections.abc import Mapping
import time

from .observer import Observer
from ..data.recording import Recording
from ..nodes.images import camera_to_info, image_from_recording
from ..nodes.learner import PARTS
from ..nodes.stamps import to_header

#: images that may be on their way to the matcher: it never waits for one, and none piles up
IN_FLIGHT = 3


class Feed:
    """The recording's messages, played on from where the last call ended."""

    def __init__(
        self, recording: Recording, observer: Observer, queue_sizes: Mapping[str, int]
    ) -> None:
        """``queue_sizes``: by role, how many messages may wait in a node before it drops some."""
        self._observer, self._queue_sizes = observer, queue_sizes
        self._messages = iter(recording.messages())
        self.sent = 0
        self.seconds = 0.0

    def play(self, count: int) -> None:
        """Play ``count`` images, each only when every node has room for what comes of it."""
        observer, begun, first = self._observer, time.monotonic(), self.sent
        while self.sent < first + count and (entry := next(self._messages, None)) is not None:
            stamp, kind, message = entry
            if kind == 'camera':
                info = camera_to_info(message, to_header(stamp, 'camera'))
                observer.camera_info.publish(info)
                continue
            observer.wait(self._room, 'playing images')
            observer.image.publish(image_from_recording(message, stamp))
            self.sent += 1
            observer.bar.show(observer.state(), completed=self.sent - first)
        observer.wait(lambda: observer.answered() >= self.sent, 'playing images')
        self.seconds += time.monotonic() - begun

    def _room(self) -> bool:
        """
        Return whether no queue can overflow if one more image is played.

        To what waits for a node comes what those before it may still make of the images played.
        """
        waiting = self._observer.waiting(self.sent)
        matcher, bundle = waiting['matcher'], waiting['bundle']
        most = {
            'matcher': matcher,
            'bundle': matcher + bundle,
            'learner': waiting.get('learner', 0)
            + matcher * (1 + len(PARTS)) + bundle * len(PARTS),
        }
        further = {'matcher': 1, 'bundle': 1, 'learner': 2 + len(PARTS)}
        return matcher < IN_FLIGHT and all(
            most[role] == 0 or most[role] + further[role] <= self._queue_sizes[role]
            for role in waiting
        )
