"""Accuracy figures against scenes and error lists whose answers are known."""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
from imatching_ros.data.recording import open_recording
from imatching_ros.data.synthetic import render_recording
from imatching_ros.evaluation.matching import (
    accuracy,
    BORDER_PX,
    evaluate_matching,
    evaluation_pairs,
    match_pairs,
    Pair,
    pose_auc,
    true_matches,
)
from imatching_ros.evaluation.measure import compare, Comparison, GAP
from imatching_ros.evaluation.trajectory import associate, trajectory_accuracy
from imatching_ros.geometry import lie
from imatching_ros.geometry.camera import Camera
from imatching_ros.matching.protocol import Matches
import numpy as np
import pytest
import torch

CAMERA = Camera(320, 240, 300.0, 300.0, 159.5, 119.5)
FRAME_NS = 33_333_333


@dataclass
class World:
    """A recording of given poses: a wall at z = 4 m behind a strip |x| < 0.3 m at z = 2 m."""

    T_world_camera: torch.Tensor
    strip: bool = True
    camera: Camera = CAMERA
    with_depth: bool = True
    stamps: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.stamps = np.arange(len(self.T_world_camera)) * FRAME_NS
        noise = np.random.default_rng(0).uniform(0, 255, (2, 1024, 1024)).astype(np.float32)
        self._textures = [
            cv2.normalize(cv2.GaussianBlur(n, (0, 0), 3), None, 20, 235, cv2.NORM_MINMAX)
            for n in noise
        ]
        self._frames = [self._render(T) for T in self.T_world_camera]

    @property
    def ground_truth(self):
        return self.stamps, self.T_world_camera

    def __len__(self) -> int:
        return len(self.stamps)

    def __iter__(self):
        for k, stamp in enumerate(self.stamps.tolist()):
            image = self._frames[k][0].copy()
            image[0, 0] = k  # tells an all-knowing matcher which frame it sees
            yield stamp, image

    def camera_of(self, stamp: int):
        return self.camera

    def depth(self, stamp: int):
        return self._frames[stamp // FRAME_NS][1] if self.with_depth else None

    def _render(self, T):
        v, u = np.mgrid[:CAMERA.height, : CAMERA.width]
        rays = np.stack(
            ((u - CAMERA.cx) / CAMERA.fx, (v - CAMERA.cy) / CAMERA.fy, np.ones_like(u)), -1
        )
        Rt = lie.matrix(T).numpy()
        directions, centre = rays @ Rt[:, :3].T, Rt[:, 3]
        image = depth = None
        for z, texture in zip((4.0, 2.0), self._textures, strict=True):
            t = (z - centre[2]) / directions[..., 2]
            x, y = (centre[k] + t * directions[..., k] for k in (0, 1))
            colour = cv2.remap(
                texture, (x * 150 + 512).astype(np.float32), (y * 150 + 512).astype(np.float32),
                cv2.INTER_LINEAR,
            )
            if image is None:
                image, depth = colour, t
            elif self.strip:
                near = np.abs(x) < 0.3
                image, depth = np.where(near, colour, image), np.where(near, t, depth)
        return image.round().astype(np.uint8), depth.astype(np.float32)


@dataclass
class Oracle:
    """A matcher that knows the scene, and adds a known error; on the way back it takes it away."""

    world: World
    error: torch.Tensor = field(default_factory=lambda: torch.zeros(1))
    family = 'oracle'

    def encode(self, images):
        return round(images[0, 0, 0, 0].item() * 255)

    def match(self, reference, target, queries, around=None):
        poses = self.world.T_world_camera
        motion = lie.compose(lie.inverse(poses[target]), poses[reference])
        depth = torch.as_tensor(self.world._frames[reference][1], dtype=torch.float64)
        u, v = queries[0].round().long().unbind(-1)
        z = depth[v.clamp(0, CAMERA.height - 1), u.clamp(0, CAMERA.width - 1)]
        xy = CAMERA.normalise(queries[0].double())
        points = lie.act(motion, torch.cat((xy, torch.ones_like(xy[:, :1])), -1) * z[:, None])
        uv = CAMERA.project(points[:, :2] / points[:, 2:])
        error = self.error[torch.arange(len(uv)) % len(self.error)]
        uv[:, 1] += error if target > reference else -error
        return _matches(uv.float())


class Klt:
    family = 'klt'

    def encode(self, images):
        return (images[0, 0] * 255).round().byte().numpy()

    def match(self, reference, target, queries, around=None):
        uv, found, _ = cv2.calcOpticalFlowPyrLK(
            reference, target, queries[0].nan_to_num().numpy(), None, maxLevel=4
        )
        uv[found[:, 0] == 0] = np.nan
        return _matches(torch.as_tensor(uv))


def _matches(uv):
    return Matches(
        uv[None], uv[None], torch.ones(1, len(uv)), torch.eye(2).expand(1, len(uv), 2, 2)
    )


def _poses(positions, turn=0.0):
    """Cameras at ``positions`` (N, 3), each turned about y by ``turn`` rad more than the last."""
    positions = torch.as_tensor(positions, dtype=torch.float64)
    T = lie.identity(len(positions))
    T[:, :3] = positions
    half = 0.5 * turn * torch.arange(len(positions), dtype=torch.float64)
    T[:, 4], T[:, 6] = half.sin(), half.cos()
    return T


def _sideways(frames, step=0.04):
    return _poses([[k * step, 0.3 * k * step, 0.0] for k in range(frames)], turn=-0.004)


def test_known_errors_give_exactly_known_percentages():
    # the whole image moves 15 px to the left
    world = World(_poses([[0.0, 0.0, 0.0], [0.2, 0.0, 0.0]]), strip=False)
    error = torch.tensor([0.5, 0.9, 0.0, 0.3, 1.5, 1.9, 1.2, 3.0, 4.0, 50.0])
    (match,) = match_pairs(Oracle(world, error), world, evaluation_pairs(world, 0, 1, steps=(1,)))
    inside = (match.queries[:, 0] - 15 >= BORDER_PX) & (
        match.queries[:, 0] - 15 <= CAMERA.width - 1 - BORDER_PX
    )
    assert torch.equal(match.visible, inside) and 0 < inside.sum() < len(inside)
    assert torch.allclose(
        match.true_uv[inside], match.queries[inside] - torch.tensor([15.0, 0.0]), atol=1e-3
    )
    expected = error[torch.arange(len(inside)) % 10]
    assert torch.allclose(match.error_px[inside], expected[inside], atol=1e-3)
    assert match.error_px[~inside].isnan().all()
    figures = accuracy([match])
    for value, threshold in ((figures.mma_1px, 1), (figures.mma_2px, 2), (figures.mma_5px, 5)):
        assert value == pytest.approx(100 * (expected[inside] <= threshold).float().mean().item())
    assert (figures.pairs, figures.points) == (1, int(inside.sum()))


def test_accuracy_is_averaged_over_pairs_not_points():
    world = World(_sideways(2))
    (match,) = match_pairs(Oracle(world), world, evaluation_pairs(world, 0, 1, steps=(1,)))
    few = torch.zeros_like(match.visible)
    few[match.visible.nonzero()[:20, 0]] = True
    wrong = type(match)(
        **{**vars(match), 'visible': few, 'error_px': torch.full_like(match.error_px, torch.inf)}
    )
    assert accuracy([match, wrong]).mma_5px == 50.0


def test_points_behind_the_strip_and_at_its_edge_are_not_counted():
    world = World(_poses([[-0.4, 0.0, 0.0], [0.4, 0.0, 0.0]]))
    (pair,) = evaluation_pairs(world, 0, 1, steps=(1,))
    u, v = np.meshgrid(np.arange(10.0, 310.0, 3.0), np.arange(10.0, 230.0, 20.0))
    queries = torch.as_tensor(np.stack((u.ravel(), v.ravel()), -1), dtype=torch.float32)
    uv, visible = true_matches(
        CAMERA, pair, queries, world.depth(pair.reference), world.depth(pair.target)
    )
    # Wall points move by 300 * 0.8 / 4 = 60 px to the left, strip points by 120 px; both cameras
    # see the strip 0.6 m * 300 / 2 = 90 px wide, centred 60 px right of the first's axis and 60 px
    # left of the second's.
    centre = queries[:, 0] - CAMERA.cx
    on_strip = (centre - 60).abs() < 45
    hidden = (centre - 60 + 60).abs() < 45
    in_frame = queries[:, 0] - 60 >= BORDER_PX
    edge = ((centre - 60).abs() - 45).abs() < 2
    behind_edge = (centre.abs() - 45).abs() < 2
    sure = ~edge & ~(behind_edge & ~on_strip)
    expected = on_strip | (~hidden & in_frame)
    assert torch.equal(visible[sure], expected[sure])
    assert (hidden & ~on_strip & in_frame).sum() > 100
    shift = torch.where(on_strip, 120.0, 60.0)
    assert torch.allclose(uv[visible][:, 0], (queries[:, 0] - shift)[visible], atol=1e-3)
    assert uv[~visible].isnan().all()


def test_unknown_depth_is_never_visible():
    world = World(_sideways(2))
    (pair,) = evaluation_pairs(world, 0, 1, steps=(1,))
    queries = torch.tensor([[100.0, 100.0], [200.0, 60.0]])
    hole = world.depth(pair.reference).copy()
    hole[95:105, 95:105] = 0.0
    _, visible = true_matches(CAMERA, pair, queries, hole, world.depth(pair.target))
    assert visible.tolist() == [False, True]
    _, visible = true_matches(CAMERA, pair, queries, None, world.depth(pair.target))
    assert visible.tolist() == [False, False]


def test_perfect_matches_of_a_rendered_recording_are_perfect():
    world = World(_sideways(12))
    figures = evaluate_matching(Oracle(world), world, evaluation_pairs(world, 0, 11))
    assert figures.mma_1px == 100.0
    assert figures.auc_5 > 95.0
    assert figures.pairs == 7 + 2  # steps 5 and 10 fit into 12 frames, 20 does not


def test_a_real_tracker_is_good_but_not_perfect():
    world = World(_sideways(8))
    figures = evaluate_matching(
        Klt(), world, evaluation_pairs(world, 0, 7, steps=(2, 5), per_step=3)
    )
    assert 50.0 < figures.mma_1px <= figures.mma_2px <= figures.mma_5px < 100.0
    assert 30.0 < figures.auc_5 < figures.auc_20 < 100.0


def test_a_real_tracker_on_a_recording_that_the_program_rendered(tmp_path):
    recording = open_recording(
        render_recording(tmp_path / 'recording', seed=1, frames=8, size=(320, 240))
    )
    figures = evaluate_matching(
        Klt(), recording, evaluation_pairs(recording, 0, 7, steps=(2,), per_step=3)
    )
    assert figures.pairs == 3 and figures.points > 300
    assert figures.mma_2px > 60.0


def test_matches_that_are_nan_are_misses():
    class Blind(Klt):

        def match(self, reference, target, queries, around=None):
            return _matches(torch.full_like(queries[0], torch.nan))

    world = World(_sideways(6))
    figures = evaluate_matching(Blind(), world, evaluation_pairs(world, 0, 5, steps=(5,)))
    assert (figures.mma_5px, figures.auc_20) == (0.0, 0.0)
    assert figures.points > 0


def test_before_and_after_are_of_images_that_did_not_train_and_show_the_typical_pair():
    world, said = World(_sideways(24)), []
    three_px, exact = Oracle(world, torch.tensor([3.0])), Oracle(world)
    compared = compare(world, 5, three_px, exact, lambda *started: said.append(started))
    assert (compared.before.mma_1px, compared.before.mma_5px) == (0.0, 100.0)
    assert compared.after.mma_1px == 100.0
    # 14 images are left, of which 9 have one 5 later, and 4 one 10 later
    assert said == [('before', 13), ('after', 13)] and compared.after.pairs == 13
    before, after = compared.typical
    assert before.pair is after.pair and before.pair.reference >= (5 + GAP) * FRAME_NS
    assert before.error_px[before.visible].mean() > 2.9 > after.error_px[after.visible].max()
    assert compare(world, 22, three_px, exact) == Comparison()


def test_without_depth_only_the_pose_is_measured():
    world = World(_sideways(12), with_depth=False)
    truth = World(_sideways(12))
    figures = evaluate_matching(Oracle(truth), world, evaluation_pairs(world, 0, 11))
    assert (figures.mma_1px, figures.mma_2px, figures.mma_5px, figures.points) == (
        None, None, None, 0,
    )
    assert figures.auc_5 > 90.0


def test_standstill_has_no_direction_and_is_left_out_of_the_auc():
    world = World(_poses(np.zeros((6, 3)), turn=0.01))
    figures = evaluate_matching(Oracle(world), world, evaluation_pairs(world, 0, 5, steps=(5,)))
    assert figures.mma_1px == 100.0
    assert (figures.auc_5, figures.auc_10, figures.auc_20) == (None, None, None)


def test_pairs_are_evenly_spread_and_have_truth():
    world = World(_sideways(21))
    pairs = evaluation_pairs(world, 1, 19, steps=(5, 10), per_step=3)
    frames = [(pair.reference // FRAME_NS, pair.target // FRAME_NS) for pair in pairs]
    assert frames == [(1, 6), (7, 12), (14, 19), (1, 11), (5, 15), (9, 19)]
    sparse = World(_sideways(21))
    sparse.depth = lambda stamp: world.depth(stamp) if stamp // FRAME_NS % 5 == 0 else None
    assert all(pair.reference // FRAME_NS % 5 == 0 for pair in evaluation_pairs(sparse, 0, 20))
    assert len(evaluation_pairs(sparse, 0, 20, steps=(5,))) == 4
    assert evaluation_pairs(sparse, 0, 20, steps=(3,)) == []

    class Untruthful(World):
        ground_truth = None

    assert evaluation_pairs(Untruthful(_sideways(6)), 0, 5) == []
    nothing = evaluate_matching(Klt(), world, [])
    assert nothing.mma_1px is None and nothing.auc_5 is None


def test_the_same_pair_turned_round_is_the_inverse_motion():
    world = World(_sideways(6))
    (pair,) = evaluation_pairs(world, 0, 5, steps=(5,))
    back = Pair(pair.target, pair.reference, lie.inverse(pair.T_target_reference), True)
    queries = torch.tensor([[60.0, 60.0], [250.0, 200.0]])
    uv, visible = true_matches(
        CAMERA, pair, queries, world.depth(pair.reference), world.depth(pair.target)
    )
    again, _ = true_matches(
        CAMERA, back, uv, world.depth(pair.target), world.depth(pair.reference)
    )
    assert visible.all() and torch.allclose(again, queries, atol=1e-3)


@pytest.mark.parametrize(
    ('errors', 'threshold', 'percent'),
    [
        ([0.0, 0.0], 5, 100.0),
        ([np.inf, np.inf], 20, 0.0),
        ([7.0], 5, 0.0),
        # Recall: 0 to 1/2 over [0, 1], to 1 over [1, 3], 1 over [3, 5]: (0.25 + 1.5 + 2) / 5.
        ([3.0, 1.0], 5, 75.0),
        # 0 to 1/2 over [0, 2], then 1/2 to 10: (0.5 + 4) / 10.
        ([2.0, np.inf], 10, 45.0),
    ],
)
def test_auc_of_error_lists_worked_out_by_hand(errors, threshold, percent):
    assert pose_auc(errors, threshold) == pytest.approx(percent)


def _walk(count=50):
    positions = np.cumsum(np.random.default_rng(1).normal(size=(count, 3)), axis=0)
    return np.arange(count) * FRAME_NS, _poses(positions, turn=0.1).numpy()


def test_a_similarity_of_the_truth_has_no_error():
    stamps, truth = _walk()
    turn = torch.nn.functional.normalize(
        torch.tensor([0.3, -0.5, 0.2, 0.7], dtype=torch.float64), dim=0
    )
    moved = torch.as_tensor(truth).clone()
    moved[:, :3] = 0.37 * lie.rotate(turn.expand(50, 4), moved[:, :3]) + torch.tensor(
        [5.0, -2.0, 9.0]
    )
    result = trajectory_accuracy(stamps, moved, (stamps, truth))
    assert result.ate_m == pytest.approx(0.0, abs=1e-9)
    assert result.path_m == pytest.approx(
        np.linalg.norm(np.diff(truth[:, :3], axis=0), axis=1).sum()
    )
    np.testing.assert_allclose(result.estimate, truth[:, :3], atol=1e-9)


def test_known_noise_gives_the_expected_error():
    # Out-of-plane noise +a -a ... on a circle of radius r is orthogonal to every rotation and
    # shift; the best scale shrinks the estimate by r^2 / (r^2 + a^2), which leaves a mean square
    # of r^2 a^2 / (r^2 + a^2).
    radius, noise, count = 2.0, 0.1, 40
    angle = 2 * np.pi * np.arange(count) / count
    truth = _poses(
        np.stack((radius * np.cos(angle), radius * np.sin(angle), 0 * angle), -1)
    ).numpy()
    estimate = truth.copy()
    estimate[:, 2] = noise * (-1.0) ** np.arange(count)
    stamps = np.arange(count) * FRAME_NS
    result = trajectory_accuracy(stamps, estimate, (stamps, truth))
    assert result.ate_m == pytest.approx(radius * noise / np.hypot(radius, noise), rel=1e-9)
    assert result.ate_percent == pytest.approx(100 * result.ate_m / result.path_m)


def test_only_stamps_within_tolerance_are_compared():
    stamps, truth = _walk()
    late = stamps[::3] + 4_000_000
    wild = truth[::3].copy()
    result = trajectory_accuracy(late, wild, (stamps, truth), tolerance_ns=5_000_000)
    assert result.poses == len(late) and result.ate_m == pytest.approx(0.0, abs=1e-9)
    assert trajectory_accuracy(late, wild, (stamps, truth), tolerance_ns=3_000_000).poses == 0
    index, other = associate(np.array([0, 10, 26, 99]), np.array([25, 0, 12]), 2)
    assert (index.tolist(), other.tolist()) == ([0, 1, 2], [1, 2, 0])


def test_an_error_that_cannot_be_had_is_none():
    stamps, truth = _walk()
    assert trajectory_accuracy(stamps, truth, None).ate_m is None
    assert trajectory_accuracy(stamps[:0], truth[:0], (stamps, truth)).path_m is None
    two = trajectory_accuracy(stamps[:2], truth[:2], (stamps, truth))
    assert (two.ate_m, two.ate_percent) == (None, None) and two.path_m > 0
    still = truth.copy()
    still[:, :3] = 1.0
    assert trajectory_accuracy(stamps, still, (stamps, truth)).ate_m is None
