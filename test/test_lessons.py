"""Lessons, and the probes whose truth is known."""

from dataclasses import replace
import random

import cv2
from imatching_ros.bundle.options import BundleOptions
from imatching_ros.bundle.solver.adjust import adjust, AdjustOptions
from imatching_ros.learning.corners import with_corners
from imatching_ros.learning.lesson import (
    encode,
    make_lesson,
    rematch,
    resolve,
    select,
    survivors_of,
)
from imatching_ros.learning.probe import make_probe, probe_error
from imatching_ros.matching.families.expectation import ExpectationMatcher
from imatching_ros.matching.protocol import FAILED
from imatching_ros.matching.warps import apply_homography
import numpy as np
import pytest
import torch


def test_a_lesson_is_joined_by_stamp_and_complete_or_not_at_all(night, events):
    camera = night[0]
    window = [e[3] for e in events if e[3]][3]
    messages, images = (
        {e[0]: e[2] for e in events},
        {e[0]: torch.tensor(e[1])[None] for e in events},
    )
    lesson = make_lesson(window, messages, images, camera)
    for pair in lesson.pairs:
        message = lesson.messages[pair.target]
        assert pair.reference < pair.target
        assert (message.ref_stamp[pair.rows] == window.stamps[pair.reference]).all()
        assert torch.isin(message.track, window.track).all()
    assert torch.equal(lesson.images[2], images[int(window.stamps[2])])
    assert lesson.error_px().isfinite().all()
    for without in (messages, images):
        less = {stamp: value for stamp, value in without.items() if stamp != int(window.stamps[1])}
        joined = (less, images) if without is messages else (messages, less)
        assert make_lesson(window, *joined, camera) is None
    empty = {
        stamp: select(message, torch.zeros(len(message), dtype=torch.bool))
        for stamp, message in messages.items()
    }
    assert make_lesson(window, empty, images, camera) is None


def test_rematching_asks_the_same_and_resolving_settles(shipped, night, events):
    camera = night[0]
    window = [e[3] for e in events if e[3]][3]
    messages, images = (
        {e[0]: e[2] for e in events},
        {e[0]: torch.tensor(e[1])[None] for e in events},
    )
    lesson = make_lesson(window, messages, images, camera)
    again = rematch(shipped[0], lesson)
    for one, two in zip(lesson.messages, again.messages, strict=True):
        assert torch.equal(one.ref_uv, two.ref_uv) and torch.equal(one.track, two.track)
    with torch.no_grad():
        features = encode(shipped[0], lesson, lesson.pairs)
    for pair in lesson.pairs:
        # Same weights, same answer: as a match there and not back
        one, two = lesson.messages[pair.target], again.messages[pair.target]
        with torch.no_grad():
            there = shipped[0].match(
                features[pair.reference], features[pair.target], one.ref_uv[pair.rows][None]
            ).uv[0]
        close = (there - two.uv[pair.rows]).norm(dim=-1) < 1e-2
        assert close.float().mean() > 0.95
        assert (one.uv - two.uv)[pair.rows].norm(dim=-1).median() < 0.5
    solved = resolve(again, BundleOptions())
    posed = survivors_of(solved, BundleOptions().prune_px).problem
    assert adjust(posed).cost == pytest.approx(posed.cost(AdjustOptions().kernel).item(), rel=1e-5)
    # A matcher that finds nothing leaves no window.
    broken = [
        replace(m, xy=torch.rand(m.xy.shape, generator=torch.Generator().manual_seed(0)))
        for m in again.messages
    ]
    assert resolve(replace(again, messages=broken), BundleOptions(min_landmarks=100)) is None


def test_new_corners_are_sought_in_every_other_keyframe(shipped, night, events):
    window = [e[3] for e in events if e[3]][-1]
    lesson = make_lesson(
        window, {e[0]: e[2] for e in events}, {e[0]: torch.tensor(e[1])[None] for e in events},
        night[0],
    )
    with torch.no_grad():
        features = encode(shipped[0], lesson, lesson.pairs)
    again, more = (
        with_corners(shipped[0], lesson, lesson.pairs, features, random.Random(1), count=100)
        for _ in range(2)
    )
    added = more.pairs[len(lesson.pairs):]
    references = {pair.reference for pair in added}
    assert more.pairs[:len(lesson.pairs)] == lesson.pairs and len(references) == 3
    assert {(p.reference, p.target) for p in added} == {
        (i, j) for i in references for j in range(len(window.stamps)) if i != j
    }
    known = torch.cat([message.track for message in lesson.messages])
    for old, new, same in zip(lesson.messages, more.messages, again.messages, strict=True):
        assert torch.equal(new.uv[:len(old)], old.uv) and torch.equal(new.uv, same.uv)
        assert not torch.isin(new.track[len(old):], known).any()
        assert bool((new.score[len(old):] >= FAILED).all())
    # Most of them are landmarks of the window that is solved with them
    solved = resolve(more, BundleOptions())
    sought = torch.cat([more.messages[p.target].track[p.rows] for p in added]).unique()
    assert torch.isin(sought, solved.window.track).double().mean() > 0.5


def test_the_truth_of_a_probe_is_where_the_scene_went(day):
    images = [image for _, image in day[1][::6]]
    probe = make_probe(images[1], images, 3)
    assert probe.images.shape == (2, 1, 240, 320) and len(probe.queries) == len(probe.truth) > 100
    assert torch.equal(probe.images[0, 0], torch.tensor(images[1]))
    assert (probe.truth - probe.queries).norm(dim=-1).median() > 3
    queries, truth = probe.queries.numpy(), probe.truth.numpy()
    H = cv2.findHomography(queries, truth)[0]
    assert np.abs(apply_homography(H, queries) - truth).max() < 1e-3
    # Carried back by the truth, the second image lies on the first: KLT, begun there, stays but
    # for the noise.
    one, two = probe.images[:, 0].numpy()

    def offset(H):
        back = cv2.warpPerspective(two, np.linalg.inv(H), (320, 240))
        flags = cv2.OPTFLOW_USE_INITIAL_FLOW
        found, ok, _ = cv2.calcOpticalFlowPyrLK(one, back, queries, queries.copy(),
                                                winSize=(15, 15), maxLevel=0,
                                                flags=flags)
        return np.median((found - queries)[ok.ravel() == 1], 0)

    assert np.abs(offset(H)).max() < 0.1
    assert offset(H + 0.5 * np.outer([1, 0, 0], H[2]))[0] < -0.2  # half a pixel would show
    again, other = make_probe(images[1], images, 3), make_probe(images[1], images, 4)
    assert torch.equal(probe.images, again.images) and not torch.equal(probe.images, other.images)


def test_a_probe_tells_a_good_matcher_from_a_bad_one(shipped, day):
    probe = make_probe(day[1][0][1], [image for _, image in day[1][::6]], 0)
    error = probe_error(shipped[0], probe)
    torch.manual_seed(0)
    assert error.median() < 1.0 and probe_error(ExpectationMatcher().eval(), probe).median() > 5


def test_the_noise_of_a_probe_stays_with_the_pixels():
    # A smooth scene seen by a sensor with a fixed pattern: in the warped image the pattern is
    # where it was.
    rng = np.random.default_rng(0)
    scene = cv2.GaussianBlur(rng.uniform(0, 1, (240, 320)).astype(np.float32), (0, 0), 12)
    scene = 60 + 130 * (scene - scene.min()) / np.ptp(scene)
    pattern = rng.normal(0, 8, (240, 320)).astype(np.float32)
    images = [np.clip(np.roll(scene, 20 * k, 1) + pattern + rng.normal(0, 3, scene.shape), 0,
                      255).astype(np.uint8)
              for k in range(6)]
    probe = make_probe(images[0], images, 1)
    first, second = (image[0].float().numpy() for image in probe.images)
    high = second - cv2.GaussianBlur(second, (0, 0), 5.0)
    middle = np.s_[60:180, 80:240]  # the warp leaves the corners empty
    assert np.corrcoef(high[middle].ravel(), pattern[middle].ravel())[0, 1] > 0.7
    # Carried along with the scene it would be found here:
    H = cv2.findHomography(probe.queries.numpy(), probe.truth.numpy())[0]
    carried = cv2.warpPerspective(pattern, H, (320, 240))
    inside = cv2.warpPerspective(np.ones_like(pattern), H, (320, 240)) > 0.99
    assert abs(np.corrcoef(high[inside], carried[inside])[0, 1]) < 0.1
