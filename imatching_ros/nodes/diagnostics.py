"""What a node counts of itself and says once a second on /diagnostics."""

from __future__ import annotations

from collections import deque
import resource
from statistics import quantiles
import sys
import time

OK, WARN, ERROR = 0, 1, 2


def percentiles(values: list[float]) -> tuple[float, float]:
    """Return the median and the 95th percentile, NaN where there is nothing yet."""
    if len(values) < 2:
        return (values[0], values[0]) if values else (float('nan'), float('nan'))
    cuts = quantiles(values, n=20, method='inclusive')
    return cuts[9], cuts[18]


def peak_memory_mb() -> float:
    """Return the largest resident size of this process so far."""
    if sys.platform == 'linux':  # getrusage begins there with what the parent process had
        with open('/proc/self/status') as status:
            line = next(line for line in status if line.startswith('VmHWM:'))
        return int(line.split()[1]) / (1 << 10)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == 'darwin' else 1 << 10)


class Share:
    """Measures what share of the last minute went into something."""

    SPAN_S = 60.0

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._spent: deque[tuple[float, float]] = deque()  # when it ended, seconds

    def add(self, seconds: float) -> None:
        self._spent.append((time.monotonic(), seconds))

    def value(self) -> float:
        now = time.monotonic()
        while self._spent and self._spent[0][0] < now - self.SPAN_S:
            self._spent.popleft()
        span = min(self.SPAN_S, now - self._begun)
        return min(sum(seconds for _, seconds in list(self._spent)) / span, 1.0) if span else 0.0


class Health:
    """Counts what one node works on: images, correspondences or windows."""

    def __init__(self) -> None:
        self.received = self.processed = self.dropped = self.refused = 0
        self.faults = 0  #: all that went wrong, refused inputs among it
        self.last_error = ''
        self._faults_said = 0
        self._milliseconds: deque[float] = deque(maxlen=20_000)
        self._finished: deque[float] = deque(maxlen=100)

    def done(self, seconds: float) -> None:
        """Count one input as worked off, which took so many seconds."""
        self.processed += 1
        self._milliseconds.append(seconds * 1e3)
        self._finished.append(time.monotonic())

    def fault(self, sentence: str) -> None:
        """Count a sentence about what went wrong, and keep it."""
        self.faults += 1
        self.last_error = sentence

    def level(self, blocker: str) -> tuple[int, str]:
        """Return ERROR with ``blocker``, if any; WARN where something went wrong lately; or OK."""
        if blocker:
            return ERROR, blocker
        return (WARN, self.last_error) if self.faults > self._faults_said else (OK, 'running')

    def said(self, faults: int) -> None:
        """Take note that so many faults have been said; ``level`` speaks of those after them."""
        self._faults_said = faults

    def values(self) -> dict[str, object]:
        p50, p95 = percentiles(list(self._milliseconds))
        recent = [moment for moment in self._finished if moment > time.monotonic() - 2.0]
        span = recent[-1] - recent[0] if len(recent) > 1 else 0.0
        return {
            'received': self.received,
            'processed': self.processed,
            'dropped': self.dropped,
            'refused': self.refused,
            'faults': self.faults,
            'latency_p50_ms': p50,
            'latency_p95_ms': p95,
            'rate_hz': (len(recent) - 1) / span if span else 0.0,
            'last_error': self.last_error,
            'peak_memory_mb': peak_memory_mb(),
        }
