"""Images at a camera's pace through real processes, counted by the benchmark of the nodes."""

from dataclasses import replace
from pathlib import Path
import sys
import threading

import pytest

pytest.importorskip('rclpy', reason="ROS 2's rclpy is not installed")

from imatching_ros.data.recording import open_recording  # noqa: E402,I100
from imatching_ros.data.synthetic import render_recording  # noqa: E402
from imatching_ros.nodes import messages  # noqa: E402
from imatching_ros.nodes.learner import LearnerNode  # noqa: E402
from ros import picture  # noqa: E402
from test_fuzz import clouds, context, fed, head, SCENE, windows  # noqa: E402,F401

sys.path.insert(0, str(Path(__file__).parents[1] / 'benchmarks'))
import nodes  # noqa: E402,I100


@pytest.fixture(scope='module')
def room(tmp_path_factory):
    """At the size that is asked for: 640x480."""
    return open_recording(
        render_recording(tmp_path_factory.mktemp('room') / 'room', frames=20, depth_every=1000)
    )


@pytest.mark.parametrize('mode', ['latest', 'all'])
def test_load_every_image_is_answered_or_counted_as_dropped(room, mode):
    row = nodes.measure('test', mode, ('matcher', 'bundle'), room, 30.0, 5.0, False)
    assert row['frames_in'] == row['frames_out'] + row['dropped'] + row['refused'] + row['lost']
    assert row['frames_out'] > 0 and row['refused'] == 0
    if mode == 'all':  # on a slow machine the queue may be full, but nothing goes unseen
        assert row['lost'] == 0
    assert row['latency_p50_ms'] > 0
    for node, before in row['memory_mb_start'].items():
        assert row['memory_mb_end'][node] < before + 100, 'what a short run takes has an end'


@pytest.mark.parametrize('image_qos', ['sensor_data', 'keep_all'])
def test_load_windows_wait_for_steps_where_some_may_be_lost(fed, image_qos):  # noqa: F811
    """All come while the learner is held up: of a robot's it takes those that it begins with."""
    learner = fed(LearnerNode, image_qos=image_qos)
    learner.calibrate(SCENE)
    for frame, rows in enumerate(clouds()):
        learner.feed('image', messages.image_to_message(picture(1.5 * frame), head(frame)))
        learner.feed('correspondences', rows)
    learner.drain()
    inputs = learner.node.core.inputs
    inputs.options = replace(inputs.options, new_keyframes=1)
    held, parts = threading.Event(), windows()
    learner.node.worker.request(held.wait)
    for messages_of_one in zip(*parts.values(), strict=True):
        for part, message in zip(parts, messages_of_one, strict=True):
            learner.feed(part, message)
    held.set()
    learner.settle()
    assert len(parts['prior']) == 3
    assert learner.node.core.windows == (3 if image_qos == 'keep_all' else 2)
