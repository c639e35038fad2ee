"""How a process of nodes ends: by whom, with which code, and what it says then."""

import os
from pathlib import Path
import subprocess
import sys

import pytest

pytest.importorskip('rclpy', reason="ROS 2's rclpy is not installed")

from imatching_ros.replay.domain import free_domain, LOCALHOST  # noqa: E402,I100

ROOT = Path(__file__).parents[1]
SCRIPT = """
import os, signal, sys
from imatching_ros.nodes.process import run_ros, spin_nodes
from rclpy.node import Node

class Small(Node):
    role, autostart, ends = 'small', False, True

    def __init__(self, **options):
        super().__init__(self.role, **options)
        self.create_timer(0.01, self.work)

    def value(self, name):
        return self.autostart

    def start(self):
        raise ValueError('small: no such file')

    def work(self):
        pass

    def close(self):
        print('closed', self.role, flush=True)
        return self.ends

    def destroy_node(self):
        print('destroyed', self.role, flush=True)
        super().destroy_node()

class Other(Small):
    role = 'other'

def interrupt(self):
    os.kill(os.getpid(), signal.SIGINT)

def fail(self):
    raise KeyError('unforeseen')

{change}
run_ros(lambda stack: spin_nodes([Small, Other], stack), [])
"""
BOTH = ['closed other', 'closed small']


@pytest.fixture(scope='module')
def domain():
    with free_domain() as domain:
        yield str(domain)


def end(domain: str, change: str) -> tuple[int, list[str], str]:
    """
    Return how a process of two nodes ends with one change.

    Its exit code, which nodes were closed, and what is said on the error output.
    """
    environment = os.environ | dict([LOCALHOST]) | {
        'ROS_DOMAIN_ID': domain, 'PYTHONPATH': os.pathsep.join([str(ROOT), *sys.path]),
    }
    ended = subprocess.run(
        [sys.executable, '-c', SCRIPT.replace('{change}', change)], capture_output=True,
        text=True, env=environment, timeout=60,
    )
    said = ended.stdout.splitlines()
    closed = [line for line in said if line.startswith('closed')]
    if closed == BOTH:  # a node that is left behind is not
        assert {'destroyed small', 'destroyed other'} <= {*said}
    return ended.returncode, closed, ended.stderr


def test_a_signal_ends_all_nodes_the_last_first(domain):
    code, closed, errors = end(domain, 'Other.work = interrupt')
    assert (code, closed) == (0, BOTH) and 'Traceback' not in errors


def test_a_node_that_fails_ends_all_with_its_traceback(domain):
    for name in ('Small', 'Other'):
        code, closed, errors = end(domain, f'{name}.work = fail')
        assert (code, closed) == (1, BOTH) and "KeyError: 'unforeseen'" in errors


def test_a_node_that_refuses_to_start_ends_all_with_its_sentence(domain):
    code, closed, errors = end(domain, 'Small.autostart = True')
    assert (code, closed, errors) == (2, BOTH, 'small: no such file\n')


def test_an_error_that_nobody_thought_of_is_not_made_a_sentence(domain):
    code, closed, errors = end(domain, 'Small.autostart, Small.start = True, fail')
    assert (code, closed) == (1, BOTH) and errors.rstrip().endswith("KeyError: 'unforeseen'")


def test_a_node_whose_work_does_not_end_is_left_behind(domain):
    code, closed, errors = end(domain, 'Other.ends, Small.work = False, interrupt')
    assert (code, closed) == (1, ['closed other'])
    assert 'other: the work in hand does not end, so the process ends without it' in errors
