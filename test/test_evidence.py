"""What is gathered for a model, by a scene and a matcher that are known exactly."""

from imatching_ros.bundle.options import BundleOptions
from imatching_ros.bundle.window import Window
from imatching_ros.geometry.camera import Camera
from imatching_ros.geometry.correspondences import Correspondences
from imatching_ros.learning import evidence
from imatching_ros.learning.evidence import Clip, gather, some_between
from imatching_ros.learning.lesson import Lesson, Pair
from imatching_ros.learning.probe import Probe
from imatching_ros.learning.verdict import judge
from imatching_ros.matching.protocol import Matches
import numpy as np
import pytest
import torch

CAMERA = Camera(160, 120, 150.0, 140.0, 79.5, 59.5)
KEYFRAMES, BETWEEN = (0, 10, 20, 30, 40), (5, 15, 25, 35)  # their stamps
TRACKS = 60
OPTIONS = BundleOptions()


def centre(stamp):
    """Return where the camera stands (3,): it goes sideways, and not quite straight."""
    return torch.tensor([0.02 * stamp, 0.1 * np.sin(stamp / 7), 0.003 * stamp]).double()


def on_the_wall(stamp, uv):
    """Return what pixels (N, 2) of an image see (N, 3), on a wall that stands aslant."""
    ray = torch.cat((CAMERA.normalise(uv.double()), torch.ones(len(uv), 1).double()), -1)
    normal = torch.tensor([-0.4, 0.2, 1.0]).double()
    return centre(stamp) + ray * ((4 - centre(stamp) @ normal) / (ray @ normal))[:, None]


def seen(stamp, points):
    """Return the pixels (N, 2) of an image that see points (N, 3)."""
    offset = points - centre(stamp)
    return CAMERA.project(offset[:, :2] / offset[:, 2:])


def picture(stamp):
    """Return an image (1, H, W) uint8 with many corners, whose first pixel says when it was."""
    noise = np.random.default_rng(stamp).integers(0, 256, (1, 30, 40), np.uint8)
    image = torch.from_numpy(noise.repeat(4, 1).repeat(4, 2))
    image[0, 0, 0] = stamp
    return image


class Knows(torch.nn.Module):
    """A matcher that knows the scene; ``err(reference, target, uv)`` says what it makes of it."""

    def __init__(self, err=lambda reference, target, uv: uv):
        super().__init__()
        self.err, self.weight = err, torch.nn.Parameter(torch.zeros(1))

    def encode(self, images):
        return round(255 * float(images[0, 0, 0, 0]))

    def match(self, reference, target, queries, around=None):
        uv = seen(target, on_the_wall(reference, queries[0])).float()
        uv = self.err(reference, target, uv)[None]
        cov = 0.1 * torch.eye(2).expand(1, uv.shape[1], 2, 2)
        return Matches(uv, uv, torch.ones(uv.shape[:2]), cov)


def lost(uv):
    """Return matches that are anywhere in the image."""
    g = torch.Generator().manual_seed(len(uv))
    return torch.rand(uv.shape, generator=g) * torch.tensor([159.0, 119.0])


def clip_of(tracks):
    """Return a clip; ``tracks`` says how many of the first keyframe's points each one sees."""
    first = torch.rand(TRACKS, 2, generator=torch.Generator().manual_seed(0))
    first = 10 + first * torch.tensor([139.0, 99.0])
    points, messages = on_the_wall(0, first), []
    for stamp, count in zip(KEYFRAMES, tracks, strict=True):
        count = count if stamp else 0
        uv = seen(stamp, points[:count])
        cov = torch.tensor([0.1, 0.0, 0.1]).expand(count, 3)
        messages.append(Correspondences(
            stamp, uv.float(), CAMERA.normalise(uv).float(),
            torch.zeros(count, dtype=torch.int64), first[:count], torch.arange(count),
            torch.ones(count), cov, 0,
        ))
    T = torch.zeros(len(KEYFRAMES), 7, dtype=torch.float64)
    T[:, :3], T[:, 6] = torch.stack([centre(stamp) for stamp in KEYFRAMES]), 1.0
    window = Window(
        torch.tensor(KEYFRAMES), T, torch.arange(TRACKS), points,
        torch.full((TRACKS,), len(KEYFRAMES)), torch.zeros(TRACKS, dtype=torch.float64),
    )
    pairs = [Pair(0, k, torch.arange(len(messages[k]))) for k in range(1, len(KEYFRAMES))]
    lesson = Lesson(CAMERA, [picture(stamp) for stamp in KEYFRAMES], messages, window, pairs)
    uv = torch.tensor([[50.0, 60.0], [80.0, 40.0]])
    truth = seen(10, on_the_wall(0, uv)).float()
    probe = Probe(torch.stack((picture(0), picture(10))), uv, truth + torch.tensor([0.0, 2.0]))
    between = [(stamp, picture(stamp)) for stamp in BETWEEN]
    return Clip(lesson, list(range(len(KEYFRAMES))), between, [probe])


@pytest.fixture(scope='module')
def clip():
    return clip_of([TRACKS] * 5)


def test_who_knows_the_scene_agrees_in_every_view(clip):
    found = gather(Knows(), clip, OPTIONS)
    corners = sum(map(len, clip.corners.values()))
    assert corners > 100 and len(found.error) == 8 * corners  # of nine views, all but its own
    assert found.error.max() < 0.02
    assert set(found.view.tolist()) == {*KEYFRAMES, *BETWEEN}
    assert found.corner.unique(return_counts=True)[1].tolist() == [8] * corners
    first = len(clip.corners[0])  # corners of the first keyframe, which itself is no witness
    assert 0 not in found.view[found.corner < first] and 0 in found.view[found.corner == first]
    assert found.known.tolist() == pytest.approx([2.0, 2.0], abs=1e-3)
    assert found.track_length == pytest.approx(5.0)


def test_an_image_that_cannot_be_posed_is_missed_and_spoils_no_other(clip):
    def lost_in_one(reference, target, uv):
        return lost(uv) if target == 25 else uv

    matcher = Knows(lost_in_one)
    features = dict(enumerate(KEYFRAMES))
    known = [
        evidence._pose_between(matcher, clip.lesson, features, stamp, stamp, OPTIONS)
        for stamp in BETWEEN
    ]
    assert [T is None for T in known] == [False, False, True, False]
    for stamp, T in zip(BETWEEN, known, strict=True):
        assert T is None or torch.allclose(T[:3], centre(stamp), atol=1e-3)
    found = gather(matcher, clip, OPTIONS)
    assert found.error[found.view == 25].isinf().all()
    assert found.error[found.view != 25].max() < 0.02


def test_an_image_is_posed_by_the_landmarks_of_the_keyframe_before(clip):
    """Who finds nothing over more than ten nanoseconds poses all images by their neighbours."""
    matcher = Knows(lambda reference, target, uv: uv if target - reference < 10 else lost(uv))
    features = dict(enumerate(KEYFRAMES))
    for stamp in BETWEEN:
        T = evidence._pose_between(matcher, clip.lesson, features, stamp, stamp, OPTIONS)
        assert torch.allclose(T[:3], centre(stamp), atol=1e-3)
    few = clip_of([TRACKS, TRACKS, 5, TRACKS, TRACKS]).lesson
    for stamp, posed in zip(BETWEEN, (True, True, False, True), strict=True):
        T = evidence._pose_between(Knows(), few, features, stamp, stamp, OPTIONS)
        assert (T is not None) == posed


def test_under_whom_the_window_falls_apart_nothing_agrees(clip):
    """The points are the same ones, in the same order, so that he can be judged."""
    fallen = gather(Knows(lambda reference, target, uv: lost(uv)), clip, OPTIONS)
    found = gather(Knows(), clip, OPTIONS)
    assert fallen.error.isinf().all() and fallen.track_length == 0
    assert torch.equal(fallen.view, found.view) and torch.equal(fallen.corner, found.corner)
    assert (fallen.known > 3).all()
    said = judge([fallen], [found])
    assert said.mark == -1 and said.figures['gain'] == -100
    assert said.figures['track_length'] == 0 and said.figures['track_length_before'] == 5


def a_third(uv, off):
    """Return matches of which every third is off."""
    third = torch.arange(len(uv)) % 3 == 0
    return torch.where(third[:, None], uv + torch.tensor([0.0, off]), uv)


def test_matches_that_are_off_in_one_view_are_wrong_there_alone(clip):
    matcher = Knows(lambda reference, target, uv: a_third(uv, 1.4) if target == 15 else uv)
    found = gather(matcher, clip, OPTIONS)
    there = found.error[found.view == 15]
    assert 0.25 < (there > 0.9).double().mean() < 0.4 and (there < 2).all()
    assert (found.error[found.view != 15] < 0.5).double().mean() > 0.95


def test_what_all_views_take_for_the_corner_is_wrong_in_all(clip):
    """They agree with one another, for what they see is next to the corner."""
    matcher = Knows(lambda reference, target, uv: a_third(uv, 5.6) if reference == 20 else uv)
    found = gather(matcher, clip, OPTIONS)
    first = sum(len(clip.corners[k]) for k in (0, 1))
    own = (found.corner >= first) & (found.corner < first + len(clip.corners[2]))
    assert 0.25 < (found.error[own] > 4).double().mean() < 0.4
    assert (found.error[~own] < 0.5).double().mean() > 0.95


def test_images_between_keyframes_are_few_and_spread_and_only_where_both_judge():
    images = dict.fromkeys([*range(0, 41), 52, 56, 65, 80])
    stamps = [0, 10, 20, 40, 50, 60, 70, 80]
    chosen = [stamp for stamp, _ in some_between(images, stamps, [0, 1, 3, 4, 5, 6, 7])]
    # Three of nine; none next to the third; none where there are none; two; one; none
    assert chosen == [3, 5, 7, 52, 56, 65]


def test_a_point_is_told_by_three_other_views(clip):
    xy = torch.stack(
        [CAMERA.normalise(seen(s, on_the_wall(0, clip.corners[0]))) for s in KEYFRAMES], 1
    )
    T = clip.lesson.window.T_world_camera
    for count in (2, 3, 4, 5):
        usable = torch.arange(5) < count
        error = evidence._left_out(T, xy, usable, clip.lesson)
        assert error[:, ~usable].isinf().all()
        assert (error[:, usable] < 1e-4).all() if count > 3 else error.isinf().all()
