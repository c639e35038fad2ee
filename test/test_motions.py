"""
The motions that robots really make, rendered.

Each is recognised, makes no false landmarks and no false poses.
"""

from dataclasses import replace
from functools import cache

from imatching_ros.bundle.bundle import Bundle, INITIALISING, LOST, NEW_MAP, TRACKING
from imatching_ros.bundle.motion import BLIND, MOVING, ROTATION, STANDSTILL
from imatching_ros.bundle.observations import surviving
from imatching_ros.bundle.options import BundleOptions
from imatching_ros.bundle.solve import refine
from imatching_ros.bundle.solver.adjust import adjust, AdjustOptions, free_parameters
from imatching_ros.data import synthetic
from imatching_ros.data.synthetic import textures
from imatching_ros.geometry import lie, two_view
from imatching_ros.geometry.camera import Camera
from klt_tracks import KltTracker
import numpy as np
import pytest
from test_bundle import ate, CAMERA, cloud, landmark_error, path, run, World
import torch

SMALL = Camera(320, 240, 256.0, 256.0, 159.5, 119.5)
RATE_NS = 50_000_000
# the camera looks along x, upright
LEVEL = torch.tensor([-0.5, 0.5, -0.5, 0.5], dtype=torch.float64)


def scene(*quads):
    """
    Posters (origin, right, down), metres.

    Each seen from the side where right points right and down points down.
    """
    posters = [textures.poster(np.random.default_rng(k), 640, 960) for k in range(len(quads))]
    return synthetic.Scene(
        np.array(quads, float), np.arange(len(quads)), np.ones(len(quads)), posters
    )


@cache
def hall():
    """
    Return an empty hall of 8 x 8 x 3 m about the origin.

    Depth without edges, where corners would be no points.
    """
    walls = []
    for angle in np.arange(4) * np.pi / 2:
        ahead, right = (
            np.array([np.cos(angle), np.sin(angle), 0]),
            np.array([np.sin(angle), -np.cos(angle), 0]),
        )
        for left in (-4, 0):
            walls.append((4 * ahead + left * right + [0, 0, 3], 4 * right, [0, 0, -3]))
    floor = [((4, y, 0), (0, -4, 0), (-8, 0, 0)) for y in (4, 0)]
    ceiling = [((-4, y, 3), (0, -4, 0), (8, 0, 0)) for y in (4, 0)]
    return scene(*walls, *floor, *ceiling)


@cache
def wall():
    """One poster of 8 x 5 m, three metres ahead."""
    return scene(((3, 4, 4), (0, -8, 0), (0, 0, -5)))


def poses(x=0.0, y=0.0, z=1.4, yaw=0.0, frames=None):
    """T_world_camera (N, 7) at x, y, z, turned to the left by yaw; each a number or (N,)."""
    parts = [np.atleast_1d(np.asarray(v, float)) for v in (x, y, z, yaw)]
    x, y, z, yaw = (torch.from_numpy(np.array(v)) for v in np.broadcast_arrays(*parts))
    T = torch.cat((torch.stack((x, y, z), -1), LEVEL.expand(len(x), 4)), -1)
    turn = torch.zeros(len(x), 6, dtype=torch.float64)
    turn[:, 5] = yaw
    return lie.retract(T, turn)


class Film:
    """Images of a scene along a path, the tracks in them, and what the bundle makes of these."""

    def __init__(
        self, scene, T, noise=2.0, covered=(), freeze=(), options=None, odometry=None, sensor=None
    ):
        rng = np.random.default_rng(0)
        sensor = sensor or synthetic.Sensor(noise=noise)
        self.scene, self.T = scene, T
        self.stamps = [RATE_NS * (i + 1) for i in range(len(T))]
        tracker, self.bundle, self.estimates, image = (
            KltTracker(SMALL, 300, parallax_px=12.0), None, [], None,
        )
        self.bundle = Bundle(SMALL, options)
        for i, (stamp, pose) in enumerate(zip(self.stamps, T, strict=True)):
            light = (
                scene.image(pose.expand(4, 7), SMALL)
                if i not in covered
                else np.full((240, 320), 0.02, np.float32)
            )
            if i not in freeze:
                image = sensor.expose(light, np.zeros(2), rng)
            if odometry is not None:
                odometry(self.bundle, stamp, pose)
            self.estimates.append(self.bundle.add(tracker.track(stamp, image)))

    @property
    def statuses(self):
        return [e.status for e in self.estimates]

    @property
    def motions(self):
        return [e.motion for e in self.estimates]

    def posed(self):
        """Of all images that have a pose, then or later: index and pose."""
        known = {}
        for e in self.estimates:
            known.update(e.earlier)
            if e.T_world_camera is not None:
                known[e.stamp] = e.T_world_camera
        stamps = sorted(known)
        return [self.stamps.index(s) for s in stamps], torch.stack([known[s] for s in stamps])

    def error(self, some=None):
        """Absolute trajectory error of the posed images, as a part of the way."""
        index, T = self.posed()
        keep = [k for k, i in enumerate(index) if some is None or i in some]
        return ate(T[keep, :3], self.T[[index[k] for k in keep], :3])

    def turn_error_deg(self):
        """Largest error of an image's orientation, seen from the first posed one."""
        index, T = self.posed()
        ours = lie.compose(lie.inverse(T[:1]), T)
        theirs = lie.compose(lie.inverse(self.T[index[0]])[None], self.T[index])
        return float(
            lie.log(lie.compose(lie.inverse(ours), theirs)[:, 3:]).norm(dim=-1).max().rad2deg()
        )

    def false_landmarks(self):
        """
        Return the share of landmarks at a wrong depth.

        Of every window's newest keyframe's landmarks, the share whose depth is a quarter off,
        after the scale.
        """
        wrong = total = 0
        for window in (e.window for e in self.estimates if e.window is not None):
            k = self.stamps.index(int(window.stamps[-1]))
            local = lie.act(lie.inverse(window.T_world_camera[-1]), window.points)
            uv = SMALL.project(local[:, :2] / local[:, 2:]).round().long()
            inside = (local[:, 2] > 0) & (uv >= 0).all(-1) & (uv[:, 0] < 320) & (uv[:, 1] < 240)
            depth = torch.from_numpy(self.scene.depth(self.T[k], SMALL)).double()[None, None]
            # Corners stand where depths meet: either is right.
            near, far = (
                s * torch.nn.functional.max_pool2d(s * depth, 5, 1, 2)[0, 0] for s in (-1, 1)
            )
            near, far, z = (
                near[uv[inside, 1], uv[inside, 0]],
                far[uv[inside, 1], uv[inside, 0]],
                local[inside, 2],
            )
            scale = (z / far).median()
            wrong += int(((z < 0.8 * scale * near) | (z > 1.25 * scale * far)).sum())
            total += len(z)
        return wrong / max(total, 1)


def test_turning_on_the_spot_from_the_start_makes_no_map():
    film = Film(
        hall(),
        torch.cat((poses(yaw=0.03 * np.arange(25)), poses(y=0.04 * np.arange(25), yaw=0.72))),
    )
    assert not any(e.window for e in film.estimates[:25])
    assert film.motions[5:25].count(ROTATION) >= 18
    assert all('only turns' in e.reason for e in film.estimates[5:25] if e.motion == ROTATION)
    assert film.statuses[-1] == TRACKING and film.motions[-5:] == [MOVING] * 5  # and then it moves
    assert film.false_landmarks() < 0.08 and film.error(range(28, 50)) < 0.05


def test_looking_aside_on_the_way_keeps_the_map():
    swing = np.r_[np.linspace(0, 0.6, 12), np.linspace(0.6, 0, 12)]
    before, aside = poses(x=-1.5, y=0.04 * np.arange(25)), poses(x=-1.5, y=0.96, yaw=swing)
    T = torch.cat((before, aside, poses(x=-1.5, y=0.96 + 0.04 * np.arange(1, 20))))
    film = Film(hall(), T)
    turning = range(28, 48)
    assert [film.motions[i] for i in turning].count(ROTATION) >= 15
    assert film.bundle.maps == 1 and film.statuses[25:] == [TRACKING] * 43
    assert film.posed()[0] == list(range(68))  # no image without a pose
    assert film.false_landmarks() < 0.02 and film.error() < 0.01 and film.turn_error_deg() < 1.0


def test_turning_until_no_landmark_is_in_view_is_followed_and_a_new_map_said():
    before = poses(x=-1.5, y=0.04 * np.arange(25))
    turning = poses(x=-1.5, y=0.96, yaw=0.05 * np.arange(1, 33))
    after = poses(x=-1.5 + 0.04 * np.arange(1, 35), y=0.96, yaw=1.6)
    T = torch.cat((before, turning, after))
    film = Film(hall(), T)
    assert film.statuses[25:57] == [TRACKING] * 32  # 92 degrees to the side
    assert [film.motions[i] for i in range(30, 57)].count(ROTATION) >= 20
    index, known = film.posed()
    here = [k for k, i in enumerate(index) if 25 <= i < 57]
    first, way = known[index.index(24), :3], (known[index.index(24), :3] - known[0, :3]).norm()
    assert (known[here, :3] - first).norm(dim=-1).max() < 0.1 * way  # it stays where it is
    assert film.bundle.maps == 2 and LOST in film.statuses and NEW_MAP in film.statuses
    assert (
        film.statuses[-1] == TRACKING
        and film.turn_error_deg() < 4.0
        and film.false_landmarks() < 0.03
    )


@pytest.mark.parametrize('noise', [0.0, 8.0], ids=['without noise', 'with noise'])
def test_standstill(noise):
    T = torch.cat(
        (poses(y=np.zeros(12)), poses(y=0.04 * np.arange(25)), poses(y=0.96 * np.ones(20)))
    )
    film = Film(hall(), T, noise=noise)
    assert film.motions[3:12] == [STANDSTILL] * 9 and film.bundle.maps == 1
    assert all(
        e.status == INITIALISING and 'stands still' in e.reason for e in film.estimates[3:12]
    )
    assert film.motions[20:36] == [MOVING] * 16
    assert film.motions[-12:] == [STANDSTILL] * 12 and film.statuses[-12:] == [TRACKING] * 12
    assert film.false_landmarks() < 0.05 and film.error() < 0.02
    still = torch.stack([e.T_world_camera for e in film.estimates[-12:]])
    index, moved = film.posed()
    way = (moved[-1, :3] - moved[0, :3]).norm()
    assert still[:, :3].std(0).norm() < 0.01 * way


def test_the_same_image_again_and_again():
    film = Film(hall(), poses(y=0.04 * np.r_[0:25, [24] * 10, 25:40]), freeze=range(25, 35))
    assert film.motions[31:35] == [STANDSTILL] * 4 and set(film.statuses[25:]) == {TRACKING}
    assert not any(e.window for e in film.estimates[29:35]) and film.error() < 0.01


def test_a_plane():
    film = Film(
        wall(),
        poses(x=0.01 * np.arange(45), y=0.03 * np.arange(45), z=1.5, yaw=-0.006 * np.arange(45)),
    )
    assert film.bundle.maps == 1 and film.statuses[-1] == TRACKING
    assert film.false_landmarks() < 0.02 and film.error() < 0.02


def test_forward():
    film = Film(hall(), poses(x=-2.0 + 0.04 * np.arange(50), y=0.3))
    assert film.bundle.maps == 1 and film.statuses[-1] == TRACKING and film.motions[-1] == MOVING
    assert film.false_landmarks() < 0.08 and film.error() < 0.02


def test_a_sudden_turn_is_followed_or_said():
    yaw = np.r_[np.zeros(30), 0.12 * np.arange(1, 7), 0.72 * np.ones(30)]
    y = np.r_[0.04 * np.arange(30), [1.16] * 6, 1.16 + 0.04 * np.arange(1, 31)] - 1.2
    film = Film(hall(), poses(y=y, yaw=yaw))
    assert film.statuses[-1] == TRACKING
    assert all(e.T_world_camera is not None or e.reason for e in film.estimates)
    assert film.false_landmarks() < 0.05 and film.turn_error_deg() < 3.0
    if film.bundle.maps == 1:
        assert film.error() < 0.03
    else:
        assert NEW_MAP in film.statuses


def test_a_covered_lens_and_back_at_the_same_place():
    y = 0.04 * np.r_[0:30, [29] * 20, 30:50]
    film = Film(hall(), poses(y=y), covered=range(30, 50))
    assert film.motions[30:50] == [BLIND] * 20 and film.statuses[30:50] == [LOST] * 20
    assert all('too few points' in e.reason for e in film.estimates[30:50])
    assert film.statuses[50:] == [TRACKING] * 20 and film.bundle.maps == 1
    assert film.false_landmarks() < 0.05 and film.error() < 0.01


def test_a_covered_lens_and_elsewhere_begins_a_new_map():
    T = torch.cat((poses(y=0.04 * np.arange(45)), poses(y=0.04 * np.arange(45), yaw=2.5)))
    film = Film(hall(), T, covered=range(40, 45))
    assert film.bundle.maps == 2 and film.statuses[-1] == TRACKING
    assert LOST in film.statuses and NEW_MAP in film.statuses
    new = next(e for e in film.estimates if e.status == NEW_MAP)
    assert 'scale of its own' in new.reason
    assert film.false_landmarks() < 0.05
    assert film.error(range(40)) < 0.01 and film.error(range(66, 90)) < 0.02


def test_the_models_are_told_apart_and_a_plane_allows_its_true_motion():
    g = torch.Generator().manual_seed(0)
    points = cloud(300, low=(-4, -3, 3), high=(4, 3, 9))
    flat = points.clone()
    flat[:, 2] = 5 + 0.2 * flat[:, 0]
    turn, shift = [0.02, 0.1, 0.03], [0.5, 0.1, 0.2]
    cases = (
        ('rotation', points, [0.0] * 3 + turn), ('general', points, shift + turn),
        ('plane', flat, shift + turn),
    )
    for name, p, motion in cases:
        T_i, T_j = (
            lie.identity(),
            lie.retract(lie.identity(), torch.tensor(motion, dtype=torch.float64)),
        )
        xy_i, xy_j = (lie.act(lie.inverse(T), p) for T in (T_i, T_j))
        xy_i, xy_j = (
            q[:, :2] / q[:, 2:] + 1e-3 * torch.randn(300, 2, generator=g).double()
            for q in (xy_i, xy_j)
        )
        wrong = torch.rand(300, generator=g) < 0.2
        xy_j[wrong] = torch.rand(int(wrong.sum()), 2, generator=g).double() - 0.5
        R = two_view.relative_rotation(xy_i, xy_j, 6e-3)
        E, _ = two_view.relative_pose(xy_i, xy_j, 1.5, 500.0)
        H = two_view.homography(xy_i, xy_j, 3.0, 500.0)
        squared = {
            'rotation': (
                two_view.transfer_error(lie.rotation(R[3:]), xy_i, xy_j) / 1.4e-3
            ).square(),
            'general': (two_view.sampson_error(E, xy_i, xy_j) / 1e-3).square(),
            'plane': (two_view.transfer_error(H, xy_i, xy_j) / 1.4e-3).square(),
        }
        size = {'rotation': (2, 3), 'general': (3, 5), 'plane': (2, 8)}
        assert min(size, key=lambda m: two_view.gric(squared[m], *size[m])) == name  # noqa: B023
        true = lie.inverse(T_j)
        if name == 'rotation':
            assert (lie.rotation(R[3:]) - lie.rotation(true[3:])).norm() < 1e-3
        if name == 'plane':
            found = two_view.homography_motions(H, xy_i[~wrong], xy_j[~wrong])
            assert 1 <= len(found) <= 2
            assert (
                min(
                    lie.local(T, torch.cat((true[:3] / true[:3].norm(), true[3:]))).norm()
                    for T in found
                )
                < 0.05
            )


# What leaves the window --------------------------------------------------------------------------


def test_the_prior_is_a_part_of_the_windows_optimum():
    world = World(
        path(60), cloud(900, low=(-4, -3, 2), high=(10, 3, 12)), noise_px=0.5, outliers=0.1
    )
    exact = AdjustOptions(max_iterations=200, relative_decrease=1e-12, gradient=1e-7)
    options = BundleOptions(keyframes=5, adjust=exact)
    bundle = Bundle(CAMERA, options)
    priors = 0
    for message in world.messages:
        window = bundle.add(message).window
        if window is None or window.prior is None:
            continue
        priors += 1
        kept = [bundle.state.messages[s] for s in window.stamps.tolist()]
        _, posed = surviving(window, kept, CAMERA, options.prune_px)
        assert posed.prior is not None
        delta = torch.zeros(len(window.stamps), 6, dtype=torch.float64, requires_grad=True)
        moved = lie.retract(window.T_world_camera, delta)
        cost = type(posed)(**{**vars(posed), 'T_world_camera': moved}).cost(options.adjust.kernel)
        (gradient,) = torch.autograd.grad(cost, delta, retain_graph=True)
        scale = torch.tensor([1.0] * 3 + [5.0] * 3)  # rotations move points at a distance of five
        free = free_parameters(window.T_world_camera, None)  # the gauge is held, not solved for
        pull = (gradient / scale).flatten()[free].norm()
        assert pull < 1e-4 * posed.focal.mean() * cost.detach().sqrt()
        without = type(posed)(**{**vars(posed), 'T_world_camera': moved, 'prior': None}).cost(
            options.adjust.kernel
        )
        (other,) = torch.autograd.grad(without, delta)
        # without it, they are not at rest
        assert (other / scale).flatten()[free].norm() > 100 * pull
    assert priors > 10


def test_scale_holds_over_a_hundred_keyframes():
    i = torch.arange(100, dtype=torch.float64)
    delta = torch.zeros(100, 6, dtype=torch.float64)
    delta[:, 0], delta[:, 1], delta[:, 4] = 0.25 * i, 0.05 * torch.sin(i), 0.4 * torch.sin(i / 15)
    T = lie.retract(lie.identity(100), delta)
    points = cloud(1500, low=(-12, -4, 3), high=(40, 4, 14))
    bundle, estimates = run(
        world := World(T, points, every=1, noise_px=1.0), BundleOptions(keyframes=5)
    )
    assert sum(e.window is not None and e.window.prior is not None for e in estimates) > 60
    stamps = sorted(bundle.trajectory)
    ours = torch.stack([bundle.trajectory[s] for s in stamps])[:, :3]
    theirs = T[[world.stamps.index(s) for s in stamps], :3]
    scale = ((ours[5:] - ours[:-5]).norm(dim=-1) / (theirs[5:] - theirs[:-5]).norm(dim=-1)).log()
    assert (scale - scale[:5].mean()).abs().max() < 0.1 and ate(ours, theirs) < 0.01


def test_the_batch_over_all_keyframes_is_better_than_the_windows():
    world = World(
        path(60, velocity=(0.06, 0, 0.02)), cloud(700, high=(9, 3, 12)), noise_px=0.8, outliers=0.1
    )
    options = BundleOptions(keyframes=4)
    bundle, _ = run(world, options)
    stamps = sorted(bundle.trajectory)
    T = torch.stack([bundle.trajectory[s] for s in stamps])
    window = refine([world.messages[world.stamps.index(s)] for s in stamps], T, CAMERA, options)
    truth = world.T[[world.stamps.index(s) for s in stamps], :3]
    assert window.stamps.tolist() == stamps and torch.equal(window.T_world_camera[0], T[0])
    assert ate(window.T_world_camera[:, :3], truth) < ate(T[:, :3], truth)


# How well a pose is known ------------------------------------------------------------------------


def test_the_covariance_is_that_of_the_errors():
    """
    Monte Carlo: what a covariance predicts of the error of the newest pose.

    In the window's gauge.
    """
    errors = []
    for seed in range(16):
        world = World(
            path(25, velocity=(0.08, 0.0, 0.0)), cloud(250), every=4, noise_px=0.5, seed=seed
        )
        bundle, estimates = run(world, BundleOptions(keyframes=4))
        e, window = estimates[-1], bundle.window
        assert torch.linalg.eigvalsh(e.covariance).min() > 0 and torch.equal(
            e.covariance, e.covariance.T
        )
        where = [world.stamps.index(int(s)) for s in window.stamps] + [len(world.T) - 1]
        truth = lie.compose(
            lie.compose(window.T_world_camera[:1], lie.inverse(world.T[where[:1]])), world.T[where]
        )
        ours = torch.cat((window.T_world_camera, e.T_world_camera[None]))
        offset = window.T_world_camera[:, :3] - window.T_world_camera[0, :3]
        far = int(offset.norm(dim=-1).argmax())
        axis = int(offset[far].abs().argmax())
        scale = offset[far, axis] / (truth[far, axis] - truth[0, axis])
        true = torch.cat((truth[0, :3] + scale * (truth[-1, :3] - truth[0, :3]), truth[-1, 3:]))
        d = lie.local(true, ours[-1])
        errors.append(d @ torch.linalg.solve(e.covariance, d))
    # Chi-squared with six degrees of freedom: its mean over 16 runs has a deviation of 0.9.
    assert 3.5 < torch.stack(errors).mean() < 9.5


# Another odometry --------------------------------------------------------------------------------


def with_odometry(world, options=None, scale=3.0, until=None, every=1):
    """
    Return the bundle with an odometry that runs in another frame, in metres.

    The world is in units of a third metre.
    """
    frame = lie.retract(
        lie.identity(), torch.tensor([5.0, -2, 1, 0.3, -0.2, 0.8], dtype=torch.float64)
    )
    bundle, estimates = Bundle(CAMERA, options), []
    for i, (message, T) in enumerate(zip(world.messages, world.T, strict=True)):
        if i % every == 0 and (until is None or i < until):
            T = lie.compose(frame, torch.cat((scale * T[:3], T[3:])))
            bundle.add_odometry(message.stamp, T, 1e-4 * torch.eye(6))
        estimates.append(bundle.add(message))
    return bundle, estimates, frame


def test_odometry_gives_the_map_its_scale():
    world = World(path(60), cloud(600), outliers=0.1)
    bundle, estimates, _ = with_odometry(world, every=2)
    assert bundle.metric
    T = torch.stack([e.T_world_camera for e in estimates[-20:]])[:, :3]
    assert (T[-1] - T[0]).norm() == pytest.approx(
        3 * float((world.T[-1, :3] - world.T[-20, :3]).norm()), rel=0.02
    )
    alone, _ = run(world)
    assert not alone.metric
    one, two = (
        torch.stack([b.trajectory[s] for s in sorted(b.trajectory)]) for b in (bundle, alone)
    )
    # scale, and nothing else
    torch.testing.assert_close(one[:, 3:], two[:, 3:], atol=1e-3, rtol=0)


def test_a_robot_that_does_not_move_has_no_metric_scale():
    world = World(path(40), cloud(600))
    bundle, _, _ = with_odometry(world, scale=0.01)  # all its way is two centimetres
    assert not bundle.metric and bundle.window is not None


def test_external_poses_are_held_and_only_landmarks_solved():
    world = World(
        path(45, **{'velocity': (0.06, 0, 0.03), 'turn': (0, -0.005, 0.002)}), cloud(600),
        outliers=0.2,
    )
    options = BundleOptions(poses='external')
    bundle, estimates, frame = with_odometry(world, options)
    scaled = torch.cat((3 * world.T[:, :3], world.T[:, 3:]), -1)
    for i, e in enumerate(estimates):
        torch.testing.assert_close(e.T_world_camera, lie.compose(frame, scaled[i]))
    window = bundle.window
    index = [world.stamps.index(int(s)) for s in window.stamps]
    torch.testing.assert_close(
        window.T_world_camera, lie.compose(frame, scaled[index]), rtol=0, atol=1e-14
    )
    assert len(window.stamps) == 8 and bundle.metric and estimates[-1].status == TRACKING
    truth = lie.act(frame, 3 * world.points[window.track])
    assert ((window.points - truth).norm(dim=-1) / truth.norm(dim=-1)).median() < 0.02
    assert landmark_error(window, world).median() < 0.02
    # The landmarks are where the objective is stationary: the learner's gradient is exact.
    _, posed = surviving(window, world.messages, CAMERA, options.prune_px)
    assert torch.equal(
        torch.bincount(posed.landmark, minlength=len(window.track)), window.observations
    )
    points = window.points.clone().requires_grad_()
    cost = type(posed)(**{**vars(posed), 'points': points}).cost(options.adjust.kernel)
    (gradient,) = torch.autograd.grad(cost, points)
    assert (
        gradient * window.points.norm(dim=-1, keepdim=True)
    ).norm() < 1e-3 * CAMERA.fx * cost.detach().sqrt()


def test_images_without_odometry_are_left_out_and_said():
    world = World(path(40), cloud(500))
    bundle, estimates, _ = with_odometry(world, BundleOptions(poses='external'), until=25)
    assert estimates[27].status == TRACKING  # motion goes on for a tenth of a second
    assert [e.status for e in estimates[29:]] == [LOST] * 11
    assert all(
        e.T_world_camera is None and 'no pose within reach' in e.reason for e in estimates[29:]
    )


@pytest.mark.parametrize('pose, says', [
    (torch.full((7,), torch.nan), 'finite'), (torch.zeros(7), 'unit quaternion'),
    (torch.zeros(6), 'seven'),
])
def test_odometry_that_is_none_is_refused(pose, says):
    bundle = Bundle(CAMERA)
    with pytest.raises(ValueError, match=says):
        bundle.add_odometry(1, pose)
    bundle.add_odometry(1, lie.identity())
    with pytest.raises(ValueError, match='not newer'):
        bundle.add_odometry(1, lie.identity())
    with pytest.raises(ValueError, match='covariance'):
        bundle.add_odometry(2, lie.identity(), torch.eye(3))


def test_twice_the_same_gives_the_same_bits():
    y = 0.04 * np.r_[0:25, [24] * 6, 25:35]
    one, two = (
        Film(hall(), poses(y=y, yaw=0.01 * np.arange(41)), covered=range(26, 30)) for _ in range(2)
    )
    assert one.statuses == two.statuses and one.motions == two.motions
    assert torch.equal(one.posed()[1], two.posed()[1])
    assert torch.equal(one.bundle.window.points, two.bundle.window.points)
    ours, theirs = (
        [e.covariance for e in f.estimates if e.covariance is not None] for f in (one, two)
    )
    assert torch.equal(torch.stack(ours), torch.stack(theirs))


def test_the_gradient_of_equation_7_is_the_total_one_under_a_prior():
    """
    Central differences of the objective's optimum, solved again for moved correspondences.

    With the prior in it.
    """
    world = World(path(40), cloud(300, low=(-4, -3, 2), high=(8, 3, 12)), noise_px=0.5)
    exact = AdjustOptions(max_iterations=200, relative_decrease=1e-13, gradient=1e-8)
    options = BundleOptions(keyframes=4, adjust=exact)
    bundle, _ = run(world, options)
    window = bundle.window
    _, posed = surviving(window, list(bundle.state.messages.values()), CAMERA, options.prune_px)
    assert window.prior is not None and posed.prior is not None
    solved = adjust(posed, exact)
    xy = posed.xy.clone().requires_grad_()
    at_optimum = replace(posed, T_world_camera=solved.T_world_camera, points=solved.points, xy=xy)
    (gradient,) = torch.autograd.grad(at_optimum.cost(exact.kernel), xy)
    (alone,) = torch.autograd.grad(replace(at_optimum, prior=None).cost(exact.kernel), xy)
    torch.testing.assert_close(gradient, alone)  # the prior is a constant of the correspondences
    direction = (
        torch.randn(xy.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        / CAMERA.fx
    )

    def optimum(step):
        moved = replace(posed, xy=posed.xy + step * direction)
        solution = adjust(
            replace(moved, T_world_camera=solved.T_world_camera, points=solved.points), exact
        )
        assert solution.converged
        return solution.cost

    difference = (optimum(1e-4) - optimum(-1e-4)) / 2e-4
    assert difference == pytest.approx(float((gradient * direction).sum()), rel=1e-5)
