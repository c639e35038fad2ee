"""
The one thread in which all that touches a core object runs, in order.

So the node's callbacks stay short.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
import contextlib
import threading
import time
from typing import Any

PATIENCE_S = 60.0  #: a service or a transition waits this long for the piece of work in hand
STEP_S = 2.0  #: between two looks at the core no more time than this counts
WORKING = 0.1  #: of one processor: what the threads that help the core take at least
LEAST_S = 1e-3  #: processor time that the core's own thread has taken, if it works


class Worker:
    """
    Runs requests first, then inputs in order, then ``idle`` while it has something to do.

    ``process(item)`` handles one input; ``ready()`` says whether inputs may be taken yet;
    ``idle()`` does one piece of background work and says whether there was any. An exception in
    ``process`` or ``idle`` goes to ``on_error``, and the thread lives on.
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
        # of the thread's processor time; the process's where the system has none for a thread
        self._clock = time.CLOCK_PROCESS_CPUTIME_ID
        # at the last look: the time, when the work in hand began, processor time of the thread,
        # and of all but the one that looks
        self._seen: tuple[float, float | None, float, float] = (time.monotonic(), None, 0.0, 0.0)
        #: for how many seconds the piece of work in hand has taken no processor time
        self.stuck = 0.0
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
        Have ``function`` run in the core's thread before the next input.

        The future that is returned gets its result, or what it raised.
        """
        future: Future = Future()
        with self._changed:
            self._requests.append((function, future))
            self._changed.notify()
        return future

    def post(self, function: Callable[[], Any]) -> None:
        """Request a function that nobody waits for; what it raises goes to ``on_error``."""

        def report(future: Future) -> None:
            if not future.cancelled() and (error := future.exception()) is not None:
                self._on_error(error)

        self.request(function).add_done_callback(report)

    def waiting(self) -> int:
        """Return how many inputs have not been taken yet."""
        return len(self._inputs)

    def busy(self) -> float:
        """Return for how many seconds the piece of work in hand has gone on; 0 without any."""
        begun = self._begun
        return 0.0 if begun is None else time.monotonic() - begun

    def check_progress(self) -> None:
        """
        Check whether the piece of work in hand takes processor time, and keep ``stuck``.

        This is to be called about once a second, in one thread. Time in which that thread did not
        run either, on a starved machine or in a stopped process, hardly counts.
        """
        own = 0.0
        with contextlib.suppress(OSError):  # the thread has ended
            own = time.clock_gettime(self._clock)
        seen = time.monotonic(), self._begun, own, time.process_time() - time.thread_time()
        now, begun, own, others = seen
        before, begun_before, own_before, others_before = self._seen
        self._seen, passed = seen, now - before
        works = own - own_before > LEAST_S or others - others_before > WORKING * passed
        idle = begun is None or begun != begun_before
        self.stuck = 0.0 if idle or works else self.stuck + min(passed, STEP_S)

    def clear(self) -> None:
        """Drop the inputs that wait."""
        with self._changed:
            dropped = list(self._inputs)
            self._inputs.clear()
        for old in dropped:
            self._on_drop(old)

    def stop(self, timeout: float | None = None) -> bool:
        """
        End the thread after the piece of work in hand.

        timeout: how many seconds to wait for that. Returns False where it takes longer.
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
        if clock_of := getattr(time, 'pthread_getcpuclockid', None):
            self._clock = clock_of(threading.get_ident())
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
