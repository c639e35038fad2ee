"""The objective without bundle adjustment, to compare with."""

from imatching_ros.data.recording import open_recording
from imatching_ros.geometry import lie
from imatching_ros.geometry.camera import Camera
from imatching_ros.learning import sgp
from imatching_ros.learning.lesson import (
    Lesson,
    Pair,
)
from lessons import taught
import numpy as np
import pytest
import torch


@pytest.fixture
def sgp_learner(shipped, night, events):
    return taught(shipped, night, events, objective='sgp')


def test_epipolar_distance_is_in_pixels():
    camera = Camera(640, 480, 500.0, 500.0, 320.0, 240.0)
    T = torch.tensor([1.0, 0.2, 0.1, 0.05, -0.1, 0.02, 1.0], dtype=torch.float64)
    T = torch.cat((T[:3] / T[:3].norm(), T[3:] / T[3:].norm()))
    g = torch.Generator().manual_seed(0)
    uv_i = torch.rand(50, 2, generator=g, dtype=torch.float64) * torch.tensor([640, 480])
    rays = torch.cat((camera.normalise(uv_i), torch.ones(50, 1)), -1)
    points = lie.act(T, rays * (2 + 8 * torch.rand(50, 1, generator=g, dtype=torch.float64)))
    uv_j = camera.project(points[:, :2] / points[:, 2:])
    assert sgp.epipolar_distance(camera, T, uv_i, uv_j).max() < 1e-9
    # Along its line a point may lie anywhere, off it every pixel counts.
    further = lie.act(T, rays * 12.0)
    along = camera.project(further[:, :2] / further[:, 2:]) - uv_j
    along = along / along.norm(dim=-1, keepdim=True)
    across = torch.stack((-along[:, 1], along[:, 0]), -1)
    assert sgp.epipolar_distance(camera, T, uv_i, uv_j + 3 * along).max() < 1e-6
    assert sgp.epipolar_distance(camera, T, uv_i, uv_j + 3 * across).sub(3).abs().max() < 1e-6


def test_the_teacher_finds_the_true_poses_and_believes_no_noise(shipped, dusk, sgp_learner):
    recording = open_recording(dusk)
    stamps, poses = recording.ground_truth
    lesson = sgp_learner.inputs.lessons[0]
    labels = sgp.teach(shipped[0], lesson, lesson.pairs)
    assert len(labels.T) >= len(lesson.pairs) / 2
    rotation, direction = [], []
    for (i, j), T in labels.T.items():
        true_i, true_j = (
            poses[(stamps == lesson.window.stamps[k]).nonzero().item()] for k in (i, j)
        )
        truth = lie.compose(lie.inverse(true_j), true_i)
        rotation.append(
            2 * torch.acos((T[3:] * truth[3:]).sum().abs().clamp(max=1)).rad2deg().item()
        )
        direction.append(
            torch.acos((T[:3] @ truth[:3] / truth[:3].norm()).clamp(-1, 1)).rad2deg().item()
        )
    assert np.median(rotation) < 1.0 and np.median(direction) < 20.0
    noise = torch.randint(0, 255, (2, 1, 240, 320), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    pair = Pair(0, 1, torch.arange(5))
    empty = Lesson(lesson.camera, list(noise), lesson.messages, lesson.window, [pair])
    assert sgp.teach(shipped[0], empty, [pair]).T == {}
    assert sgp.student_loss(shipped[0], empty, sgp.Labels({}, {}), [pair])[1] == 0


def test_the_student_comes_closer_to_the_teacher(sgp_learner):
    lesson = sgp_learner.inputs.lessons[0]
    labels = sgp.teach(sgp_learner.candidate.matcher, lesson, lesson.pairs)
    pairs = labels.labelled(lesson.pairs)[:2]
    optimiser = torch.optim.Adam(sgp_learner.candidate.matcher.parameters(), lr=2e-4)
    losses = []
    for _ in range(6):
        loss, rows = sgp.student_loss(sgp_learner.candidate.matcher, lesson, labels, pairs)
        losses.append(loss.item() / rows)
        optimiser.zero_grad()
        (loss / rows).backward()
        optimiser.step()
    assert rows > 100 and losses[-1] < 0.95 * losses[0]


def test_it_is_an_objective_of_the_same_trainer(shipped, night, events, sgp_learner):
    other = taught(shipped, night, events)
    assert sgp_learner.windows == other.windows and sgp_learner.weights() == other.weights()
    for one, two in zip(sgp_learner.inputs.lessons, other.inputs.lessons, strict=True):
        assert all(map(torch.equal, one.images, two.images))
    before = sgp_learner.candidate.matcher.log_scale_fine.item()
    step = sgp_learner.step()
    assert step.step == 1 and step.rows > 100 and np.isfinite(step.loss)
    assert sgp_learner.candidate.matcher.log_scale_fine.item() != before
    verdict = sgp_learner.verdict(now=True)
    assert {'gain', 'reprojection_1px', 'known_1px'} <= verdict.figures.keys()
