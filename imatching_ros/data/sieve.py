"""What of a recording's images can be used; the rest is left out, counted and said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import numpy as np

from .stamps import BACK, RESTART, Stamps
from .storage import RecordingError
from ..geometry.camera import Camera

#: Why an image is left out, beside its stamp; each completes "3 images were left out: 2 …".
BROKEN = 'that cannot be read'
RESIZED = 'of another size'
LOST = 'in a damaged part of the file'


class Sieve:
    """What leaves images out, and counts each once, however often the recording is read."""

    def __init__(self) -> None:
        self._reasons: dict[int, str] = {}  # by the image's number in the recording
        self._examples: dict[str, str] = {}  # what the first one said

    @property
    def counts(self) -> Counter[str]:
        """Return how many images were left out for which reason."""
        return Counter(self._reasons.values())

    def leave_out(self, number: int, reason: str, example: str = '') -> None:
        """Count the image of this number; ``example`` says more about it."""
        if number not in self._reasons:
            self._reasons[number] = reason
            self._examples.setdefault(reason, example)

    def in_time(
        self, images: Iterable[tuple[int, int, Any]]
    ) -> Iterator[tuple[int, int, Any]]:
        """Yield those of the images ``(number, stamp ns, anything)`` whose stamps go on."""
        stamps, held = Stamps(), None

        def good(image: tuple[int, int, Any], following: int | None) -> bool:
            if reason := stamps.judge(image[1], following):
                self.leave_out(image[0], BACK if reason == RESTART else reason)
            return not reason

        for image in images:
            if held is not None and good(held, image[1]):
                yield held
            held = image
        if held is not None and good(held, None):
            yield held

    def pictures(
        self,
        images: Iterable[tuple[int, int, Any]],
        decode: Callable[[Any], np.ndarray],
        camera_of: Callable[[int], Camera],
        other_size: Callable[[int, str], str],
    ) -> Generator[tuple[int, np.ndarray], None, bool]:
        """
        Yield ``(stamp ns, picture)`` of the images ``(number, stamp ns, what to decode)``.

        Left out is what ``decode`` raises ValueError for, and what has not the size of the
        camera of its stamp. Where the first picture has not, RecordingError says what
        ``other_size`` makes of its number and its size in words. Returns whether there was one.
        """
        used = False
        for number, stamp, encoded in images:
            try:
                picture = decode(encoded)
            except ValueError as error:
                self.leave_out(number, BROKEN, str(error))
                continue
            camera = camera_of(stamp)
            if picture.shape != (camera.height, camera.width):
                has = f'{picture.shape[1]}x{picture.shape[0]}'
                if not used:
                    raise RecordingError(other_size(number, has))
                self.leave_out(number, RESIZED, has)
                continue
            used = True
            yield stamp, picture
        return used

    def sentence(self, count: int) -> str:
        """Return what to tell the user of a recording of ``count`` images, or nothing."""
        if not self._reasons:
            return ''
        parts = []
        for reason, several in self.counts.most_common():
            example = self._examples[reason]
            parts.append(f'{several} {reason}' + (f' ({example})' if example else ''))
        were = 'was' if len(self._reasons) == 1 else 'were'
        return f'{len(self._reasons)} of {count} images {were} left out: {", ".join(parts)}'
