"""What the learner remembers: bounded, and not only of yesterday."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar('Item')


class Memory(Generic[Item]):
    """
    At most so many items, half of them the newest, half spread evenly over all the time before.

    A robot that leaves a place goes on rehearsing it, and being judged by it, however long ago it
    was there.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._items: list[tuple[int, Item]] = []
        self._count = 0

    def add(self, item: Item, instead: bool = False) -> None:
        """Remember an item, in the newest one's place if ``instead``."""
        if instead:
            self._items[-1] = self._items[-1][0], item
            return
        self._items.append((self._count, item))
        self._count += 1
        if len(self._items) <= self.most:
            return
        # Of what is not among the newest, the one whose neighbours in time are closest together is
        # missed least; the first of all stays.
        when = [number for number, _ in self._items]
        old = range(1, min(self.most - self.most // 2 + 1, self.most))
        gaps = [when[k + 1] - when[k - 1] for k in old]
        del self._items[1 + gaps.index(min(gaps)) if gaps else 0]

    def remove(self, index: int) -> None:
        del self._items[index]

    def clear(self) -> None:
        self._items.clear()

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Item:
        return self._items[index][1]

    def __iter__(self) -> Iterator[Item]:
        return (item for _, item in self._items)
