"""A recording whose camera changes: what is followed, and what begins anew, in every core."""

from dataclasses import replace

import cv2
from imatching_ros.bundle.bundle import Bundle, NEW_MAP, TRACKING
from imatching_ros.geometry.camera import FOLLOWED_PX
from imatching_ros.learning.learner import Learner
from imatching_ros.matching.tracker import Tracker
from imatching_ros.pipeline import track_and_solve
from lessons import TRAINED
import numpy as np
import pytest
from test_bundle import CAMERA, cloud, path, World
import torch


class Changing:
    """Images with the camera of each."""

    def __init__(self, images, cameras):
        self.images, self.cameras = images, dict(zip([s for s, _ in images], cameras, strict=True))
        self.camera_of = self.cameras.__getitem__

    def __iter__(self):
        return iter(self.images)


def odometry(shipped, images, camera):
    tracker, bundle = Tracker(shipped[0], 0, camera), Bundle(camera)
    return bundle, list(track_and_solve(images, tracker, bundle))


def test_the_pipeline_is_tracker_and_bundle(shipped, day):
    camera, images = day
    tracker, bundle = Tracker(shipped[0], 0, camera), Bundle(camera)
    expected = [bundle.add(tracker.track(stamp, image)) for stamp, image in images[3:20]]
    again, frames = Bundle(camera), []
    for frame in track_and_solve(images, Tracker(shipped[0], 0, camera), again, 3, 20):
        frames.append(frame)
    assert [frame.stamp for frame in frames] == [stamp for stamp, _ in images[3:20]]
    assert all(frame.image is image for frame, (_, image) in zip(frames, images[3:], strict=False))
    assert {frame.camera for frame in frames} == {camera}
    assert sum(frame.is_keyframe for frame in frames) >= again.keyframes > 1
    for frame, estimate in zip(frames, expected, strict=True):
        assert frame.estimate.status == estimate.status
        T = estimate.T_world_camera
        assert T is None or torch.equal(T, frame.estimate.T_world_camera)


def test_autofocus_is_followed_and_the_map_stays(shipped, night, events):
    """The images of a camera whose focal length breathes, with and without that in them."""
    camera, images = night[0], night[1][:TRAINED]
    rng = np.random.default_rng(0)
    cameras, zoomed = [], []
    for stamp, image in images:
        z = 1 + 2e-3 * rng.standard_normal()
        cameras.append(replace(camera, fx=z * camera.fx, fy=z * camera.fy))
        warp = np.array([[z, 0, (1 - z) * camera.cx], [0, z, (1 - z) * camera.cy]])
        zoomed.append((stamp, cv2.warpAffine(image, warp, image.shape[::-1])))
    windows = [window for *_, window in events if window is not None]
    plain = torch.cat([window.stamps for window in windows]).unique()
    bundle, frames = odometry(shipped, Changing(zoomed, cameras), camera)
    assert bundle.maps == 1 and bundle.camera == cameras[-1]
    assert abs(len(bundle.trajectory) - len(plain)) <= 1
    assert sum(f.estimate.status == TRACKING for f in frames) > 30
    assert [frame.camera for frame in frames] == cameras


def test_another_camera_begins_a_new_map_where_the_last_ended(shipped, night):
    """Half of the images are those of a camera of half the size."""
    camera, images = night
    half = camera.scaled(0.5, 0.5)
    small = [
        (stamp, cv2.resize(image, (half.width, half.height), interpolation=cv2.INTER_AREA))
        for stamp, image in images[40:]
    ]
    cameras = [camera] * 40 + [half] * len(small)
    bundle, frames = odometry(shipped, Changing(images[:40] + small, cameras), camera)
    before = [stamp for stamp in bundle.trajectory if stamp < images[40][0]]
    assert len(before) > 3 and bundle.camera == half
    assert len(frames[40].correspondences) == 0 and frames[40].is_keyframe
    assert {f.estimate.status for f in frames[40:]} <= {NEW_MAP, TRACKING}
    assert bundle.maps == 2 and max(bundle.trajectory) > images[40][0]


@pytest.mark.parametrize('moved', [0.5 * FOLLOWED_PX, 2 * FOLLOWED_PX])
def test_the_bundle_forgets_its_map_only_for_another_camera(moved):
    world = World(path(30), cloud())
    bundle = Bundle(CAMERA)
    for message in world.messages[:20]:
        bundle.add(message)
    known, window = dict(bundle.trajectory), bundle.window
    assert window is not None
    bundle.recalibrate(replace(CAMERA, cx=CAMERA.cx + moved))
    assert (bundle.window is window) == (moved < FOLLOWED_PX)
    assert bundle.trajectory == known and bundle.camera.cx == CAMERA.cx + moved


def test_the_learner_keeps_what_it_has_learned_and_joins_no_images_of_two_cameras(shipped, day):
    camera, images = day
    learner = Learner(*shipped, camera)
    for stamp, image in images[:5]:
        learner.add_image(stamp, image)
    learner.recalibrate(replace(camera, fx=1.001 * camera.fx))
    assert len(learner.inputs.images) == 5 and learner.camera.fx == 1.001 * camera.fx
    learner.recalibrate(replace(camera, fx=1.1 * camera.fx))
    assert len(learner.inputs.images) == 0 and learner.camera.fx == 1.1 * camera.fx
    assert learner.weights() == Learner(*shipped, camera).weights()
