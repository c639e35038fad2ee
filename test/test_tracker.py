"""The tracker, on rendered images and with the shipped weights."""

import copy
from dataclasses import replace

import cv2
from features import corners, encoded
from imatching_ros.geometry.camera import Camera
from imatching_ros.matching.detector import SPACING
from imatching_ros.matching.protocol import FAILED
from imatching_ros.matching.tracker import round_trip, Tracker, TrackerOptions
import numpy as np
import pytest
import torch


@pytest.fixture(scope='module')
def matcher(shipped):
    return shipped[0]


@pytest.fixture(scope='module')
def tracked(shipped, day):
    """Return correspondences of the daylight recording, and each image's keyframes."""
    return track(shipped[0], *day)


def track(matcher, camera, images, options=None):
    tracker = Tracker(matcher, 0, camera, options)
    messages, keyframes = [], []
    for stamp, image in images:
        keyframes.append(tracker.keyframes)
        messages.append(tracker.track(stamp, image))
    return messages, keyframes


def test_the_first_image_is_a_keyframe_without_rows(tracked, day):
    messages, keyframes = tracked
    assert len(messages[0]) == 0 and messages[0].stamp == day[1][0][0]
    assert keyframes[:2] == [[], [day[1][0][0]]]
    assert [message.stamp for message in messages] == [stamp for stamp, _ in day[1]]


@pytest.mark.parametrize('references', [1, 2, 3])
def test_every_image_is_matched_with_its_past_keyframes(shipped, day, references):
    messages, keyframes = track(
        shipped[0], day[0], day[1][:24], TrackerOptions(references=references)
    )
    seen = []
    for message, past in zip(messages[1:], keyframes[1:], strict=True):
        seen += [stamp for stamp in past if stamp not in seen]
        assert past == seen[-references:] and all(stamp < message.stamp for stamp in past)
        assert set(message.ref_stamp.tolist()) == set(past)
    assert len(seen) > 3


def test_rows_are_in_frame_and_undistorted_by_the_camera(tracked, day):
    camera = day[0]
    for message in tracked[0][1:]:
        assert len(message) > 100
        for uv in (message.uv, message.ref_uv):
            assert ((uv >= 0) & (uv <= torch.tensor([camera.width - 1, camera.height - 1]))).all()
        torch.testing.assert_close(message.xy, camera.normalise(message.uv.double()).float())
        assert ((message.score >= 0) & (message.score <= 1)).all()
        uu, uv, vv = message.cov.unbind(-1)
        assert (uu > 0).all() and (uu * vv > uv * uv).all()
        dtypes = [getattr(message, name).dtype for name in ('uv', 'xy', 'ref_uv', 'score', 'cov')]
        assert (
            dtypes == [torch.float32] * 5
            and message.track.dtype == message.ref_stamp.dtype == torch.int64
        )


def test_a_track_is_one_point_of_each_keyframe_and_lives_on(tracked):
    where, keyframes_of = {}, {}
    for message in tracked[0]:
        rows = list(zip(message.ref_stamp.tolist(), message.track.tolist(), strict=True))
        assert len(set(rows)) == len(rows)  # one row for each keyframe that saw the track
        for row, uv in zip(rows, message.ref_uv.tolist(), strict=True):
            assert where.setdefault(row, uv) == uv
            keyframes_of.setdefault(row[1], set()).add(row[0])
    lives = [len(keyframes) for keyframes in keyframes_of.values()]
    assert sum(life >= 4 for life in lives) > 100
    born = min(keyframes_of), max(keyframes_of)
    assert born[0] >= 0 and born[1] < 2**32


def test_new_points_are_born_between_the_old_ones(tracked, day):
    at = {}  # keyframe: its points
    for message in tracked[0]:
        for stamp, uv, name in zip(
            message.ref_stamp.tolist(), message.ref_uv, message.track.tolist(), strict=True
        ):
            at.setdefault(stamp, {})[name] = uv
    first = sorted(at)[0]
    for stamp in sorted(at)[1:]:
        new = [
            name
            for name in at[stamp]
            if all(name not in at[other] for other in at if other < stamp)
        ]
        old = [name for name in at[stamp] if name in at[first]]
        if new and old:
            distance = torch.cdist(
                torch.stack([at[stamp][k] for k in new]), torch.stack([at[stamp][k] for k in old])
            )
            assert distance.min() > SPACING - 1
        assert len(at[stamp]) <= TrackerOptions.queries


def test_rows_come_back_to_where_they_started_and_references_agree(matcher, tracked, day):
    images = dict(day[1])
    options = TrackerOptions()
    disagreeing = 0
    for message in tracked[0][3::9]:
        features = encoded(matcher, images[message.stamp])
        for stamp in message.ref_stamp.unique().tolist():
            mine = message.ref_stamp == stamp
            queries = message.ref_uv[mine][None]
            with torch.no_grad():
                matches, distance = round_trip(
                    matcher, encoded(matcher, images[stamp]), features, queries
                )
            assert distance.max() < options.round_trip_px + 1e-2
            close = (matches.uv[0] - message.uv[mine]).norm(dim=-1) < 1e-2
            assert close.float().mean() > 0.95
        for name in message.track.unique():
            rows = message.uv[message.track == name]
            disagreeing += int((rows[:1] - rows).norm(dim=-1).max() > options.agreement_px)
    assert disagreeing == 0


def test_bounds_of_the_options_are_kept(shipped, day):
    loose, _ = track(shipped[0], day[0], day[1][:8])
    strict, _ = track(
        shipped[0], day[0], day[1][:8], TrackerOptions(round_trip_px=0.2, queries=150)
    )
    assert 0 < len(strict[-1]) < 0.5 * len(loose[-1])
    agreeing, _ = track(shipped[0], day[0], day[1][:12], TrackerOptions(agreement_px=0.2))
    apart = [
        (message.uv[message.track == name][:1] - message.uv[message.track == name])
        .norm(dim=-1)
        .max()
        for message in agreeing[-2:]
        for name in message.track.unique()
    ]
    assert 0.05 < max(apart) <= 0.2
    _, rare = track(shipped[0], day[0], day[1][:20], TrackerOptions(parallax=0.2))
    _, often = track(shipped[0], day[0], day[1][:20], TrackerOptions(parallax=0.01))
    assert len({s for past in rare for s in past}) < len({s for past in often for s in past})


def test_twice_the_same_gives_the_same_bits(shipped, day, tracked):
    again, _ = track(shipped[0], day[0], day[1][:15])
    for one, two in zip(again, tracked[0], strict=False):
        assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(two), strict=True))


def tensors(message):
    return [value for value in vars(message).values() if isinstance(value, torch.Tensor)]


def test_other_weights_go_on_with_the_same_tracks(shipped, day):
    other = copy.deepcopy(shipped[0])
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.02 * parameter.abs().mean() * torch.randn_like(parameter)
    images = dict(day[1])
    tracker = Tracker(shipped[0], 3, day[0])
    for stamp, image in day[1][:6]:
        before = tracker.track(stamp, image)
    keyframes = tracker.keyframes
    tracker.swap(other, 4)
    assert tracker.keyframes == keyframes
    stamp, image = day[1][6]
    after = tracker.track(stamp, image)
    assert (before.model, after.model) == (3, 4)
    common = set(before.track.tolist()) & set(after.track.tolist())
    assert len(common) > 0.8 * len(before.track.unique())
    # The new weights are used at once, on both images.
    for reference in keyframes:
        mine = after.ref_stamp == reference
        with torch.no_grad():
            expected, old = (
                round_trip(
                    m, encoded(m, images[reference]), encoded(m, image), after.ref_uv[mine][None]
                )[0].uv[0]
                for m in (other, shipped[0])
            )
        assert (after.uv[mine] - expected).norm(dim=-1).quantile(0.95) < 1e-2
        assert (after.uv[mine] - old).norm(dim=-1).median() > 2e-2


def test_a_turn_farther_than_a_region_loses_no_track(shipped, day):
    # A window of 200 px over one large picture, which jumps by 90 px: the truth is exact
    picture = cv2.resize(day[1][0][1], (640, 480), interpolation=cv2.INTER_CUBIC)
    camera = Camera(200, 200, 200.0, 200.0, 99.5, 99.5)
    tracker = Tracker(shipped[0], 0, camera, TrackerOptions(queries=200))
    at = [np.array(corner) for corner in ((100, 100), (104, 102), (190, 130), (194, 134))]
    for stamp, (x, y) in enumerate(at):
        rows = tracker.track(stamp, np.ascontiguousarray(picture[y:y + 200, x:x + 200]))
        for reference in rows.ref_stamp.unique().tolist():
            mine = rows.ref_stamp == reference
            truth = rows.ref_uv[mine] - torch.from_numpy(at[stamp] - at[reference])
            seen = ((truth > 4) & (truth < 195)).all(-1)
            assert ((rows.uv[mine] - truth).norm(dim=-1) < 2)[seen].float().mean() > 0.9
            assert seen.sum() > (40 if reference < 2 <= stamp else 120)


def test_points_are_expected_where_their_pace_takes_them(shipped, day):
    picture = cv2.resize(day[1][0][1], (640, 480), interpolation=cv2.INTER_CUBIC)
    camera = Camera(200, 200, 200.0, 200.0, 99.5, 99.5)
    tracker = Tracker(shipped[0], 0, camera, TrackerOptions(queries=200, parallax=0.5))
    # 160 px/s, from images that do not come at one rate
    times = [0.0, 0.05, 0.1, 0.2, 0.25]
    for time in times[:-1]:
        x = 100 + round(160 * time)
        tracker.track(round(1e9 * time), np.ascontiguousarray(picture[100:300, x:x + 200]))
    [keyframe] = tracker._keyframes
    expected = tracker._expected(keyframe, round(1e9 * times[-1]))
    truth = keyframe.uv - torch.tensor([160 * times[-1], 0.0])
    assert (expected - truth).norm(dim=-1).quantile(0.9) < 2


def test_what_is_probably_wrong_is_not_asked_back(matcher, day, monkeypatch):
    one, two = (encoded(matcher, day[1][k][1]) for k in (0, 3))
    queries = corners(day[1][0][1], 100)[None]
    with torch.no_grad():
        matches, distance = round_trip(matcher, one, two, queries)
        failed = matches.score < FAILED
        assert torch.equal(distance.isinf(), failed) and not failed.all()
        monkeypatch.setattr('imatching_ros.matching.tracker.FAILED', 2.0)
        forward = matcher.match(one, two, queries)
        matches, distance = round_trip(matcher, one, two, queries)
    assert distance.isinf().all() and torch.equal(matches.uv, forward.uv)


def test_after_a_reset_no_id_is_given_twice(shipped, day):
    tracker = Tracker(shipped[0], 0, day[0])
    first = [tracker.track(stamp, image) for stamp, image in day[1][:3]]
    tracker.reset()
    assert tracker.keyframes == []
    second = [tracker.track(stamp, image) for stamp, image in day[1][:3]]
    assert len(second[0]) == 0 and len(second[1]) > 100
    assert max(int(m.track.max()) for m in first[1:]) < min(int(m.track.min()) for m in second[1:])


@pytest.mark.parametrize('shape', [(240, 319), (480, 640), (320, 240), (240, 320, 3)])
def test_an_image_that_is_not_the_cameras_is_named(shipped, day, shape):
    tracker = Tracker(shipped[0], 0, day[0])
    with pytest.raises(
        ValueError, match=r'^the image is \d+x\d+.*, camera_info says 320x240; publish .*$'
    ):
        tracker.track(0, np.zeros(shape, np.uint8))
    assert len(tracker.track(1, day[1][0][1])) == 0 and tracker.keyframes == [1]


def test_dark_and_empty_images_give_no_false_rows_and_the_tracker_goes_on(shipped, day):
    camera, images = day
    black, grey = np.zeros((240, 320), np.uint8), np.full((240, 320), 128, np.uint8)
    stream = [
        black, images[0][1], images[1][1], black, grey, black, images[2][1], images[3][1],
        images[4][1],
    ]
    tracker = Tracker(shipped[0], 0, camera)
    messages = [tracker.track(k, image) for k, image in enumerate(stream)]
    for message in messages:
        assert all(value.isfinite().all() for value in tensors(message))
    assert len(messages[2]) > 300 and len(messages[-1]) > 300
    assert max(len(messages[k]) for k in (0, 1, 3, 4, 5)) < 30


def test_noise_is_not_taken_for_a_match(shipped):
    g = np.random.default_rng(0)
    tracker = Tracker(shipped[0], 0, Camera(320, 240, 256.0, 256.0, 159.5, 119.5))
    messages = [tracker.track(k, g.integers(0, 256, (240, 320), np.uint8)) for k in range(4)]
    assert max(map(len, messages)) < 0.15 * TrackerOptions.queries * TrackerOptions.references


def test_fault_tracker_of_a_wide_lens_gives_no_row_that_its_model_cannot_place(shipped, day):
    matcher, _ = shipped
    camera, images = day
    wide = replace(camera, distortion_model='plumb_bob', distortion=(-0.9, 0.0, 0.0, 0.0, 0.0))
    corners = torch.tensor([[0.0, 0.0], [camera.width - 1.0, camera.height - 1.0]])
    assert wide.normalise(corners.double()).isnan().all(), 'the lens is meant to be wide'
    tracker = Tracker(matcher, 0, wide)
    rows = [tracker.track(stamp, image) for stamp, image in images[:3]][-1]
    assert len(rows) > 20 and rows.xy.isfinite().all()


def test_kill_tracker_that_starts_anew_gives_no_id_that_was_given_before(shipped, day):
    matcher, _ = shipped
    camera, images = day
    before, after = (
        torch.cat([tracker.track(stamp, image).track for stamp, image in part])
        for tracker, part in (
            (Tracker(matcher, 0, camera), images[:6]),
            (Tracker(matcher, 0, camera), images[6:12]),
        )
    )
    assert len(before) and len(after) and int(before.max()) < int(after.min())
