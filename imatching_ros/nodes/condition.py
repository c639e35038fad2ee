"""How a node is: whether it can work yet, what keeps it from working, and what to warn of."""

from __future__ import annotations

import time
from typing import Any

from .diagnostics import ERROR, OK, WARN
from .. import kernels

UNCONFIGURED, INACTIVE, ACTIVE, FINALIZED = 'unconfigured', 'inactive', 'active', 'finalized'
SILENCE_S = 2.0  #: without input for this long, an active node says so
BUSY_S = 20.0  #: one piece of work that takes this long is said


class Condition:
    """Says how a node is: to the diagnostics once a second, of the kernels in the log."""

    def __init__(self, node: Any) -> None:
        """
        Begin with a node that has heard nothing yet.

        node: a ``CoreNode``, of which state, worker and what a child says of itself are read.
        """
        self._node = node
        self.forget()

    def forget(self) -> None:
        """Be as before the node was configured."""
        self.prepared = False  #: whether what it computes with is compiled
        self._last_heard = 0.0

    def heard(self) -> None:
        """Take note that the node has just heard what it lives on."""
        self._last_heard = time.monotonic()

    def prepare(self) -> None:
        """Have the kernels compiled before the first input, and say what they wait for or lack."""
        log = self._node.get_logger()

        def say(done: int, total: int, _: str) -> None:
            if done < total:
                log.info(kernels.state())

        try:
            kernels.prepare(say)
        finally:
            self.prepared = True
        if notice := kernels.state():
            log.warning(notice)
        log.info('ready')

    def warning(self) -> str:
        """Return what to warn of though nothing went wrong, or nothing."""
        node = self._node
        if (stuck := node.worker.stuck) > BUSY_S:
            return f'the node hangs: its work has taken no processor time for {stuck:.0f} s'
        if (busy := node.worker.busy()) > BUSY_S:
            return f'one piece of work has taken {busy:.0f} s so far'
        if (silence := time.monotonic() - self._last_heard) > SILENCE_S:
            return f'nothing has come on {node.resolve_topic_name(node.feed)} for {silence:.0f} s'
        return ''

    def describe(self) -> tuple[int, str, dict[str, object]]:
        """Return level, sentence and values of the diagnostics."""
        (level, text), node, worker = self._judge(), self._node, self._node.worker
        return level, text, {
            'lifecycle': node.state,
            'ready': node.state == ACTIVE and self.prepared,
            **node.health.values(),
            'waiting': worker.waiting() if worker else 0,
            'busy_s': worker.busy() if worker else 0.0,
            # before, it may wait for another process that compiles
            'stuck_s': worker.stuck if worker and self.prepared else 0.0,
            **{f'{topic}_listeners': n for topic, n in node.endpoints.listeners().items()},
            **node.values(),
        }

    def _judge(self) -> tuple[int, str]:
        """Return the level and the sentence of the diagnostics."""
        node = self._node
        if node.worker is not None and not self.prepared:
            return WARN, kernels.state() or 'getting ready'
        if node.state != ACTIVE:
            return (ERROR, f'{node.state}: {node.refusal}') if node.refusal else (OK, node.state)
        level, text = node.health.level(node.blocker())
        warnings = '; '.join(filter(None, (node.warning(), kernels.state())))
        return (WARN, warnings) if level == OK and warnings else (level, text)
