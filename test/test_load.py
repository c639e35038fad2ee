"""Images at a camera's pace through real processes, counted by the benchmark of the nodes."""

from pathlib import Path
import sys

import pytest

pytest.importorskip('rclpy', reason="ROS 2's rclpy is not installed")

from imatching_ros.data.recording import open_recording  # noqa: E402,I100
from imatching_ros.data.synthetic import render_recording  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / 'benchmarks'))
import nodes  # noqa: E402


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
