"""Replay, over real nodes in real processes: nothing is lost, and nothing is left behind."""

import fcntl
import os
from pathlib import Path
import signal
import subprocess
import sys
import termios
import threading
import time

import pytest

pytest.importorskip('rclpy', reason="ROS 2's rclpy is not installed")

from imatching_ros.data.recording import open_recording  # noqa: E402,I100
from imatching_ros.data.synthetic import render_recording  # noqa: E402
from imatching_ros.nodes.worker import Worker  # noqa: E402
from imatching_ros.replay import processes, replay, ReplayError  # noqa: E402

ROOT = Path(__file__).parents[1]
FRAMES = 24


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('rendered') / 'room'
    return render_recording(folder, seed=1, frames=FRAMES, size=(160, 128), depth_every=FRAMES)


class Tapped:
    """A recording with something done before its images are played, or to them."""

    def __init__(self, folder, before=lambda number, message: None) -> None:
        self._recording, self._before = open_recording(folder), before

    def __getattr__(self, name):
        return getattr(self._recording, name)

    def __len__(self) -> int:
        return len(self._recording)

    def messages(self):
        number = 0
        for entry in self._recording.messages():
            if entry[1] == 'image':
                self._before(number, entry[-1])
                number += 1
            yield entry


def nodes_of(run_dir) -> dict[str, int]:
    """Return the process of each node that works for this run folder."""
    found = {}
    for file in Path('/proc').glob('[0-9]*/cmdline'):
        try:
            words = file.read_bytes().decode().split('\0')
        except OSError:  # it has ended
            continue
        if 'imatching_ros.nodes.child' in words and str(run_dir) in ' '.join(words):
            found[words[words.index('imatching_ros.nodes.child') + 2]] = int(file.parent.name)
    return found


def stop(run_dir, role, seconds) -> threading.Thread:
    """Hold a node up for some seconds."""

    def hold() -> None:
        process = nodes_of(run_dir)[role]
        os.kill(process, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(process, signal.SIGCONT)

    thread = threading.Thread(target=hold)
    thread.start()
    time.sleep(0.1)
    return thread


# Losslessness


def test_replay_loses_nothing_for_a_learner_that_is_held_up(folder, tmp_path):
    """Its queue has room for a quarter of what it is sent."""
    held = []

    def before(number, _) -> None:
        if number == 4:
            held.append(stop(tmp_path, 'learner', 4.0))

    result = replay(
        Tapped(folder, before), tmp_path, progress=False,
        node_parameters={'learner': {'queue_size': 16}},
    )
    held[0].join()
    assert (result.sent, result.matched, result.refused, result.dropped) == (FRAMES, FRAMES, 0, 0)
    assert result.notes == []
    says = result.diagnostics['learner']
    assert says['dropped'] == says['refused'] == says['waiting'] == '0'
    windows = int(result.diagnostics['bundle']['windows'])
    assert windows > 0
    # images, their correspondences, and three messages for each window
    assert int(says['processed']) == int(says['received']) == 2 * FRAMES + 3 * windows


def test_replay_counts_and_says_what_a_node_drops(folder, tmp_path, monkeypatch):
    """Played without looking at the learner, as it once was."""
    from imatching_ros.replay import feed

    monkeypatch.setattr(feed.Feed, '_room', lambda self: True)
    held = []

    def before(number, _) -> None:
        if number == 4:
            held.append(stop(tmp_path, 'learner', 4.0))

    result = replay(
        Tapped(folder, before), tmp_path, progress=False,
        node_parameters={'learner': {'queue_size': 4}},
    )
    held[0].join()
    dropped = int(result.diagnostics['learner']['dropped'])
    assert result.dropped == dropped > 0 and result.matched == FRAMES
    sentence = f'the learner node went without {dropped} of the messages it was sent'
    assert result.notes == [sentence]


# What cannot be matched


def spoiled(numbers):
    """Make these images what nothing can read."""

    def before(number, message) -> None:
        if number in numbers:
            message.data = message.data[:40]

    return before


def test_replay_counts_refused_images_and_says_why(folder, tmp_path):
    result = replay(
        Tapped(folder, spoiled({9, 10})), tmp_path, learn=False, progress=False
    )
    assert (result.sent, result.matched, result.refused, result.dropped) == (
        FRAMES, FRAMES - 2, 2, 0,
    )
    stamps = [stamp for stamp, _ in open_recording(folder)]
    assert result.frame_stamps.tolist() == stamps[:9] + stamps[11:]
    assert len(result.keyframe_stamps) and (tmp_path / 'trajectory.txt').is_file()
    (note,) = result.notes
    assert note.startswith(f'the matcher refused 2 of {FRAMES} images; the last: ')
    assert note.endswith(result.diagnostics['matcher']['last_error'])


def test_replay_of_what_cannot_be_matched_ends_with_the_matchers_sentence(folder, tmp_path):
    with pytest.raises(ReplayError) as error:
        replay(
            Tapped(folder, spoiled(range(FRAMES))), tmp_path, learn=False, progress=False
        )
    sentence = str(error.value)
    assert sentence.startswith('no image could be matched: ')
    assert sentence.partition(': ')[2] in (tmp_path / 'logs' / 'matcher.log').read_text()
    assert nodes_of(tmp_path) == {}


# Slow, or dead


def test_a_starved_node_is_slow_and_not_dead(folder, tmp_path, monkeypatch):
    """One that runs for a twentieth of the time, as beside many others on a small machine."""
    monkeypatch.setattr(processes, 'PATIENCE_S', 3.0)
    over = threading.Event()

    def starve() -> None:
        process = nodes_of(tmp_path)['matcher']
        for _ in range(30):
            os.kill(process, signal.SIGSTOP)
            over.wait(0.38)
            os.kill(process, signal.SIGCONT)
            over.wait(0.02)

    thread = threading.Thread(target=starve)

    def before(number, _) -> None:
        if number == 4:
            thread.start()

    try:
        result = replay(Tapped(folder, before), tmp_path, learn=False, progress=False)
    finally:
        over.set()
        thread.join()
    assert (result.matched, result.dropped, result.notes) == (FRAMES, 0, [])


@pytest.mark.parametrize('role', ['matcher', 'bundle', 'learner'])
def test_fault_a_node_whose_work_hangs_is_named(folder, tmp_path, monkeypatch, role):
    """Its fifth message meets a lock that nobody opens."""
    (tmp_path / 'sitecustomize.py').write_text(
        'import sys\n'
        f'if {role!r} in sys.orig_argv:\n'
        '    import threading\n'
        '    from imatching_ros.nodes.worker import Worker\n'
        '    put, count = Worker.put, iter(range(10**9))\n'
        '    def put_and_hang(self, item):\n'
        '        if next(count) == 4:\n'
        '            self.post(threading.Event().wait)\n'
        '        put(self, item)\n'
        '    Worker.put = put_and_hang\n'
    )
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setattr(processes, 'PATIENCE_S', 3.0)
    with pytest.raises(ReplayError, match=f'the {role} node hangs: its work takes no processor'):
        replay(
            open_recording(folder), tmp_path / 'run', progress=False,
            node_parameters={'learner': {'queue_size': 8}},
        )
    assert nodes_of(tmp_path) == {}


def test_fault_a_stopped_node_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, 'PATIENCE_S', 3.0)

    def before(number, _) -> None:
        if number == 4:
            os.kill(nodes_of(tmp_path)['bundle'], signal.SIGSTOP)

    with pytest.raises(ReplayError, match='the bundle node hangs: a signal has stopped it while'):
        replay(Tapped(folder, before), tmp_path, learn=False, progress=False)
    assert nodes_of(tmp_path) == {}


def test_a_process_that_works_is_told_from_one_that_waits():
    """By what the system says of it: it need not say anything itself."""
    for code, works in (('while True: pass', True), ('import time; time.sleep(60)', False)):
        popen = subprocess.Popen([sys.executable, '-c', f'print(flush=True)\n{code}'], stdout=-1)
        try:
            popen.stdout.readline()
            node, looks = processes.Process('one', popen), []
            for _ in range(20):
                time.sleep(0.1)
                looks.append(node.works())
            assert looks[5:].count(works) > 12, (code, looks)
        finally:
            popen.kill()
            popen.wait()
            popen.stdout.close()


def test_a_worker_tells_work_from_a_lock():
    def spin() -> None:
        while not free.is_set():
            pass

    free = threading.Event()
    for work, stuck in ((free.wait, True), (spin, False)):
        free.clear()
        worker = Worker(lambda item: None, lambda: True, print, 3, print)
        worker.start()
        done = worker.request(work)
        while not worker.busy():
            time.sleep(0.01)
        worker.check_progress()
        for _ in range(3):
            time.sleep(0.2)
            worker.check_progress()
        assert (worker.stuck > 0) == stuck, worker.stuck
        free.set()
        done.result(10)
        worker.stop()
        worker.check_progress()
        assert worker.stuck == 0


# The end


def heed() -> None:
    """Heed signals that a shell has its jobs in the background ignore."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def begun(folder, run_dir, preexec_fn=heed, **options) -> subprocess.Popen:
    """Return the command, with its nodes at work."""
    process = subprocess.Popen(
        [
            *(sys.executable, '-m', 'imatching_ros.cli', 'replay', str(folder)),
            *('--learn-seconds', '60', '--out', str(run_dir)),
        ],
        env=os.environ | {'PYTHONPATH': str(ROOT)}, start_new_session=True,
        preexec_fn=preexec_fn, **options,
    )
    logs = run_dir / 'logs'
    while not all('ready' in read(logs / f'{role}.log') for role in ('matcher', 'learner')):
        assert process.poll() is None, process.returncode
        time.sleep(0.1)
    assert set(nodes_of(run_dir)) == {'matcher', 'bundle', 'learner'}
    return process


def read(path) -> str:
    return path.read_text() if path.is_file() else ''


@pytest.mark.parametrize(
    ('number', 'code'),
    [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGKILL, -9)],
)
def test_a_signal_that_ends_replay_ends_its_nodes(folder, tmp_path, number, code):
    process = begun(folder, tmp_path / 'run', stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.send_signal(number)
    said = process.communicate(timeout=60)[0].decode()
    assert process.returncode == code and 'Traceback' not in said, said
    while number == signal.SIGKILL and nodes_of(tmp_path):  # by then nobody waits for them
        time.sleep(0.1)
    assert nodes_of(tmp_path) == {}
    assert list((tmp_path / 'run' / 'weights').glob('version_*.safetensors'))


def test_a_terminal_that_closes_ends_replay_and_its_nodes(folder, tmp_path):
    ours, theirs = os.openpty()
    process = begun(
        folder, tmp_path / 'run', stdin=theirs, stdout=theirs, stderr=theirs,
        preexec_fn=lambda: (heed(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
    )
    os.close(theirs)
    os.close(ours)
    assert process.wait(60) == 129
    assert nodes_of(tmp_path) == {}
