"""The bundle on simulated motion of every kind, and on real recordings with KLT tracks."""

from pathlib import Path

import cv2
from hypothesis import given, settings
from hypothesis import strategies as st
from imatching_ros.bundle.bundle import Bundle, INITIALISING, LOST, NEW_MAP, TRACKING
from imatching_ros.bundle.observations import observations, surviving
from imatching_ros.bundle.options import BundleOptions
from imatching_ros.geometry import lie, triangulation
from imatching_ros.geometry.camera import Camera
from imatching_ros.geometry.correspondences import Correspondences
from klt_tracks import KltTracker
import numpy as np
import pytest
import torch

CAMERA = Camera(640, 480, 500.0, 505.0, 320.0, 240.0)
RECORDINGS = Path(__file__).resolve().parents[2] / 'shared' / 'recordings'


class World:
    """
    Points, a camera's way among them, and the correspondences that a tracker would publish of it.

    Every ``every``-th image is a keyframe; an image is matched against the past ``past``
    keyframes.
    """

    def __init__(
        self, T, points, camera=CAMERA, every=3, past=2, noise_px=0.3, outliers=0.0, nan=0.0,
        missing=0.0, seed=0,
    ):
        self.T, self.points, self.camera = T, points, camera
        g = torch.Generator().manual_seed(seed)
        xy, depth = triangulation.reproject(T[:, None], points)  # (F, P, 2)
        uv = camera.project(xy)
        self.seen = (
            (depth > 0.1)
            & (uv >= 0).all(-1)
            & (uv[..., 0] < camera.width)
            & (uv[..., 1] < camera.height)
        )
        self.stamps = [1_000_000_000 + 33_000_000 * i for i in range(len(T))]
        self.messages = []
        keyframes = []
        # per keyframe, (P, 2): where the tracker took the point to be
        measured: dict[int, torch.Tensor] = {}
        for i in range(len(T)):
            rows = []
            for k in keyframes[-past:]:
                track = (self.seen[i] & measured[k].isfinite().all(-1)).nonzero().squeeze(-1)
                track = track[torch.rand(len(track), generator=g) >= missing]
                found = uv[i, track] + noise_px * torch.randn(
                    len(track), 2, generator=g, dtype=torch.float64
                )
                wrong = torch.rand(len(track), 1, generator=g) < outliers
                found = torch.where(
                    wrong, torch.rand(len(track), 2, generator=g).double() * 480, found
                )
                found = torch.where(torch.rand(len(track), 1, generator=g) < nan, torch.nan, found)
                rows.append((k, track, found))
            self.messages.append(self._message(i, rows, measured))
            if i % every == 0:
                here = torch.where(self.seen[i, :, None], uv[i], torch.nan)
                here = here + 0.5 * noise_px * torch.randn(
                    here.shape, generator=g, dtype=torch.float64
                )
                for _, track, found in rows:
                    here[track] = found
                measured[i] = here
                keyframes.append(i)
        self.keyframes = [self.stamps[k] for k in keyframes]

    def _message(self, i, rows, measured):
        track = torch.cat([r[1] for r in rows]) if rows else torch.zeros(0, dtype=torch.int64)
        uv = torch.cat([r[2] for r in rows]).float() if rows else torch.zeros(0, 2)
        ref = [torch.full((len(r[1]),), self.stamps[r[0]], dtype=torch.int64) for r in rows]
        ref_uv = [measured[r[0]][r[1]].float() for r in rows]
        xy, cov = self.camera.normalise(uv.double()).float(), torch.tensor([[0.25, 0.0, 0.25]])
        return Correspondences(
            self.stamps[i], uv, xy, torch.cat(ref) if rows else track,
            torch.cat(ref_uv) if rows else uv, track, torch.ones(len(track)),
            cov.repeat(len(track), 1), 0,
        )


def cloud(n=400, low=(-6, -3, 2), high=(6, 3, 12), seed=0):
    g = torch.Generator().manual_seed(seed)
    low, high = torch.tensor(low).double(), torch.tensor(high).double()
    return low + (high - low) * torch.rand(n, 3, generator=g, dtype=torch.float64)


def path(frames, velocity=(0.06, 0.0, 0.0), turn=(0.0, 0.0, 0.0), sway=0.01):
    """Constant velocity and turning rate per image, and a little swaying."""
    T = lie.identity(frames)
    i = torch.arange(frames, dtype=torch.float64)[:, None]
    t = i * torch.tensor(velocity).double() + sway * torch.cat(
        (torch.sin(i), torch.cos(i), 0 * i), -1
    )
    return lie.retract(T, torch.cat((t, i * torch.tensor(turn).double()), -1))


def run(world, options=None):
    bundle = Bundle(world.camera, options)
    return bundle, [bundle.add(message) for message in world.messages]


def ate(estimate, truth):
    """RMSE of positions (N, 3) after the best similarity, as a part of the true path's length."""
    p, q = np.asarray(estimate), np.asarray(truth)
    pc, qc = p - p.mean(0), q - q.mean(0)
    U, D, V = np.linalg.svd(qc.T @ pc)
    S = np.diag([1, 1, np.sign(np.linalg.det(U @ V))])
    scale = np.trace(np.diag(D) @ S) / (pc**2).sum()
    error = qc - scale * pc @ (U @ S @ V).T
    return np.sqrt((error**2).sum(1).mean()) / np.linalg.norm(np.diff(q, axis=0), axis=1).sum()


def keyframe_error(bundle, world):
    stamps = sorted(bundle.trajectory)
    truth = world.T[[world.stamps.index(s) for s in stamps], :3]
    return ate(torch.stack([bundle.trajectory[s] for s in stamps])[:, :3], truth)


def landmark_error(window, world):
    """
    Distance of landmarks to the points they are, after the similarity of the poses.

    Relative to their depth.
    """
    T, S = window.T_world_camera, world.T[[world.stamps.index(int(s)) for s in window.stamps]]
    scale = (S[-1, :3] - S[0, :3]).norm() / (T[-1, :3] - T[0, :3]).norm()
    local = lie.act(lie.inverse(T[0]), window.points) * scale
    true = lie.act(lie.inverse(S[0]), world.points[window.track])
    return (local - true).norm(dim=-1) / true.norm(dim=-1)


MOTIONS = {
    'sideways': {'velocity': (0.06, 0, 0)},
    'forward': {'velocity': (0, 0, 0.08)},
    'turning': {'velocity': (0.06, 0, 0.03), 'turn': (0, -0.005, 0.002)},
    'hand-held': {'velocity': (0.03, 0.01, 0.01), 'turn': (0.001, 0.002, -0.003), 'sway': 0.05},
}


@pytest.mark.parametrize('motion', MOTIONS)
def test_every_keyframe_is_posed_under_noise_and_outliers(motion):
    world = World(path(45, **MOTIONS[motion]), cloud(600), outliers=0.2, nan=0.01, missing=0.1)
    bundle, estimates = run(world)
    # The last keyframe is not yet known to be one: no later image names it.
    named = [k for k in world.keyframes if k < world.stamps[-1]]
    assert (
        sorted(bundle.trajectory) == named and bundle.keyframes == len(named) and bundle.maps == 1
    )
    assert keyframe_error(bundle, world) < 0.01
    first = next(i for i, e in enumerate(estimates) if e.status == TRACKING)
    assert all(e.status == INITIALISING and e.T_world_camera is None for e in estimates[:first])
    assert all(e.status == TRACKING and e.inliers > 20 for e in estimates[first:])
    truth = world.T[first:, :3]
    assert ate(torch.stack([e.T_world_camera for e in estimates[first:]])[:, :3], truth) < 0.01
    # A point near the epipole, or a chance agreement of two wrong rows, may be off; not many are.
    error = landmark_error(bundle.window, world)
    assert error.median() < 0.03 and (error > 0.3).float().mean() < 0.05


def test_exact_correspondences_give_the_exact_motion():
    world = World(path(30), cloud(), noise_px=0.0)
    bundle, _ = run(world)
    assert keyframe_error(bundle, world) < 1e-5  # the correspondences are float32
    assert landmark_error(bundle.window, world).max() < 1e-3


def test_distorted_camera():
    camera = Camera(
        640, 480, 400.0, 405.0, 320.0, 240.0, 'plumb_bob', (-0.28, 0.074, 2e-4, 1.8e-5)
    )
    world = World(path(30), cloud(), camera=camera, noise_px=0.2)
    assert keyframe_error(run(world)[0], world) < 0.01


def test_planar_scene():
    points = cloud(500, low=(-5, -3, 5), high=(7, 3, 5.0001))
    world = World(path(40, turn=(0.002, -0.004, 0.0)), points, outliers=0.1)
    bundle, _ = run(world)
    assert keyframe_error(bundle, world) < 0.02
    assert landmark_error(bundle.window, world).median() < 0.05


@pytest.mark.parametrize('turn', [(0, 0.02, 0), (0, 0, 0)], ids=['pure rotation', 'standstill'])
def test_without_parallax_there_are_no_landmarks(turn):
    world = World(
        path(40, velocity=(0, 0, 0), turn=turn, sway=0.0), cloud(1200, low=(-12, -6, -12)),
        outliers=0.1,
    )
    bundle, estimates = run(world)
    assert bundle.window is None and not bundle.trajectory
    assert all(e.status == INITIALISING and e.window is None for e in estimates)


def test_the_map_begins_when_the_camera_begins_to_move():
    still = path(20, velocity=(0, 0, 0), sway=0.0)
    moving = path(30)
    world = World(torch.cat((still, moving)), cloud(), outliers=0.1)
    bundle, estimates = run(world)
    assert not any(e.window for e in estimates[:20]) and estimates[-1].status == TRACKING
    assert keyframe_error(bundle, world) < 0.01


def test_a_rotation_on_the_way_makes_no_false_landmarks():
    before = path(30)
    turns = torch.zeros(12, 6, dtype=torch.float64)
    turns[:, 4] = 0.02 * torch.arange(1, 13)
    turning = lie.retract(before[-1:].expand(12, 7), turns)
    world = World(
        torch.cat((before, turning)), cloud(1500, low=(-12, -4, 2), high=(12, 4, 12)), outliers=0.1
    )
    bundle, estimates = run(world)
    for estimate in estimates:
        if estimate.window is not None:
            error = landmark_error(estimate.window, world)
            assert (error > 0.5).float().mean() < 0.02
    assert estimates[-1].status == TRACKING


def test_window_is_bounded_and_scale_is_continuous():
    world = World(
        path(120, sway=0.0), cloud(1500, low=(-4, -3, 2), high=(12, 3, 12)), outliers=0.1
    )
    bundle, estimates = run(world, BundleOptions(keyframes=6))
    windows = [e.window for e in estimates if e.window]
    assert all(len(w.stamps) <= 6 for w in windows[3:])
    stamps = sorted(bundle.trajectory)
    steps = torch.stack([bundle.trajectory[s] for s in stamps])[:, :3].diff(dim=0).norm(dim=-1)
    assert steps.max() / steps.min() < 1.25
    # what both windows hold, they hold alike
    for one, two in zip(windows, windows[1:], strict=False):
        shared = [int(s) for s in one.stamps if s in two.stamps]
        a = one.T_world_camera[[one.stamps.tolist().index(s) for s in shared]]
        b = two.T_world_camera[[two.stamps.tolist().index(s) for s in shared]]
        assert (a - b).abs().max() < 0.05


def test_survivors_are_rebuilt_exactly_and_the_window_is_stationary_over_them():
    world = World(path(45), cloud(600), outliers=0.2, nan=0.01)
    options = BundleOptions()
    bundle = Bundle(CAMERA, options)
    for i, message in enumerate(world.messages):
        window = bundle.add(message).window
        if window is None:
            continue
        seen = [m for m in world.messages[:i + 1] if m.stamp in window.stamps.tolist()]
        observed, posed = surviving(window, seen, CAMERA, options.prune_px)
        landmark = posed.landmark
        assert torch.equal(
            torch.bincount(landmark, minlength=len(window.track)), window.observations
        )
        squared = posed.residual()[0].square().sum(-1)
        rms = (
            torch.zeros(len(window.track)).double().index_add(0, landmark, squared)
            / window.observations
        ).sqrt()
        torch.testing.assert_close(rms, window.error_px)
        assert torch.equal(window.track[landmark], observed.track)
        assert torch.equal(window.stamps[posed.pose], observed.stamp)
        points = window.points.clone().requires_grad_()
        cost = type(posed)(**{**vars(posed), 'points': points}).cost(options.adjust.kernel)
        (gradient,) = torch.autograd.grad(cost, points)
        size = window.points.norm(dim=-1, keepdim=True)
        assert (gradient * size).norm() < 1e-3 * posed.focal.mean() * cost.detach().sqrt()
        # Every row is found again in the message it came from; reference points (row -1) only
        # begin tracks.
        for m in range(0, len(observed), 97):
            source, row = seen[int(observed.message[m])], int(observed.row[m])
            if row >= 0:
                assert source.stamp == observed.stamp[m] and source.track[row] == observed.track[m]
                torch.testing.assert_close(source.xy[row].double(), observed.xy[m])


def test_the_reference_point_is_an_observation_only_where_the_track_began():
    world = World(path(13), cloud(50), every=3, past=2)
    keyframes = [m for m in world.messages if m.stamp in world.keyframes]
    observed = observations(keyframes, CAMERA)
    begun = observed.row < 0
    pairs = torch.stack((observed.stamp, observed.track), -1)
    assert len(torch.unique(pairs[begun], dim=0)) == int(begun.sum())
    assert not set(map(tuple, pairs[begun].tolist())) & set(map(tuple, pairs[~begun].tolist()))
    # every track that some row names was begun exactly once
    assert torch.equal(torch.unique(observed.track[begun]), torch.unique(observed.track))


def covered(world, first, last, fresh_tracks):
    """
    Return the messages with images first..last showing nothing.

    With other tracks afterwards if ``fresh_tracks``.
    """
    messages = []
    for i, m in enumerate(world.messages):
        rows = torch.ones(len(m), dtype=torch.bool)
        if first <= i < last:
            rows[:] = False
        if i >= last and fresh_tracks:
            rows = m.ref_stamp >= world.stamps[last]
        offset = 100_000 if fresh_tracks and i >= last else 0
        messages.append(Correspondences(
            m.stamp, m.uv[rows], m.xy[rows], m.ref_stamp[rows], m.ref_uv[rows],
            m.track[rows] + offset, m.score[rows], m.cov[rows], 0,
        ))
    return messages


def test_tracking_resumes_after_a_covered_lens():
    world = World(path(60), cloud(800))
    world.messages = covered(world, 30, 34, fresh_tracks=False)
    bundle, estimates = run(world)
    assert [e.status for e in estimates[30:34]] == [LOST] * 4
    assert estimates[-1].status == TRACKING and bundle.maps == 1
    assert keyframe_error(bundle, world) < 0.01


def test_a_new_map_begins_where_the_lost_one_ended():
    world = World(path(100), cloud(1500, low=(-6, -3, 2), high=(12, 3, 12)))
    world.messages = covered(world, 40, 50, fresh_tracks=True)
    bundle, estimates = run(world)
    statuses = [e.status for e in estimates]
    assert (
        LOST in statuses and NEW_MAP in statuses and statuses[-1] == TRACKING and bundle.maps == 2
    )
    poses = [e.T_world_camera for e in estimates]
    last = max(i for i in range(45) if poses[i] is not None)
    first = next(i for i in range(51, 100) if poses[i] is not None)
    # in front of it lie landmarks at distance 1
    assert (poses[first][:3] - poses[last][:3]).norm() < 1.0


def test_twice_the_same_gives_the_same_bits():
    world = World(path(40, **MOTIONS['turning']), cloud(600), outliers=0.2)
    (one, first), (two, second) = run(world), run(world)
    assert all(torch.equal(one.trajectory[s], two.trajectory[s]) for s in one.trajectory)
    assert torch.equal(one.window.points, two.window.points)
    assert all(
        (a.T_world_camera is None) == (b.T_world_camera is None)
        for a, b in zip(first, second, strict=True)
    )


def test_reset_forgets():
    world = World(path(30), cloud())
    bundle, _ = run(world)
    window = bundle.window
    with pytest.raises(ValueError, match='reset the bundle when time goes back'):
        bundle.add(world.messages[3])
    bundle.reset()
    assert bundle.window is None and not bundle.trajectory
    for message in world.messages:
        bundle.add(message)
    assert torch.equal(bundle.window.T_world_camera, window.T_world_camera)


def test_poses_are_pyposes_at_the_edge():
    world = World(path(30), cloud())
    window = run(world)[0].window
    torch.testing.assert_close(window.poses.matrix()[:, :3], lie.matrix(window.T_world_camera))


@pytest.mark.parametrize(
    'changes, says',
    [
        ({'keyframes': 2}, 'at least 3'), ({'prune_px': 0.0}, 'prune_px'),
        ({'patience': 0}, 'patience'),
    ],
)
def test_bad_options_are_named(changes, says):
    with pytest.raises(ValueError, match=says):
        BundleOptions(**changes)


@settings(deadline=None, max_examples=12)
@given(
    st.integers(0, 10**6), st.integers(3, 10), st.floats(0, 0.5), st.floats(0, 0.5),
    st.floats(0, 0.2), st.sampled_from(list(MOTIONS)), st.integers(1, 4), st.integers(1, 3),
)
def test_whatever_comes_the_windows_are_sound(
    seed, size, outliers, missing, nan, motion, every, past
):
    world = World(
        path(24, **MOTIONS[motion]), cloud(250, seed=seed), outliers=outliers, missing=missing,
        nan=nan, seed=seed, every=every, past=past,
    )
    options = BundleOptions(keyframes=size)
    bundle = Bundle(CAMERA, options)
    for i, message in enumerate(world.messages):
        estimate = bundle.add(message)
        assert (estimate.T_world_camera is not None) == (estimate.status == TRACKING)
        if estimate.T_world_camera is not None:
            assert (
                estimate.T_world_camera.isfinite().all() and estimate.covariance.isfinite().all()
            )
        if (window := estimate.window) is None:
            continue
        assert window.points.isfinite().all() and window.T_world_camera.isfinite().all()
        assert (window.stamps.diff() > 0).all() and (window.track.diff() > 0).all()
        assert (window.observations >= 2).all() and (window.error_px < options.prune_px).all()
        _, posed = surviving(window, world.messages[:i + 1], CAMERA, options.prune_px)
        assert torch.equal(
            torch.bincount(posed.landmark, minlength=len(window.track)), window.observations
        )


def recording(name):
    """
    Stamps, images and camera of a recording, and its true positions by stamp.

    Skips where it is not at hand.
    """
    folder = RECORDINGS / name
    if not folder.is_dir():
        pytest.skip(f'the recording {name} is not in ../shared/recordings')
    from rosbags.highlevel import AnyReader

    K = np.loadtxt(folder / 'intrinsics.txt')
    truth = {}
    for line in (folder / 'groundtruth.txt').read_text().splitlines():
        if not line.startswith('#'):
            stamp, *pose = line.split()
            truth[int(stamp.replace('.', ''))] = np.array(pose[:3], float)
    frames = []
    with AnyReader([folder / 'bag']) as reader:
        connections = [c for c in reader.connections if c.topic.endswith('compressed')]
        for connection, _, raw in reader.messages(connections):
            message = reader.deserialize(raw, connection.msgtype)
            stamp = message.header.stamp.sec * 10**9 + message.header.stamp.nanosec
            frames.append((stamp, cv2.imdecode(np.asarray(message.data), cv2.IMREAD_GRAYSCALE)))
    height, width = frames[0][1].shape
    return frames, Camera(width, height, K[0, 0], K[1, 1], K[0, 2], K[1, 2]), truth


@pytest.mark.parametrize('name', ['kitti_street', 'redkitchen'])
def test_real_recording(name):
    frames, camera, truth = recording(name)
    tracker, bundle = KltTracker(camera, corners=400), Bundle(camera)
    for stamp, image in frames:
        bundle.add(tracker.track(stamp, image))
    assert bundle.maps == 1 and bundle.keyframes > 30
    assert len(bundle.trajectory) == bundle.keyframes
    stamps = sorted(bundle.trajectory)
    known = np.array(sorted(truth))
    nearest = [truth[int(known[np.abs(known - s).argmin()])] for s in stamps]
    assert ate(torch.stack([bundle.trajectory[s] for s in stamps])[:, :3], nearest) < 0.05
