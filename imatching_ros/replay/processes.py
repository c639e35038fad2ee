"""The nodes' processes: their start and end, and whether they live."""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

from ..nodes import parameters

ROOT = str(Path(__file__).parents[2])
PATIENCE_S = 45.0  #: without a sign of life for this long a node hangs
SILENCE_S = 2.5  #: a node speaks once a second; whether a silent one works is seen from outside
STEP_S = 0.5  #: no more than this counts between two looks: whoever looks may be held up too
WORKING = 0.1  #: of one processor: more than what a node takes that only waits
LINGER_S = 5.0  #: work in hand for this long is shown
#: seconds that a node has to end after each of these signals, not counting those that it works
ENDS = ((signal.SIGINT, 20.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))
#: of a node's diagnostics: what stands still while it does nothing
COUNTERS = (
    'lifecycle', 'ready', 'received', 'processed', 'dropped', 'refused', 'faults', 'poses',
    'windows', 'steps', 'verdicts', 'model_version',
)


class ReplayError(RuntimeError):
    """A node died or hangs, or nothing came out; the message says which and why."""


class Process:
    """One node's process, and what is known of its life."""

    def __init__(self, role: str, popen: subprocess.Popen) -> None:
        self.role, self.popen = role, popen
        self.says: dict[str, str] = {}  #: its newest diagnostics
        self.beats = 0  #: how often it has spoken
        self.idle = 0  #: how often in a row it has spoken since it did anything
        self.silent = 0.0  #: for how many seconds it has neither spoken nor worked
        self._heard = time.monotonic()
        self._looked, self._spent = self._heard, 0.0

    def heard(self, says: dict[str, str]) -> None:
        """Take note of what the node says of itself, once a second or more often."""
        before, self.says = self.says, says
        idle = float(says['busy_s']) < 1.0 and all(
            says.get(key) == before.get(key) for key in COUNTERS
        )
        self.idle = self.idle + 1 if idle else 0
        self.beats += 1
        self.silent, self._heard = 0.0, time.monotonic()

    def look(self, passed: float) -> None:
        """Count ``passed`` seconds as silent where the node neither speaks nor works."""
        if time.monotonic() - self._heard > SILENCE_S and not self.works():
            self.silent += passed

    def works(self) -> bool:
        """
        Return whether the process has worked since the last call, or waits for a processor.

        A thread that is ready to run, or waits for a disk, is not one that hangs, however little
        the machine lets it do.
        """
        spent, states = _seen(self.popen.pid)
        now = time.monotonic()
        worked = spent - self._spent > WORKING * (now - self._looked)
        self._spent, self._looked = spent, now
        return worked or bool({'R', 'D'} & states)

    def stopped(self) -> bool:
        """Return whether a signal has stopped it."""
        return 'T' in _seen(self.popen.pid)[1]

    def figure(self, key: str) -> float:
        """Return a number of its diagnostics, 0 where it has not said it."""
        return float(self.says.get(key, 0))


class Processes:
    """
    The processes of some nodes, and one judgement of whether they live.

    What counts are their own words, their processor time and their progress, never the clock
    alone: on a machine that has no time for them they are slow, not dead.
    """

    def __init__(self, logs: Path, domain: int) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.logs, self.domain, self.notes = logs, domain, list[str]()
        self.running: dict[str, Process] = {}
        self._environment = os.environ | {
            'ROS_DOMAIN_ID': str(domain), 'PYTHONUNBUFFERED': '1', 'OMP_NUM_THREADS': '1',
            'PYTHONPATH': os.pathsep.join(filter(None, (ROOT, os.environ.get('PYTHONPATH', '')))),
        }
        self._looked, self._rested = time.monotonic(), 0.0

    def start(self, role: str, values: Mapping[str, parameters.Value]) -> None:
        """Start a node with parameters; it ends with this process, however that ends."""
        words = [f'{name}:={parameters.yaml_scalar(value)}' for name, value in values.items()]
        with open(self.logs / f'{role}.log', 'wb') as log:
            popen = subprocess.Popen(
                [
                    *(sys.executable, '-m', 'imatching_ros.nodes.child', str(os.getpid()), role),
                    '--ros-args', *(part for word in words for part in ('-p', word)),
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=self._environment, start_new_session=True,
            )
        self.running[role] = Process(role, popen)

    def check(self, what: str) -> None:
        """
        Look whether all nodes live, several times a second while waiting for them.

        ``what`` says in an error what was being done. Raises ReplayError, which names the node,
        where one has ended or hangs.
        """
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, STEP_S), now
        for role, node in self.running.items():
            if (code := node.popen.poll()) is not None:
                raise ReplayError(
                    f'the {role} node ended with exit code {code}; the last line of '
                    f'{self.logs / role}.log is: {self._last_line(role)}'
                )
            node.look(passed)
            if (stuck := node.figure('stuck_s')) > PATIENCE_S:
                how = f'its work takes no processor time for {stuck:.0f} s'
                raise self._hangs(role, how, what)
            if node.silent > PATIENCE_S:
                how = (
                    'a signal has stopped it' if node.stopped()
                    else f'it says nothing and takes no processor time for {node.silent:.0f} s'
                )
                raise self._hangs(role, how, what)
        rest = min(node.idle for node in self.running.values())
        self._rested = self._rested + passed if rest else 0.0
        if self.idle() > PATIENCE_S:
            said = [
                f'{role} says: {node.says["message"]}' for role, node in self.running.items()
                if node.figure('waiting')
            ]
            raise ReplayError(
                f'no answer while {what}: no node has anything to do for {self.idle():.0f} s; '
                f'{"; ".join([*said, f"see {self.logs}"])}'
            )

    def rest(self) -> None:
        """Count anew from now for how long the nodes have had nothing to do."""
        self._rested = 0.0
        for node in self.running.values():
            node.idle = 0

    def idle(self) -> float:
        """Return for how many seconds, the nodes' and ours, none has had anything to do."""
        return min(self._rested, *(node.idle for node in self.running.values()))

    def count(self, role: str, *keys: str) -> int:
        """Return the sum of counters in a node's diagnostics; 0 where there is no such node."""
        node = self.running.get(role)
        return sum(int(node.figure(key)) for key in keys) if node else 0

    def waits_for(self) -> str:
        """Say what the nodes are at that keeps others waiting, or nothing."""
        for role, node in self.running.items():
            if node.says.get('ready') != 'true' or node.figure('busy_s') > LINGER_S:
                return f'{role}: {node.says.get("message", "starting")}'
        return ''

    def end(self) -> None:
        """End the nodes by SIGINT, and only where that does not help by more."""
        for stop, patience in ENDS:
            for node in self._left():
                node.popen.send_signal(stop)
                node.popen.send_signal(signal.SIGCONT)
            latest = time.monotonic() + 5 * patience
            while patience > 0 and time.monotonic() < latest and (left := self._left()):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    left[0].popen.wait(0.2)
                working = [node for node in left if node.works()]
                patience -= 0.0 if working else 0.2
        for role, node in self.running.items():
            if node.popen.returncode != 0:
                self.notes.append(f'the {role} node ended with exit code {node.popen.returncode}')

    def kill(self) -> None:
        """End the nodes at once."""
        for node in self._left():
            node.popen.kill()

    def _left(self) -> list[Process]:
        return [node for node in self.running.values() if node.popen.poll() is None]

    def _hangs(self, role: str, how: str, what: str) -> ReplayError:
        self.running[role].popen.kill()  # it would not end by itself
        log = self.logs / f'{role}.log'
        return ReplayError(f'the {role} node hangs: {how} while {what}; see {log}')

    def _last_line(self, role: str) -> str:
        text = (self.logs / f'{role}.log').read_text(errors='replace')
        return ([line for line in text.splitlines() if line.strip()] or ['nothing'])[-1]


def _seen(pid: int) -> tuple[float, set[str]]:
    """Return the processor time of a process, s, and the states of its threads: see proc(5)."""
    process, threads = Path(f'/proc/{pid}/stat'), Path(f'/proc/{pid}/task').glob('*/stat')
    ticks, states = 0, set()
    for stat in (process, *threads):
        with contextlib.suppress(OSError):  # it has ended
            fields = stat.read_text().rpartition(')')[2].split()
            states.add(fields[0])
            ticks = ticks or int(fields[11]) + int(fields[12])
    return ticks / os.sysconf('SC_CLK_TCK'), states
