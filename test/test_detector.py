"""The detector, and the warps of known truth."""

from hypothesis import given, settings
from hypothesis import strategies as st
from imatching_ros.matching.detector import BORDER, detect, SPACING
from imatching_ros.matching.warps import random_homography
import numpy as np


def test_a_warp_of_no_strength_is_the_identity():
    H = random_homography(np.random.default_rng(0), (320, 240), 0.0)
    np.testing.assert_allclose(H / H[2, 2], np.eye(3), atol=1e-9)


def test_corners_keep_away_from_one_another_and_from_the_border(day):
    image = day[1][0][1]
    points = detect(image, 300)
    assert points.shape == (300, 2) and points.dtype == np.float32
    assert np.array_equal(points, detect(image, 300))
    distance = np.linalg.norm(points[:, None] - points, axis=-1) + 1e6 * np.eye(300)
    assert distance.min() >= SPACING
    assert (points >= BORDER).all() and (points <= np.array(image.shape[::-1]) - 1 - BORDER).all()


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.tuples(st.floats(-10, 330), st.floats(-10, 250)), max_size=40), st.integers(1, 200)
)
def test_corners_keep_away_from_what_is_occupied(day, occupied, count):
    occupied = np.array(occupied, np.float32).reshape(-1, 2)
    points = detect(day[1][7][1], count, occupied)
    assert len(points) <= count
    if len(points) and len(occupied):
        distance = np.linalg.norm(points[:, None] - occupied, axis=-1)
        assert distance.min() > SPACING - 1  # occupied points stand on whole pixels


def test_dim_and_empty_images(day):
    dim = (day[1][0][1] // 16 + 3).astype(np.uint8)
    assert len(detect(dim, 300)) > 200
    for value in (0, 128, 255):
        points = detect(np.full((240, 320), value, np.uint8), 300)
        assert points.shape == (0, 2) and points.dtype == np.float32
