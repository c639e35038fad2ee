"""Files: whole or not at all, and the same when they are read again."""

import threading

from evo.tools.file_interface import read_tum_trajectory_file
from imatching_ros import files
import numpy as np
import pytest

POSES = np.array([[1.5, -2e-7, 3e6, 0, 0, 0, 1], [0.1, 0.2, 0.3, 0.5, -0.5, 0.5, -0.5]])


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / 'w'
    contents = [bytes([k]) * size for k, size in ((1, 3_000_000), (2, 10), (3, 1_000_000))]
    files.write(path, contents[0])
    done = threading.Event()

    def keep_writing():
        for k in range(60):
            files.write(path, contents[k % 3])
        done.set()

    writer = threading.Thread(target=keep_writing)
    writer.start()
    seen = set()
    while not done.is_set():
        data = path.read_bytes()
        assert data in contents
        seen.add(len(data))
    writer.join()
    assert len(seen) > 1


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / 'new' / 'file'
    files.write(path, 'old')
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as part:
        part.write_text('half')
        raise KeyboardInterrupt
    assert path.read_text() == 'old' and list(path.parent.iterdir()) == [path]
    with files.replacing(path) as part:
        assert not part.exists()
        part.write_text('new')
        assert path.read_text() == 'old'
    assert path.read_text() == 'new' and list(path.parent.iterdir()) == [path]


def test_a_trajectory_keeps_every_nanosecond_and_is_evos(tmp_path):
    stamps = [1_700_000_000_123_456_789, 1_700_000_001_000_000_001]
    files.write_tum(tmp_path / 't.txt', stamps, POSES, of='camera in world')
    again, poses = files.read_tum(tmp_path / 't.txt')
    assert again.dtype == np.int64 and again.tolist() == stamps
    np.testing.assert_allclose(poses, POSES, rtol=1e-11)
    theirs = read_tum_trajectory_file(str(tmp_path / 't.txt'))
    np.testing.assert_allclose(theirs.positions_xyz, POSES[:, :3], rtol=1e-11)
    np.testing.assert_allclose(theirs.orientations_quat_wxyz, POSES[:, [6, 3, 4, 5]])
    files.write_tum(tmp_path / 'none.txt', [], [])
    stamps, poses = files.read_tum(tmp_path / 'none.txt')
    assert stamps.shape == (0,) and poses.shape == (0, 7)


@pytest.mark.parametrize(
    'line', ['1.5 0 0 0 0 0 0', '1.5 0 0 0 0 0 0 1 2', 'x 0 0 0 0 0 0 1', '1.5 0 0 0 0 0 0 one',
             'nan 0 0 0 0 0 0 1', 'inf 0 0 0 0 0 0 1']
)
def test_a_line_that_is_no_pose_is_named(tmp_path, line):
    path = tmp_path / 't.txt'
    path.write_text(f'# seconds\n\n1 0 0 0 0 0 0 1\n{line}\n')
    with pytest.raises(ValueError, match="t.txt, line 4: 'seconds tx ty tz qx qy qz qw'"):
        files.read_tum(path)


def test_a_map_is_a_trajectory_and_a_cloud_in_order(tmp_path):
    landmarks = {7: [0.5, -1.0, 2.0], 3: np.array([1.0, 2.0, 3.0])}
    files.write_map(tmp_path, {2: POSES[0], 1: POSES[1]}, landmarks)
    stamps, poses = files.read_tum(tmp_path / files.TRAJECTORY)
    assert stamps.tolist() == [1, 2] and poses[0].tolist() == POSES[1].tolist()
    data = (tmp_path / files.LANDMARKS).read_bytes()
    head, _, body = data.partition(b'end_header\n')
    assert head.decode().splitlines() == [
        'ply', 'format binary_little_endian 1.0', 'element vertex 2',
        'property float x', 'property float y', 'property float z',
    ]
    assert np.frombuffer(body, '<f4').reshape(-1, 3).tolist() == [[1, 2, 3], [0.5, -1, 2]]
    files.write_map(tmp_path, {}, {})
    assert b'element vertex 0\n' in (tmp_path / files.LANDMARKS).read_bytes()
