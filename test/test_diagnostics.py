"""What a node counts of itself and says: percentiles, shares, rates, warnings, and how often."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip('rclpy', reason="ROS 2's rclpy is not installed")

from imatching_ros import kernels  # noqa: E402,I100
from imatching_ros.nodes import condition, diagnostics, reporter  # noqa: E402
from imatching_ros.nodes.condition import Condition  # noqa: E402
from imatching_ros.nodes.diagnostics import (  # noqa: E402
    ERROR,
    Health,
    OK,
    peak_memory_mb,
    percentiles,
    Share,
    WARN,
)
from imatching_ros.nodes.reporter import Reporter  # noqa: E402


class Hands:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    hands = Hands()
    for module in (condition, diagnostics, reporter):
        monkeypatch.setattr(module, 'time', hands)
    return hands


def test_percentiles_are_numpys():
    values = np.random.default_rng(0).exponential(10.0, 57).tolist()
    assert percentiles(values) == pytest.approx(np.percentile(values, (50, 95)))
    assert percentiles([3.0]) == (3.0, 3.0)
    assert np.isnan(percentiles([])).all()


def test_a_share_is_of_the_last_minute(clock):
    share = Share()
    assert share.value() == 0.0
    clock.now += 10.0
    share.add(4.0)
    assert share.value() == pytest.approx(0.4)  # of the ten seconds that there are
    clock.now += 90.0
    share.add(15.0)
    assert share.value() == pytest.approx(0.25)  # of a minute; what is older is forgotten
    share.add(100.0)
    assert share.value() == 1.0


def test_health_counts_times_and_rates(clock):
    health = Health()
    assert health.values()['rate_hz'] == 0.0 and np.isnan(health.values()['latency_p50_ms'])
    for k in range(30):  # ten a second
        clock.now += 0.1
        health.done(0.001 * k)
    says = health.values()
    assert says['processed'] == 30 and says['rate_hz'] == pytest.approx(10.0)
    expected = np.percentile(np.arange(30), (50, 95))
    assert (says['latency_p50_ms'], says['latency_p95_ms']) == pytest.approx(tuple(expected))
    clock.now += 10.0  # nothing comes any more
    assert health.values()['rate_hz'] == 0.0


def test_health_warns_of_a_fault_until_it_has_been_said():
    health = Health()
    assert health.level('') == (OK, 'running')
    health.fault('one')
    health.fault('two')
    assert health.level('') == (WARN, 'two') and health.level('no camera') == (ERROR, 'no camera')
    before = health.faults
    health.fault('three')  # while the second one is being said
    health.said(before)
    assert health.level('') == (WARN, 'three') and health.faults == 3
    health.said(health.faults)
    assert health.level('') == (OK, 'running') and health.last_error == 'three'


def test_peak_memory_is_of_this_process_and_not_of_its_parent():
    """Linux hands a parent's on with the process."""
    held = np.ones(40_000_000)  # 320 MB
    code = 'from imatching_ros.nodes.diagnostics import peak_memory_mb; print(peak_memory_mb())'
    said = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True)
    assert peak_memory_mb() > held.nbytes / 2**20 > 250 > float(said.stdout) > 1


class Spoken:
    """A node's log and topic, of which all is kept."""

    def __init__(self, ok: bool = True) -> None:
        self.logged, self.published = [], []
        self.context = SimpleNamespace(ok=lambda: ok)

    def get_logger(self):
        return SimpleNamespace(error=lambda text, **_: self.logged.append(text))

    def create_publisher(self, kind, topic, depth):
        assert topic == '/diagnostics'
        return SimpleNamespace(publish=self.published.append)

    def get_fully_qualified_name(self) -> str:
        return '/robot/matcher'

    def get_clock(self):
        from builtin_interfaces.msg import Time

        return SimpleNamespace(now=lambda: SimpleNamespace(to_msg=lambda: Time(sec=7)))


def test_a_sentence_goes_to_the_log_again_only_after_a_while(clock):
    node, health = Spoken(), Health()
    said = Reporter(node, health, lambda: (OK, '', {}), at_once=False)
    for wait in (0.0, 4.9, 0.2, 1.0):
        clock.now += wait
        said.fault('the clock went back')
    assert node.logged == ['the clock went back'] * 2 and health.faults == 4
    said.fault('another')
    said.fault('the clock went back')
    assert node.logged[2:] == ['another', 'the clock went back']
    said.fault('word ' * 1000)
    assert len(node.logged[-1]) <= reporter.SENTENCE and said.last == node.logged[-1]
    assert not node.published


@pytest.mark.parametrize('at_once', [False, True])
def test_what_was_to_be_expected_is_one_sentence_the_rest_has_its_traceback(clock, at_once):
    node, health = Spoken(), Health()
    says = (WARN, 'odd', {'shift': 0.5})
    said = Reporter(node, health, lambda: says, at_once)
    for error in (ValueError('no image'), OSError('no disk')):
        said.failed(error)
        assert node.logged[-1] == health.last_error == str(error)
    said.failed(KeyError('x'))
    assert health.last_error == "unexpected KeyError: 'x'" and 'KeyError' in node.logged[-1]
    assert len(node.logged) == 4 and len(node.published) == 3 * at_once
    for array in node.published:
        (status,) = array.status
        assert (array.header.stamp.sec, status.name, status.level) == (7, '/robot/matcher', b'\1')
        assert [(pair.key, pair.value) for pair in status.values] == [('shift', '0.5')]


def test_nothing_is_said_of_what_fails_after_the_end():
    node, health = Spoken(ok=False), Health()
    Reporter(node, health, lambda: (OK, '', {}), at_once=True).failed(ValueError('no publisher'))
    assert not node.logged and not node.published and health.faults == 0


class Idle:
    """A worker without work."""

    stuck = 0.0
    took = 0.0

    def busy(self) -> float:
        return self.took

    def waiting(self) -> int:
        return 3


@pytest.fixture
def node(clock, monkeypatch):
    """Return an active node that has just heard something, its kernels ready."""
    monkeypatch.setattr(kernels, '_state', '')
    node = SimpleNamespace(
        state='active', refusal='', worker=Idle(), health=Health(), feed='image',
        blocker=lambda: '', values=lambda: {'own': 1}, resolve_topic_name=lambda name: f'/{name}',
        endpoints=SimpleNamespace(listeners=lambda: {'weights': 2}),
    )
    node.condition = Condition(node)
    node.warning = node.condition.warning
    node.condition.prepared = True
    node.condition.heard()
    return node


def test_an_active_node_warns_of_silence_and_of_work_that_takes_long(node, clock):
    level, text, values = node.condition.describe()
    assert (level, text) == (OK, 'running')
    assert (values['waiting'], values['weights_listeners'], values['own']) == (3, 2, 1)
    assert values['ready'] is True and values['lifecycle'] == 'active'
    clock.now += 2.5
    silent = (WARN, 'nothing has come on /image for 2 s')
    assert node.condition.describe()[:2] == silent
    node.worker.took = 21.0
    assert node.condition.describe()[:2] == (WARN, 'one piece of work has taken 21 s so far')
    node.worker.stuck = 20.5
    sentence = 'the node hangs: its work has taken no processor time for 20 s'
    assert node.condition.describe()[:2] == (WARN, sentence)
    assert node.condition.describe()[2]['stuck_s'] == 20.5
    node.worker = Idle()
    node.condition.heard()
    assert node.condition.describe()[:2] == (OK, 'running')


def test_what_is_wrong_comes_before_what_is_odd(node, clock, monkeypatch):
    clock.now += 5.0
    node.health.fault('an older stamp')
    assert node.condition.describe()[:2] == (WARN, 'an older stamp')
    node.blocker = lambda: 'no camera_info'
    assert node.condition.describe()[:2] == (ERROR, 'no camera_info')
    node.state = 'inactive'
    assert node.condition.describe()[:2] == (OK, 'inactive')
    node.refusal = 'no such file'
    assert node.condition.describe()[:2] == (ERROR, 'inactive: no such file')
    node.condition.forget()
    node.worker.stuck = 30.0  # it waits for another process that compiles
    level, text, values = node.condition.describe()
    assert (level, text, values['stuck_s']) == (WARN, 'getting ready', 0.0)
    monkeypatch.setattr(kernels, '_state', 'compiling')
    assert node.condition.describe()[1] == 'compiling'
    node.worker = None
    assert node.condition.describe()[2]['busy_s'] == 0.0


def test_a_warning_of_the_kernels_stands_beside_that_of_the_node(node, clock, monkeypatch):
    monkeypatch.setattr(kernels, '_state', 'numba cannot be imported')
    assert node.condition.describe()[:2] == (WARN, 'numba cannot be imported')
    clock.now += 3.0
    expected = 'nothing has come on /image for 3 s; numba cannot be imported'
    assert node.condition.describe()[1] == expected


def test_the_kernels_are_prepared_with_what_they_wait_for_in_the_log(node, monkeypatch):
    log = []
    node.get_logger = lambda: SimpleNamespace(info=log.append, warning=log.append)
    node.condition.forget()

    def prepare(say) -> None:
        for done in (0, 1, 2):
            monkeypatch.setattr(kernels, '_state', f'compiling {done}')
            say(done, 2, 'name')
        monkeypatch.setattr(kernels, '_state', 'no folder can be written')

    monkeypatch.setattr(kernels, 'prepare', prepare)
    node.condition.prepare()
    assert node.condition.prepared
    assert log == ['compiling 0', 'compiling 1', 'no folder can be written', 'ready']

    def broken(say) -> None:
        raise RuntimeError('a kernel does not compile')

    node.condition.forget()
    monkeypatch.setattr(kernels, 'prepare', broken)
    with pytest.raises(RuntimeError):
        node.condition.prepare()
    assert node.condition.prepared  # the rest can still be seen to fail, one by one
