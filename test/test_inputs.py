"""Which of what comes in trains, and which judges."""

from dataclasses import replace
import itertools

from imatching_ros.bundle.window import Window
from imatching_ros.geometry.camera import Camera
from imatching_ros.geometry.correspondences import Correspondences
from imatching_ros.learning import inputs as inputs_module
from imatching_ros.learning.inputs import Inputs
from imatching_ros.learning.options import LearnerOptions
import numpy as np
import pytest
import torch

CAMERA = Camera(96, 64, 80.0, 80.0, 47.5, 31.5)
EVERY = 3  # one image in so many is a keyframe; its stamp is its number among the images


def keyframes(first, last):
    return [EVERY * k for k in range(first, last)]


def solved(stamps):
    """Return a window of one landmark that all keyframes see."""
    T = torch.zeros(len(stamps), 7, dtype=torch.float64)
    T[:, 6] = 1.0
    return Window(
        torch.tensor(stamps), T, torch.tensor([0]), torch.zeros(1, 3, dtype=torch.float64),
        torch.tensor([len(stamps)]), torch.zeros(1, dtype=torch.float64),
    )


def rows(stamp, model=0):
    """Return what is said of a keyframe: the landmark, found again from each one before."""
    before = torch.tensor(keyframes(0, stamp // EVERY), dtype=torch.int64)
    count = len(before)
    return Correspondences(
        stamp, torch.zeros(count, 2), torch.zeros(count, 2), before, torch.zeros(count, 2),
        torch.zeros(count, dtype=torch.int64), torch.ones(count), torch.ones(count, 3), model,
    )


def picture(stamp):
    return np.random.default_rng(stamp).integers(0, 256, (64, 96), np.uint8)


@pytest.fixture(scope='module')
def pictures():
    return [picture(stamp) for stamp in range(100)]


@pytest.fixture
def robot(pictures):
    """Return what makes inputs that have seen all images, but no window yet."""
    def seeing(**options):
        inputs = Inputs(CAMERA, LearnerOptions(**options))
        for stamp, image in enumerate(pictures):
            inputs.add_image(stamp, image)
        for stamp in keyframes(0, 34):
            inputs.add_correspondences(rows(stamp))
        return inputs

    return seeing


def shown(inputs, stamps, held_out=None):
    """Return what became of a window: '-' where it is ignored, else 'trains' or 'judges'."""
    window, lessons = solved(stamps), list(inputs.lessons)
    if not inputs.is_new(window, held_out) or not inputs.add_window(window, held_out):
        return '-'
    return 'judges' if lessons == list(inputs.lessons) else 'trains'


def test_one_window_in_eight_judges_and_the_next_one_with_it(robot):
    inputs = robot()
    said = [shown(inputs, keyframes(max(0, 3 * k - 5), 3 * k + 3)) for k in range(11)]
    judging = [k for k, word in enumerate(said) if word == 'judges']
    assert judging == [1, 2, 9, 10] and '-' not in said
    assert [clip.keyframes for clip in inputs.held_out] == [keyframes(3, 9), keyframes(27, 33)]
    assert inputs.windows == 11 and len(inputs.lessons) == 7


@pytest.mark.parametrize('options', [(2, 2), (3, 1), (1, 3)], ids=str)
def test_no_image_is_looked_at_in_two_clips(robot, options):
    """A clip that has grown once leaves its keyframes to no other: one witness is not two."""
    new, held_out = options
    inputs = robot(new_keyframes=new, held_out=held_out)
    for k in range(24):
        shown(inputs, keyframes(max(0, k - 9), k + 3))
    assert len(inputs.held_out) >= 3
    for one, two in itertools.combinations(inputs.held_out, 2):
        assert not set(one.stamps) & set(two.stamps)


def test_an_image_that_trained_does_not_judge_between_keyframes(robot):
    """Where the camera only turned, the newest keyframe leaves a window whose others stay."""
    inputs = robot(new_keyframes=1)
    assert shown(inputs, [0, 3, 6], held_out=True) == 'judges'
    assert shown(inputs, [0, 3, 6, 9], held_out=False) == 'trains'
    assert shown(inputs, [0, 3, 6, 12], held_out=True) == 'judges'
    clip, = inputs.held_out
    assert clip.keyframes == [0, 3, 6, 12]
    between = [stamp for stamp, _ in clip.between]
    assert {1, 2, 4, 5} < set(between) and set(between) & {7, 8, 10, 11} and 9 not in between


def test_what_is_held_out_trains_in_no_lesson(robot):
    inputs = robot()
    shown(inputs, keyframes(0, 4), held_out=True)
    shown(inputs, keyframes(2, 8), held_out=False)
    lesson, = inputs.lessons
    assert {len(lesson.pairs), len(inputs.trainable(lesson))} == {15, 6}  # of six, and of four
    stamps = lesson.window.stamps.tolist()
    for pair in inputs.trainable(lesson):
        assert min(stamps[pair.reference], stamps[pair.target]) >= keyframes(4, 5)[0]
    # And what has trained is not held out
    shown(inputs, keyframes(5, 11), held_out=True)
    assert inputs.held_out[-1].keyframes == keyframes(8, 11)


def test_a_clip_that_is_to_judge_grows_by_each_keyframe(robot):
    inputs = robot(new_keyframes=3)
    assert shown(inputs, keyframes(0, 4), held_out=True) == 'judges'
    assert shown(inputs, keyframes(0, 4), held_out=True) == '-'  # nothing new
    assert shown(inputs, keyframes(0, 5), held_out=False) == '-'  # too little to train
    assert shown(inputs, keyframes(0, 5), held_out=True) == 'judges'
    assert shown(inputs, keyframes(1, 6), held_out=True) == '-'  # not all of it is in view
    clip, = inputs.held_out
    assert clip.keyframes == keyframes(0, 5)


def test_there_is_enough_when_there_is_something_to_learn_and_something_to_judge_by(robot):
    inputs = robot()
    assert not inputs.complete
    shown(inputs, keyframes(0, 4))
    assert not inputs.complete
    shown(inputs, keyframes(0, 8))
    assert inputs.complete and len(inputs.anchors) == 1
    inputs.forget()
    assert not inputs.complete and not len(inputs.lessons) + len(inputs.held_out)


def test_known_warps_are_of_a_clips_first_image_and_of_its_middle(robot, pictures):
    inputs = robot()
    shown(inputs, keyframes(0, 4), held_out=False)
    shown(inputs, keyframes(0, 11), held_out=True)
    clip, = inputs.held_out
    assert clip.keyframes == keyframes(4, 11)
    for probe, keyframe in zip(clip.probes, (4, 7), strict=True):
        assert np.array_equal(probe.images[0, 0], pictures[EVERY * keyframe])
    anchor, = inputs.anchors
    assert np.array_equal(anchor.images[0, 0], pictures[0])


def test_known_warps_get_the_sensors_pattern_from_some_thirty_images(robot, monkeypatch):
    given = []

    def made(image, others, seed):
        given.append(len(others))

    monkeypatch.setattr(inputs_module, 'make_probe', made)
    for images in (20, 100):
        shown(robot(images=images), keyframes(28, 33))
    assert given[0] == 20 and 20 <= given[1] <= 32


def test_another_recording_may_have_the_same_stamps(robot):
    inputs = robot()
    shown(inputs, keyframes(0, 4))
    other = replace(CAMERA, fx=90.0)
    inputs.start_recording(other)
    assert inputs.camera == other and not inputs.images and not inputs.messages
    assert len(inputs.lessons) == 1 and inputs.lessons[0].camera == CAMERA
    window = solved(keyframes(0, 4))
    assert inputs.is_new(window, None) and not inputs.add_window(window, None)
    assert inputs.oldest_model(window) is None
    for stamp in range(12):
        inputs.add_image(stamp, picture(stamp))
        inputs.add_correspondences(rows(stamp, model=7 - stamp // EVERY))
    assert inputs.oldest_model(window) == 4  # of 7, 6, 5 and 4
    assert inputs.add_window(window, None) and inputs.lessons[-1].camera == other


def test_what_waits_for_its_window_is_bounded(robot):
    inputs = robot(images=5)
    assert list(inputs.images) == list(range(95, 100))
    assert list(inputs.messages) == keyframes(29, 34)
    assert inputs.images_seen == 100
    assert shown(inputs, keyframes(32, 34)) == '-' and inputs.windows == 0
