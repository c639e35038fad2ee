"""What the tests of the upper level share: a recording as the nodes would tell it to a learner."""

from imatching_ros.bundle.bundle import Bundle
from imatching_ros.learning.learner import Learner
from imatching_ros.learning.options import LearnerOptions
from imatching_ros.matching import weights
from imatching_ros.matching.tracker import Tracker
import torch

# of the recording in dim light: images that train, and the first that is measured
TRAINED, MEASURED = 56, 60


def recorded(matcher, camera, images, options=None):
    """Return (stamp, image, correspondences, window or None) of each image."""
    tracker, bundle = Tracker(matcher, 0, camera, options), Bundle(camera)
    events = []
    for stamp, image in images:
        correspondences = tracker.track(stamp, image)
        events.append((stamp, image, correspondences, bundle.add(correspondences).window))
    return events


def teach(learner, events):
    for stamp, image, correspondences, window in events:
        learner.add_image(stamp, image)
        learner.add_correspondences(correspondences)
        if window is not None:
            learner.add_window(window)
    return learner


def taught(shipped, night, events, **options):
    return teach(Learner(*shipped, night[0], LearnerOptions(**options)), events)


def state(data):
    return weights.loads(data)[0].state_dict()


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
