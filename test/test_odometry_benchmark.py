"""
The odometry benchmark runs, with COLMAP where it is installed.

Its figures are those of a sound trajectory.
"""

import importlib.util
import json
from pathlib import Path
import subprocess
import sys

SCRIPT = Path(__file__).resolve().parents[1] / 'benchmarks' / 'odometry.py'
KEYS = {
    'recording', 'tracks', 'solver', 'frames', 'keyframes', 'posed_percent',
    'keyframes_posed_percent', 'common', 'ate_m', 'ate_percent', 'ate_own_m', 'track_length',
    'reprojection_px', 'seconds', 'keyframe_seconds', 'threads',
}


def test_rows_of_a_rendered_recording(daylight, tmp_path):
    out = tmp_path / 'odometry.json'
    command = [sys.executable, str(SCRIPT), str(daylight), '--tracks', 'sift', '--json', str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    rows = {row['solver']: row for row in json.loads(out.read_text())}
    peers = {'colmap'} if importlib.util.find_spec('pycolmap') else set()
    assert set(rows) == {'imatching', 'imatching_batch'} | peers
    for row in rows.values():
        assert set(row) == KEYS
        assert row['frames'] == 40 and row['keyframes'] >= 3 and row['seconds'] > 0
        assert row['track_length'] >= 2 and row['reprojection_px'] < 1.5
    ours = rows['imatching']
    assert ours['posed_percent'] == ours['keyframes_posed_percent'] == 100
    # A camera to world for a world to camera, or poses under the wrong stamps, would show here.
    for row in rows.values():
        assert row['ate_percent'] < 2


def test_what_is_no_recording_is_said_in_one_sentence():
    result = subprocess.run(
        [sys.executable, str(SCRIPT), 'nowhere'], capture_output=True, text=True
    )
    assert result.returncode == 1
    assert 'nowhere does not exist' in result.stderr and 'Traceback' not in result.stderr
