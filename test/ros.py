"""
What the tests of the nodes share.

Node processes in a ROS domain of their own, and pictures for them.
"""

import contextlib
import os
from pathlib import Path
import signal
import subprocess
import sys
import threading
import time

import cv2
from diagnostic_msgs.msg import DiagnosticArray
from imatching_ros.geometry.camera import Camera
from imatching_ros.nodes import parameters
from imatching_ros.nodes.images import image_to_message
from imatching_ros.nodes.qos import lossless
from imatching_ros.nodes.stamps import to_header
from imatching_ros.replay.domain import free_domain, LOCALHOST, PATIENT
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
import numpy as np
import rclpy
from rclpy.context import Context
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import Image

ROOT = Path(__file__).parents[1]
CAMERA = Camera(160, 120, 130.0, 130.0, 79.5, 59.5)
SECOND = 10**9
START = 1_700_000_000 * SECOND


class Ros:
    """
    One ROS domain: node processes, and a node in this process that talks to them.

    ``stops``: a process will be stopped and goes on, so that they do not talk through shared
    memory: one may be stopped within a lock there. Whoever sends then waits for it, a second each
    time, and gives up its port, with what is in it, however reliable the topic.
    """

    def __init__(self, logs: Path, stops: bool = False) -> None:
        self.logs, self.stack = logs, contextlib.ExitStack()
        self.domain = self.stack.enter_context(free_domain())
        self.processes: dict[str, subprocess.Popen] = {}
        self.heard: dict[str, list] = {}
        self.changed = threading.Condition()
        os.environ.update([LOCALHOST])
        self.settings = {
            'ROS_DOMAIN_ID': str(self.domain), 'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1',
            # a ROS installation is itself on this path
            'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
        }
        if stops:
            (logs / 'patient.xml').write_text(PATIENT)
            for name in ('FASTDDS_DEFAULT_PROFILES_FILE', 'FASTRTPS_DEFAULT_PROFILES_FILE'):
                self.settings[name] = str(logs / 'patient.xml')
            self.settings |= {
                'ROS_AUTOMATIC_DISCOVERY_RANGE': 'SYSTEM_DEFAULT', 'ROS_LOCALHOST_ONLY': '0',
            }
        self.context = Context()
        rclpy.init(
            args=[], context=self.context, domain_id=self.domain,
            signal_handler_options=SignalHandlerOptions.NO,
        )
        self.node = rclpy.create_node('tester', context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.thread = threading.Thread(target=self._spin, daemon=True)
        self.thread.start()
        self.listen(DiagnosticArray, '/diagnostics', lossless())

    def _spin(self) -> None:
        with contextlib.suppress(ExternalShutdownException):
            self.executor.spin()

    def close(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        self.executor.shutdown()
        self.thread.join()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)
        self.stack.close()

    def start(self, role: str, **values) -> subprocess.Popen:
        words = [w for k, v in values.items() for w in ('-p', f'{k}:={parameters.yaml_scalar(v)}')]
        with open(self.logs / f'{role}.log', 'wb') as log:
            self.processes[role] = subprocess.Popen(
                [sys.executable, '-m', f'imatching_ros.nodes.{role}', '--ros-args', *words],
                stdout=log, stderr=subprocess.STDOUT, env=os.environ | self.settings,
                start_new_session=True, cwd=self.logs,
            )
        return self.processes[role]

    def end(self, role: str) -> None:
        """SIGINT, and exit code 0."""
        process = self.processes.pop(role)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0, self.log(role)
        self.forget(role)

    def kill(self, role: str) -> None:
        """Send SIGKILL."""
        process = self.processes.pop(role)
        process.kill()
        process.wait(30)
        self.forget(role)

    def forget(self, role: str) -> None:
        """Return what its diagnostics said so far."""
        for array in self.heard['/diagnostics']:
            array.status = [status for status in array.status if status.name != f'/{role}']

    def log(self, role: str) -> str:
        """Return what a process said; nothing where that is not kept."""
        path = self.logs / f'{role}.log'
        return path.read_text() if path.is_file() else ''

    def listen(self, kind, topic, qos) -> list:
        """Return what has come on a topic so far, and will."""
        heard = self.heard.setdefault(topic, [])

        def callback(message) -> None:
            with self.changed:
                heard.append(message)
                self.changed.notify_all()

        self.node.create_subscription(kind, topic, callback, qos)
        return heard

    def wait(self, condition, timeout=150.0):
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            with self.changed:
                if result := condition():
                    return result
                self.changed.wait(0.1)
            for role, process in self.processes.items():
                assert process.poll() is None, (
                    f'{role} ended with {process.returncode}: {self.log(role)}'
                )
        said = {role: (self.says(role), self.log(role)) for role in self.processes}
        raise AssertionError(f'waited {timeout} s in vain; diagnostics and logs: {said}')

    def connect(self, publisher, subscribers=1) -> None:
        self.wait(lambda: publisher.get_subscription_count() >= subscribers)

    def says(self, role: str) -> dict[str, str]:
        """Return the newest diagnostics of a node."""
        for array in reversed(self.heard['/diagnostics']):
            for status in array.status:
                if status.name == f'/{role}':
                    values = {pair.key: pair.value for pair in status.values}
                    return values | {'level': status.level[0], 'message': status.message}
        return {}

    def call(self, kind, name, request=None):
        client = self.node.create_client(kind, name)
        assert client.wait_for_service(30.0), name
        future = client.call_async(request or kind.Request())
        self.wait(future.done)
        self.node.destroy_client(client)
        return future.result()

    def change(self, role: str, transition: str) -> bool:
        """One transition of a node's life cycle, by its label; whether the node made it."""
        request = ChangeState.Request(transition=Transition(label=transition))
        return self.call(ChangeState, f'{role}/change_state', request).success

    def state(self, role: str) -> str:
        return self.call(GetState, f'{role}/get_state').current_state.label


def picture(shift: float = 0.0) -> np.ndarray:
    """Return a smooth random texture, moved to the left."""
    coarse = np.random.default_rng(0).uniform(0, 255, (16, 60)).astype(np.float32)
    wide = cv2.resize(coarse, (480, 128), interpolation=cv2.INTER_CUBIC)
    move = np.array([[1, 0, -shift], [0, 1, 0]], np.float32)
    return cv2.warpAffine(wide, move, (160, 120)).clip(0, 255).astype(np.uint8)


def image_message(stamp: int, image: np.ndarray) -> Image:
    return image_to_message(image, to_header(stamp, 'camera_optical'))
