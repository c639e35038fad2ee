"""
One thread for one core object.

Whatever touches it runs there, in order, and callbacks stay short.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
import threading
import time
from typing import Any


class Worker:
    """
    Run posted requests first, then waiting inputs in order.

    Then ``idle`` while it has something to do.

    ``process(item)`` handles one input; ``ready()`` says whether inputs may be taken yet;
    ``idle()`` does one piece of background work and says whether there was any. An exception in
    ``process`` or ``idle`` goes to ``on_error``: the thread lives on.
    """

    def __init__(
        self,
        process: Callable[[Any], None],
        ready: Callable[[], bool],
        on_error: Callable[[Exception], None],
        queue_size: int,
        on_drop: Callable[[Any], None],
        idle: Callable[[], bool] = lambda: False,
    ) -> None:
        self._process, self._ready, self._idle = process, ready, idle
        self._on_error, self._on_drop = on_error, on_drop
        self._queue_size = queue_size
        self._inputs: deque[Any] = deque()
        self._requests: deque[tuple[Callable[[], Any], Future]] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._begun: float | None = None  # when the piece of work in hand began
        self._thread = threading.Thread(target=self._run, name='core', daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, item: Any) -> None:
        """Queue an input; the oldest beyond the queue's size is dropped."""
        dropped = []
        with self._changed:
            self._inputs.append(item)
            while len(self._inputs) > self._queue_size:
                dropped.append(self._inputs.popleft())
            self._changed.notify()
        for old in dropped:
            self._on_drop(old)

    def request(self, function: Callable[[], Any]) -> Future:
        """
        Run ``function`` in the core's thread before the next input.

        The future has its result.
        """
        future: Future = Future()
        with self._changed:
            self._requests.append((function, future))
            self._changed.notify()
        return future

    def post(self, function: Callable[[], Any]) -> None:
        """Do the same where nobody waits for it: an exception goes to ``on_error``."""

        def report(future: Future) -> None:
            if not future.cancelled() and (error := future.exception()) is not None:
                self._on_error(error)

        self.request(function).add_done_callback(report)

    def waiting(self) -> int:
        """Return how many inputs have not been taken yet."""
        return len(self._inputs)

    def busy(self) -> float:
        """For how many seconds the piece of work in hand has gone on; 0 where there is none."""
        begun = self._begun
        return 0.0 if begun is None else time.monotonic() - begun

    def clear(self) -> None:
        """Drop the inputs that wait."""
        with self._changed:
            dropped = list(self._inputs)
            self._inputs.clear()
        for old in dropped:
            self._on_drop(old)

    def stop(self, timeout: float | None = None) -> bool:
        """
        End the thread after the piece of work in hand, and wait for that.

        False where it takes longer.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)
        for _, future in self._requests:
            future.cancel()
        return not self._thread.is_alive()

    def _run(self) -> None:
        busy = True
        while True:
            self._begun = None
            with self._changed:
                nothing = not self._requests and not (self._inputs and self._ready())
                if nothing and not busy and not self._stopping:
                    # readiness may change without a notice, so look again soon
                    self._changed.wait(0.05)
                if self._stopping:
                    return
                request = self._requests.popleft() if self._requests else None
                take = request is None and self._inputs and self._ready()
                item = self._inputs.popleft() if take else None
                self._begun = time.monotonic()
            if request is not None:
                function, future = request
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)
                busy = True
                continue
            busy = bool(take)
            try:
                if take:
                    self._process(item)
                else:
                    busy = self._idle()
            except Exception as error:
                self._on_error(error)
