"""
The nodes under load: images at a camera's pace, in real processes, for as long as asked.

    python benchmarks/nodes.py [--seconds 300] [--rate 30] [--threads 1] [--composed] [--json FILE]

A rendered 640x480 recording goes to and fro at ``--rate``. ``latency`` is from an image's
publication to the arrival of its correspondences here, so it holds both ways through the
middleware. ``dropped`` are images that a node says it dropped by its policy, ``lost`` those that
no node ever saw. Memory is the highest resident size in the second tenth of the time (what is made
once is no leak), in the tenth of its middle, in its last tenth, and in all; ``cpu_percent`` is of
one core. The peer in the same run is OpenCV's good features and pyramidal KLT, forward and
backward, as a node of its own that publishes the tracks it found: it neither learns nor solves, so
its row says what images, middleware and classical tracking cost.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import tempfile
import threading
import time

os.environ['OMP_NUM_THREADS'] = '1'
os.environ['ROS_AUTOMATIC_DISCOVERY_RANGE'] = 'LOCALHOST'

import cv2  # noqa: E402
from diagnostic_msgs.msg import DiagnosticArray  # noqa: E402
from imatching_ros.data.recording import open_recording  # noqa: E402
from imatching_ros.data.synthetic import render_recording  # noqa: E402
from imatching_ros.nodes.clouds import CORRESPONDENCE, rows_to_cloud  # noqa: E402
from imatching_ros.nodes.diagnostics import percentiles  # noqa: E402
from imatching_ros.nodes.images import (  # noqa: E402
    camera_to_info,
    image_from_message,
    image_to_message,
)
from imatching_ros.nodes.qos import lossless  # noqa: E402
from imatching_ros.nodes.stamps import to_header, to_ns  # noqa: E402
from imatching_ros.replay.domain import free_domain  # noqa: E402
import numpy as np  # noqa: E402
import rclpy  # noqa: E402
from rclpy.context import Context  # noqa: E402
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor  # noqa: E402
from rclpy.qos import qos_profile_sensor_data, QoSProfile  # noqa: E402
from rclpy.signals import SignalHandlerOptions  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from sensor_msgs.msg import CameraInfo, Image, PointCloud2  # noqa: E402

ROOT = Path(__file__).parents[1]
START_NS = 1_700_000_000 * 10**9
PEER = 'OpenCV GFTT+KLT'
WHEN = {'start': 0.1, 'middle': 0.5, 'end': 0.9}  #: where a tenth of the time begins
#: Case, processing_mode, roles
CASES = (
    ('matcher and bundle, latest', 'latest', ('matcher', 'bundle')),
    ('matcher and bundle, all', 'all', ('matcher', 'bundle')),
    ('with learner, latest', 'latest', ('matcher', 'bundle', 'learner')),
    (PEER, 'latest', ('peer',)),
)


class Load:
    """Node processes in a domain of their own, and the camera that loads them."""

    def __init__(
        self, roles: tuple[str, ...], mode: str, composed: bool, threads: int, folder: Path
    ) -> None:
        self.stack, self.roles = contextlib.ExitStack(), roles
        self.domain = self.stack.enter_context(free_domain())
        self.processes: dict[str, subprocess.Popen] = {}
        lossless_input = mode == 'all'
        values = [
            f'image_qos:={"keep_all" if lossless_input else "sensor_data"}',
            f'processing_mode:={mode}', f'matcher:threads:={threads}',
        ]
        environment = os.environ | {'ROS_DOMAIN_ID': str(self.domain), 'PYTHONPATH': str(ROOT)}
        commands = {role: ['-m', f'imatching_ros.nodes.{role}'] for role in roles}
        if roles == ('peer',):
            commands = {'peer': [__file__, '--peer']}
        elif composed:
            values.append(f'nodes:=[{",".join(roles)}]')
            commands = {'composed': ['-m', 'imatching_ros.nodes.composed']}
        words = (
            []
            if roles == ('peer',)
            else ['--ros-args', *(w for value in values for w in ('-p', value))]
        )
        for name, command in commands.items():
            with open(folder / f'{name}.log', 'wb') as log:
                self.processes[name] = subprocess.Popen(
                    [sys.executable, *command, *words],
                    env=environment,
                    stdout=log,
                    stderr=log,
                    cwd=folder,
                )
        self.context = Context()
        rclpy.init(
            args=[], context=self.context, domain_id=self.domain,
            signal_handler_options=SignalHandlerOptions.NO,
        )
        self.node = rclpy.create_node('camera', context=self.context)
        qos = lossless() if lossless_input else qos_profile_sensor_data
        self.images = self.node.create_publisher(Image, 'image', qos)
        self.infos = self.node.create_publisher(CameraInfo, 'camera_info', qos)
        self.sent: dict[int, float] = {}
        self.latency_ms: list[float] = []
        self.says: dict[str, dict[str, str]] = {}
        self.node.create_subscription(PointCloud2, 'correspondences', self._on_answer, lossless())
        self.node.create_subscription(DiagnosticArray, '/diagnostics', self._on_diagnostics, 100)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.thread = threading.Thread(target=self._spin)
        self.thread.start()

    def _spin(self) -> None:
        with contextlib.suppress(ExternalShutdownException):
            self.executor.spin()

    def _on_answer(self, message: PointCloud2) -> None:
        begun = self.sent.pop(to_ns(message.header.stamp), None)
        if begun is not None:
            self.latency_ms.append((time.monotonic() - begun) * 1e3)

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            self.says[status.name.strip('/')] = {pair.key: pair.value for pair in status.values}

    def count(self, key: str) -> int:
        return int(self.says.get('matcher', {}).get(key, 0)) if 'matcher' in self.roles else 0

    def _owing(self) -> int:
        """Images that the matcher has and has not dealt with."""
        return (
            self.count('received')
            - len(self.latency_ms)
            - self.count('dropped')
            - self.count('refused')
        )

    def run(self, recording, rate_hz: float, seconds: float) -> dict[str, float | int]:
        """Play for ``seconds``, and counts. RuntimeError where a node ends."""
        pictures = [image for _, image in recording]
        order = itertools.cycle([*range(len(pictures)), *range(len(pictures) - 2, 0, -1)])
        info = camera_to_info(recording.camera, to_header(0, 'camera'))
        patience = time.monotonic() + 180
        while self.images.get_subscription_count() < len(
            {'matcher', 'learner', 'peer'} & {*self.roles}
        ):
            self._check(patience)
        while self.roles != ('peer',) and (
            set(self.says) < set(self.roles)
            or self.infos.get_subscription_count() < len(self.roles)
        ):
            self._check(patience)
        time.sleep(0.5)
        self.infos.publish(info)
        frames, begun, used = 0, time.monotonic(), self._cpu_seconds()
        memory: list[tuple[float, dict[str, float]]] = []  # by the share of the time that is over
        while (now := time.monotonic()) < begun + seconds:
            if (now - begun) / seconds > 0.01 * len(memory):
                memory.append(((now - begun) / seconds, self._memory_mb('VmRSS')))
            due = begun + frames / rate_hz
            if now < due:
                time.sleep(min(due - now, 0.01))
                continue
            if frames % round(rate_hz) == 0:
                self.infos.publish(info)
                self._check(float('inf'))
            stamp = START_NS + round(frames * 1e9 / rate_hz)
            self.sent[stamp] = time.monotonic()
            self.images.publish(
                image_to_message(pictures[next(order)], to_header(stamp, 'camera'))
            )
            frames += 1
        played = time.monotonic() - begun
        used = (self._cpu_seconds() - used) / played
        # one more second of diagnostics, and what is still on its way
        quiet = time.monotonic() + 2.5
        while (now := time.monotonic()) < quiet or (self._owing() > 0 and now < quiet + 120):
            time.sleep(0.1)
        received = self.count('received') if 'matcher' in self.roles else len(self.latency_ms)
        p50, p95 = percentiles(self.latency_ms)

        def highest(tenth: float) -> dict[str, float]:
            looks = [mb for when, mb in memory if tenth <= when < tenth + 0.1]
            return {name: max(mb[name] for mb in looks) for name in self.processes}

        return {
            'rate_hz': frames / played, 'seconds': played, 'frames_in': frames,
            'frames_out': len(self.latency_ms),
            'dropped': self.count('dropped'), 'refused': self.count('refused'),
            'lost': frames - received,
            'latency_p50_ms': p50, 'latency_p95_ms': p95,
            **{f'memory_mb_{when}': highest(tenth) for when, tenth in WHEN.items()},
            'memory_mb_peak': self._memory_mb('VmHWM'), 'cpu_percent': 100 * used,
        }

    def close(self) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGINT)
        for process in self.processes.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
        self.executor.shutdown()
        self.thread.join()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)
        self.stack.close()

    def _check(self, patience: float) -> None:
        for name, process in self.processes.items():
            if process.poll() is not None:
                raise RuntimeError(f'{name} ended with exit code {process.returncode}')
        if time.monotonic() > patience:
            raise RuntimeError('the nodes did not find each other')
        if patience != float('inf'):
            time.sleep(0.1)

    def _memory_mb(self, field: str) -> dict[str, float]:
        def read(process: subprocess.Popen) -> float:
            lines = open(f'/proc/{process.pid}/status').read().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

        return {name: read(process) for name, process in self.processes.items()}

    def _cpu_seconds(self) -> float:
        def read(process: subprocess.Popen) -> float:
            fields = open(f'/proc/{process.pid}/stat').read().rpartition(')')[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')

        return sum(map(read, self.processes.values()))


def peer() -> None:
    """Return a node that tracks good features by KLT and publishes where they are."""
    cv2.setNumThreads(1)
    rclpy.init()
    node = rclpy.create_node('peer')
    publisher = node.create_publisher(PointCloud2, 'correspondences', QoSProfile(depth=10))
    last: list = [None, np.empty((0, 1, 2), np.float32)]

    def track(message: Image) -> None:
        grey, (previous, points) = image_from_message(message), last
        if len(points):
            there, found, _ = cv2.calcOpticalFlowPyrLK(previous, grey, points, None)
            back, again, _ = cv2.calcOpticalFlowPyrLK(grey, previous, there, None)
            near = np.linalg.norm(back - points, axis=-1)[:, 0] < 1
            points = there[(found[:, 0] > 0) & (again[:, 0] > 0) & near]
        if len(points) < 300:
            points = cv2.goodFeaturesToTrack(grey, 600, 0.01, 8)
            points = np.empty((0, 1, 2), np.float32) if points is None else points
        last[:] = grey, points
        rows = np.zeros(len(points), CORRESPONDENCE)
        rows['u'], rows['v'] = points[:, 0].T
        publisher.publish(rows_to_cloud(rows, message.header))

    node.create_subscription(Image, 'image', track, qos_profile_sensor_data)
    with contextlib.suppress(KeyboardInterrupt, ExternalShutdownException):
        rclpy.spin(node)


def show(rows: list[dict], threads: int) -> None:
    title = f'{os.cpu_count()} cores; threads of the matcher: {threads}, of any other node: 1'
    table = Table(title=title)
    names = (
        'case', 'in', 'out', 'dropped', 'lost', 'p50 ms', 'p95 ms',
        *(f'MB {when}' for when in (*WHEN, 'peak')), 'CPU %',
    )
    for index, name in enumerate(names):
        table.add_column(name, justify='right' if index else 'left')
    for row in rows:
        memory = [row[f'memory_mb_{when}'].values() for when in (*WHEN, 'peak')]
        table.add_row(
            row['case'], *(str(row[key])
                           for key in ('frames_in', 'frames_out', 'dropped', 'lost')),
            f"{row['latency_p50_ms']:.1f}", f"{row['latency_p95_ms']:.1f}",
            *(' '.join(f'{mb:.0f}' for mb in of_each) for of_each in memory),
            f"{row['cpu_percent']:.0f}",
        )
    Console(width=150).print(table)


def measure(
    case: str,
    mode: str,
    roles: tuple[str, ...],
    recording,
    rate: float,
    seconds: float,
    composed: bool,
    threads: int = 1,
) -> dict:
    """One row of the report."""
    with tempfile.TemporaryDirectory() as folder:
        load = Load(roles, mode, composed, threads, Path(folder))
        try:
            figures = load.run(recording, rate, seconds)
        finally:
            load.close()
    return {
        'case': case, 'mode': mode, 'learning': 'learner' in roles, 'composed': composed,
        'matcher_threads': threads, **figures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument(
        '--seconds', type=float, default=300.0, help='that each case is played (default: 300)'
    )
    parser.add_argument('--rate', type=float, default=30.0, help='images per second (default: 30)')
    parser.add_argument('--threads', type=int, default=1, help='of the matcher (default: 1)')
    parser.add_argument('--composed', action='store_true', help='all nodes in one process')
    parser.add_argument(
        '--case', action='append', choices=[case for case, _, _ in CASES], help='may be repeated'
    )
    parser.add_argument('--json', type=Path, help='write all rows to this file')
    parser.add_argument('--peer', action='store_true', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        return peer()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        recording = open_recording(
            render_recording(Path(folder) / 'room', frames=90, rate_hz=30.0, depth_every=1000)
        )
        for case, mode, roles in CASES:
            if not options.case or case in options.case:
                composed = options.composed and roles != ('peer',)
                rows.append(
                    measure(
                        case, mode, roles, recording, options.rate, options.seconds, composed,
                        options.threads,
                    )
                )
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1) + '\n')
    show(rows, options.threads)


if __name__ == '__main__':
    main()
