"""The camera against OpenCV, and its gradients."""

from types import SimpleNamespace

import cv2
from hypothesis import given, settings
from hypothesis import strategies as st
from imatching_ros.geometry.camera import Camera, FOLLOWED_PX, is_rectified, unclear
import numpy as np
import pytest
import torch

GOOD = (500.0, 0.0, 320.0, 0.0, 501.0, 240.0, 0.0, 0.0, 1.0)
K = np.array([[400.0, 0, 321], [0, 405, 238], [0, 0, 1]])
MODELS = {
    'none': ('none', ()),
    'plumb_bob 4': ('plumb_bob', (-0.28, 0.074, 2e-4, 1.8e-5)),
    'plumb_bob 5': ('plumb_bob', (0.26, -0.95, -0.0054, 0.0026, 1.16)),
    'rational 8': ('rational_polynomial', (0.5, 0.1, 1e-3, -2e-3, 0.02, 0.8, 0.2, 0.03)),
    'thin prism': (
        'rational_polynomial',
        (0.5, 0.1, 1e-3, -2e-3, 0.02, 0.8, 0.2, 0.03, 0.01, -0.005, 0.004, 0.002),
    ),
    'equidistant': ('equidistant', (0.1, -0.05, 0.02, -0.004)),
}


@pytest.fixture(params=MODELS, ids=list(MODELS))
def camera(request):
    model, D = MODELS[request.param]
    return Camera(640, 480, K[0, 0], K[1, 1], K[0, 2], K[1, 2], model, D)


def pixels(camera, margin=0.0):
    u, v = np.meshgrid(
        np.linspace(margin, camera.width - 1 - margin, 9),
        np.linspace(margin, camera.height - 1, 7),
    )
    return np.stack((u, v), -1).reshape(-1, 2)


def test_projection_is_opencvs(camera):
    xy = np.stack(np.meshgrid(np.linspace(-0.7, 0.7, 9), np.linspace(-0.5, 0.5, 7)), -1).reshape(
        -1, 2
    )
    if camera.distortion_model == 'equidistant':
        want = cv2.fisheye.distortPoints(xy[:, None], K, np.array(camera.distortion))[:, 0]
    else:
        rays = np.concatenate((xy, np.ones((len(xy), 1))), 1)
        want = cv2.projectPoints(rays, np.zeros(3), np.zeros(3), K, np.array(camera.distortion))[
            0
        ][:, 0]
    np.testing.assert_allclose(camera.project(torch.tensor(xy)).numpy(), want, atol=1e-9)


def test_undistortion_is_opencvs(camera):
    uv = pixels(camera, margin=60.0)
    got = camera.normalise(torch.tensor(uv)).numpy()
    if camera.distortion_model == 'equidistant':
        want = cv2.fisheye.undistortPoints(uv[:, None], K, np.array(camera.distortion))[:, 0]
    else:
        stop = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 1000, 1e-14)
        want = cv2.undistortPoints(uv[:, None], K, np.array(camera.distortion), criteria=stop)[
            :, 0
        ]
    inside = np.isfinite(got).all(1)
    assert inside.mean() > 0.9
    np.testing.assert_allclose(got[inside], want[inside], atol=1e-6)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_round_trip(camera, dtype, tolerance):
    uv = torch.tensor(pixels(camera), dtype=dtype)
    xy = camera.normalise(uv)
    assert xy.dtype == dtype
    there = xy.isfinite().all(-1)
    assert there.float().mean() > 0.8
    torch.testing.assert_close(camera.project(xy)[there], uv[there], atol=tolerance, rtol=0)


def test_gradients_are_exact(camera):
    uv = torch.tensor(pixels(camera, margin=80.0)[::7], requires_grad=True)
    assert torch.autograd.gradcheck(camera.normalise, uv, eps=1e-3, atol=1e-7)
    xy = camera.normalise(uv).detach().requires_grad_()
    assert torch.autograd.gradcheck(camera.project, xy, eps=1e-6, atol=1e-3)


def test_a_wide_fisheye_reaches_its_corners():
    camera = Camera(
        640, 480, 240.0, 240.0, 320.0, 240.0, 'equidistant', (0.1, -0.05, 0.02, -0.004)
    )
    uv = torch.tensor(pixels(camera))
    torch.testing.assert_close(camera.project(camera.normalise(uv)), uv, atol=1e-6, rtol=0)


def test_a_pixel_that_the_model_cannot_make_is_nan_and_harms_no_other():
    camera = Camera(640, 480, 400.0, 400.0, 320.0, 240.0, 'plumb_bob', (-0.5, 0.0, 0.0, 0.0))
    uv = torch.tensor(
        [[320.0, 240.0], [330.0, 250.0], [2000.0, 240.0]], dtype=torch.float64, requires_grad=True
    )
    xy = camera.normalise(uv)
    assert xy.isfinite().all(-1).tolist() == [True, True, False]
    xy[:2].sum().backward()
    assert uv.grad.isfinite().all()


def test_covariance_follows_the_undistortion(camera):
    uv = torch.tensor(pixels(camera, margin=100.0)[10:13])
    cov = torch.tensor([[0.5, 0.2, 0.8]], dtype=torch.float64).expand(3, 3)
    got = camera.undistorted_covariance(camera.normalise(uv), cov)
    focal = torch.tensor([camera.fx, camera.fy], dtype=torch.float64)
    full = torch.tensor([[0.5, 0.2], [0.2, 0.8]], dtype=torch.float64)
    for i in range(3):
        J = torch.autograd.functional.jacobian(lambda p: camera.normalise(p) * focal, uv[i])
        want = J @ full @ J.T
        torch.testing.assert_close(
            got[i], torch.stack((want[0, 0], want[0, 1], want[1, 1])), rtol=1e-8, atol=1e-10
        )


def test_scaling_keeps_the_geometry():
    camera = Camera(
        640, 480, *(400.0, 405.0, 321.0, 238.0), 'plumb_bob', (-0.28, 0.074, 2e-4, 1.8e-5)
    )
    half = camera.scaled(0.5, 0.5)
    assert (half.width, half.height) == (320, 240)
    uv = torch.tensor([[100.0, 50.0], [0.0, 479.0]], dtype=torch.float64)
    torch.testing.assert_close(half.normalise((uv + 0.5) * 0.5 - 0.5), camera.normalise(uv))


def test_binning_is_the_mean_of_its_pixels():
    """The centre of a picture's light stays where it is, whatever the picture."""
    camera = Camera(
        640, 480, *(400.0, 405.0, 321.0, 238.0), 'plumb_bob', (-0.28, 0.074, 2e-4, 1.8e-5)
    )
    binned = camera.binned(4, 3)
    assert (binned.width, binned.height) == (160, 160)
    image = np.zeros((480, 640))
    image[60:63, 100:104] = 1.0
    small = image.reshape(160, 3, 160, 4).mean((1, 3))
    here = torch.tensor(np.argwhere(small == 1.0)[0, ::-1].copy(), dtype=torch.float64)
    there = torch.tensor(np.argwhere(image == 1.0).mean(0)[::-1].copy(), dtype=torch.float64)
    torch.testing.assert_close(binned.normalise(here), camera.normalise(there))
    assert camera.binned(1, 1) == camera


def test_cropping_moves_the_principal_point():
    camera = Camera(640, 480, 400.0, 405.0, 321.0, 238.0)
    assert camera.cropped(0, 0, 0, 0) == camera
    assert camera.cropped(10, 20, 300, 200) == Camera(300, 200, 400.0, 405.0, 311.0, 218.0)
    with pytest.raises(ValueError, match="leaves the camera's 640x480"):
        camera.cropped(400, 0, 300, 200)


def info(k=GOOD, d=(), model='plumb_bob', p=(0.0,) * 12, size=(640, 480), roi=(0,) * 4, binning=0):
    """Return the fields of a CameraInfo."""
    x, y, width, height = roi
    return SimpleNamespace(
        width=size[0], height=size[1], k=list(k), d=list(d), distortion_model=model, p=list(p),
        roi=SimpleNamespace(x_offset=x, y_offset=y, width=width, height=height),
        binning_x=binning, binning_y=binning,
    )


def projection(fx, fy, cx, cy):
    return [fx, 0, cx, -30.0, 0, fy, cy, 0, 0, 0, 1, 0]


def test_a_raw_image_has_k_and_d_and_a_rectified_one_p():
    both = info(d=(0.1, -0.2, 0.001, 0.002, 0.3), p=projection(450.0, 451.0, 310.0, 230.0))
    raw = Camera(640, 480, 500.0, 501.0, 320.0, 240.0, 'plumb_bob', (0.1, -0.2, 0.001, 0.002, 0.3))
    assert Camera.from_camera_info(both) == raw
    rectified = Camera(640, 480, 450.0, 451.0, 310.0, 230.0)
    assert Camera.from_camera_info(both, rectified=True) == rectified
    # kitti2bag's odometry, some drivers: P alone, so the image can be nothing but rectified
    alone = info((0.0,) * 9, both.d, p=both.p)
    assert Camera.from_camera_info(alone) == rectified
    assert Camera.from_camera_info(alone, rectified=True) == rectified


def test_without_p_a_rectified_image_needs_one_that_is_not_distorted():
    plain = Camera(640, 480, 500.0, 501.0, 320.0, 240.0)
    assert Camera.from_camera_info(info(d=[0.0] * 5), rectified=True) == plain
    with pytest.raises(ValueError, match='rectified but the projection matrix P.* is all zero'):
        Camera.from_camera_info(info(d=[0.1] * 5), rectified=True)


def test_region_and_binning_hold_for_p_as_for_k():
    cut = {'roi': (100, 60, 400, 300), 'binning': 2}
    for rectified in (False, True):
        whole = Camera.from_camera_info(info(p=projection(450.0, 451.0, 310.0, 230.0)), rectified)
        message = info(p=projection(450.0, 451.0, 310.0, 230.0), **cut)
        camera = Camera.from_camera_info(message, rectified)
        assert camera == whole.cropped(100, 60, 400, 300).binned(2, 2)
    # a principal point outside is possible, but only so
    corner = Camera.from_camera_info(info(roi=(400, 300, 200, 100)))
    assert (corner.cx, corner.cy) == (-80.0, -60.0)
    assert 'far off the middle' in corner.doubts()[0]


@pytest.mark.parametrize(
    ('model', 'given', 'name', 'coefficients'),
    [
        ('plumb_bob', [0.0] * 5, 'none', ()),
        ('anything', [0.0] * 8, 'none', ()),
        ('', [], 'none', ()),
        ('plumb_bob', (0.1, 0.2, 0.3, 0.4, 0.0), 'plumb_bob', (0.1, 0.2, 0.3, 0.4, 0.0)),
        ('plumb_bob', (0.1, 0.2), 'plumb_bob', (0.1, 0.2, 0.0, 0.0)),
        ('plumb_bob', (0.1, 0.2, 0.3, 0.4, 0.5, 0, 0, 0), 'plumb_bob', (0.1, 0.2, 0.3, 0.4, 0.5)),
        ('plumb_bob', [0.1] * 8, 'rational_polynomial', (0.1,) * 8),
        ('', (0.1, 0.2, 0.3, 0.4), 'plumb_bob', (0.1, 0.2, 0.3, 0.4)),
        ('', [0.1] * 8, 'rational_polynomial', (0.1,) * 8),
        ('None', (0.1, 0.2, 0, 0, 0), 'plumb_bob', (0.1, 0.2, 0, 0, 0)),
        ('PLUMB_BOB', [0.1] * 5, 'plumb_bob', (0.1,) * 5),
        ('Brown Conrady', [0.1] * 5, 'plumb_bob', (0.1,) * 5),
        ('radtan', [0.1] * 4, 'plumb_bob', (0.1,) * 4),
        ('radial-tangential', [0.1] * 4, 'plumb_bob', (0.1,) * 4),
        ('rational_polynomial', [0.1] * 5, 'rational_polynomial', (*[0.1] * 5, 0.0, 0.0, 0.0)),
        ('rational_polynomial', [0.1] * 8 + [0] * 6, 'rational_polynomial',
         (*[0.1] * 8, *[0.0] * 6)),
        ('fisheye', [0.1] * 4, 'equidistant', (0.1,) * 4),
        ('kannala_brandt4', [0.1] * 4 + [0], 'equidistant', (0.1,) * 4),
        ('Equidistant', [0.1, 0.2], 'equidistant', (0.1, 0.2, 0.0, 0.0)),
    ],
)
def test_lens_models_by_their_names(model, given, name, coefficients):
    camera = Camera.from_camera_info(info(d=given, model=model))
    assert (camera.distortion_model, camera.distortion) == (name, coefficients)


@pytest.mark.parametrize(
    ('model', 'given', 'says'),
    [
        ('thin_prism_fisheye', [0.1] * 8, "'thin_prism_fisheye' is not known; use one of none, p"),
        ('pinhole', [0.1] * 5, "'pinhole' is not known"),
        ('inverse_brown_conrady', [0.1] * 5, "'inverse_brown_conrady' is not known"),
        ('fisheye', [0.1] * 5, "'fisheye' takes 4 coefficients at most, 5 were given"),
        ('plumb_bob', [0.1, float('nan')], 'coefficient 2 is nan'),
        ('rational_polynomial', [0.1] * 14, 'tilted'),
    ],
)
def test_lens_models_that_cannot_be_taken_are_named(model, given, says):
    with pytest.raises(ValueError, match=says):
        Camera.from_camera_info(info(d=given, model=model))


@pytest.mark.parametrize(
    ('k', 'says'),
    [
        ([0.0] * 9, 'not calibrated: fx is 0'),
        ([float('nan')] * 9, 'not calibrated: fx is nan'),
        ([500, 0, 320, 0, 501, float('inf'), 0, 0, 1], r'not calibrated: K\[5\] is inf'),
        ([772.87, 0, 0, 0, 1.0, 0, 0, 6.9e-310, 2.5e-323], 'fy is 1 px for an image of 640x480'),
        ([0.82, 0, 0.5, 0, 1.09, 0.5, 0, 0, 1], 'normalised: fx is 0.82 and cx 0.5'),
        ([500, 0, 0, 0, 501, 0, 320, 240, 1], 'transposed: its last row is 320, 240, 1'),
        ([500, 320, 0, 0, 501, 240, 0, 0, 1], r'K\[1\], the skew, is 320'),
        ([500, 0, 320, 7, 501, 240, 0, 0, 1], r'K\[3\] is 7, it must be 0'),
        ([500, 0, 0, 0, 501, 0, 0, 0, 1], 'cx is 0, on or beyond the edge of an image of 640x480'),
        ([500, 0, 320, 0, 501, 0, 0, 0, 1], 'cy is 0, on or beyond'),
        ([1000, 0, 640, 0, 1002, 480, 0, 0, 1], 'cx is 640, on or beyond'),
        ([250, 0, 159.5, 0, 250, 119.5, 0, 0, 1], 'is the middle of an image of about 320x240'),
        ([500, 0, 320, 0, 50, 240, 0, 0, 1], 'fx is 500 and fy 50, but pixels are nearly square'),
        ([500, 0, 320, 0, 501, 240, 0, 0, 2], r'K\[8\] is 2, it must be 1'),
    ],
)
def test_intrinsics_that_cannot_be_are_named(k, says):
    with pytest.raises(ValueError, match=says) as said:
        Camera.from_camera_info(info(k))
    assert '\n' not in str(said.value)
    if any(k):  # P is looked at as K is; an empty one says nothing
        with pytest.raises(ValueError, match=says.replace('K', 'P')):
            p = [*k[:3], 0, *k[3:6], 0, *k[6:], 0]
            Camera.from_camera_info(info(p=p), rectified=True)


def test_a_binning_that_k_has_already_is_named():
    with pytest.raises(ValueError, match='of about 320x240, not of 640x480; .* binning only'):
        Camera.from_camera_info(info(k=[250, 0, 159.5, 0, 250, 119.5, 0, 0, 1], binning=2))


@pytest.mark.parametrize(
    'camera',
    [
        Camera(1241, 376, 718.9, 718.9, 607.2, 185.2),  # KITTI
        Camera(752, 480, 458.7, 457.3, 367.2, 248.4, 'plumb_bob', (-0.28, 0.07, 2e-4, 2e-5)),
        Camera(848, 800, 286.0, 286.0, 423.0, 400.0, 'equidistant', (-0.01, 0.04, -0.04, 0.01)),
        Camera(1024, 1024, 300.0, 300.0, 512.0, 511.0, 'equidistant', (0.05, 0.01, 0.0, 0.0)),
        Camera(320, 240, 400.0, 300.0, 150.0, 130.0),
    ],
    ids=['kitti', 'euroc', 't265', '196 degrees', 'oblong'],
)
def test_real_cameras_are_taken_without_a_doubt(camera):
    c = camera
    again = Camera.from_intrinsics(
        c.width, c.height, [c.fx, 0.2, c.cx, 0, c.fy, c.cy, 0, 0, 1], c.distortion,
        c.distortion_model,
    )
    assert again == camera and camera.doubts() == []


def test_what_is_merely_odd_is_said():
    def doubts(**changes):
        good = {'width': 640, 'height': 480, 'fx': 500.0, 'fy': 500.0, 'cx': 320.0, 'cy': 240.0}
        return Camera(**{**good, **changes}).doubts()

    assert doubts() == []
    assert 'point (150, 240) is far off the middle of the 640x480' in doubts(cx=150.0)[0]
    assert 'fx is 500 and fy 1000, but' in doubts(fy=1000.0)[0]
    assert 'field of view is 4 degrees' in doubts(fx=1e4, fy=1e4)[0]
    assert 'field of view is 173 degrees' in doubts(fx=20.0, fy=20.0)[0]


@pytest.mark.parametrize(
    ('topic', 'rectified'),
    [
        ('/camera/image_rect', True), ('/camera/image_rect_color/compressed', True),
        ('/camera/infra1/image_rect_raw', True), ('image_rect/compressedDepth', True),
        ('/zed/left/color/rect/image', True), ('/zed/rect/image/compressed', True),
        ('/left/rectified/image', True), ('/rectify/image_raw', True),
        ('/kitti/camera_gray_left/image', True), ('/kitti/camera_color_right/image/theora', True),
        ('/camera/image_raw', False), ('/camera/image_raw/compressed', False),
        ('/camera/image', False), ('/image_rect/other', False), ('/direct/image', False),
        ('/kitti/camera_gray_left/image_raw', False), ('/my/kitti/camera_gray_left/image', False),
        ('', False), ('compressed', False),
    ],
)
def test_topics_of_rectified_images(topic, rectified):
    assert is_rectified(topic) == rectified


def test_it_is_unclear_only_where_the_name_is_silent_and_it_matters():
    both = info(d=(-0.3, 0.1, 0.0, 0.0, 0.0), p=projection(450.0, 451.0, 310.0, 230.0))
    assert unclear(both, '/camera/image') > 10
    assert unclear(both, '/camera/image_raw') is unclear(both, '/camera/image_rect') is None
    assert unclear(info(p=projection(500.0, 501.0, 320.5, 240.0)), '/camera/image') is None
    assert unclear(info(), '/camera/image') is None
    assert unclear(info((0.0,) * 9), '/camera/image') is None


@settings(max_examples=30, deadline=None)
@given(st.floats(-20, 20), st.floats(-20, 20), st.floats(-0.02, 0.02))
def test_a_camera_has_moved_as_far_as_its_pixels(x, y, zoom):
    before = Camera(640, 480, 500.0, 501.0, 320.0, 240.0)
    after = Camera(640, 480, 500.0 * (1 + zoom), 501.0 * (1 + zoom), 320.0 + x, 240.0 + y)
    corners = np.array([[0, 0], [639, 0], [0, 479], [639, 479]]) - [320.0, 240.0]
    # the pixel of `before` whose ray `after` has in a corner
    moved = np.hypot(*(corners - (corners - [x, y]) / (1 + zoom)).T).max()
    assert after.moved_px(before) == pytest.approx(moved, abs=1e-9)
    assert after.goes_on_from(before) == (moved <= FOLLOWED_PX)


def test_a_camera_of_another_size_or_lens_is_another():
    camera = Camera(640, 480, 500.0, 501.0, 320.0, 240.0)
    assert camera.moved_px(camera) == 0
    assert camera.moved_px(Camera(320, 240, 500.0, 501.0, 160.0, 120.0)) == float('inf')
    bent = Camera(640, 480, 500.0, 501.0, 320.0, 240.0, 'plumb_bob', (-0.3, 0.1, 0.0, 0.0))
    assert not bent.goes_on_from(camera) and not camera.goes_on_from(bent)
    fine = Camera(640, 480, 500.0, 501.0, 320.0, 240.0, 'plumb_bob', (-1e-4, 0.0, 0.0, 0.0))
    assert fine.goes_on_from(camera)
    wide = Camera(640, 480, 240.0, 240.0, 320.0, 240.0, 'equidistant', (0.1, -0.05, 0.02, -0.004))
    near = Camera(640, 480, 240.1, 240.1, 320.0, 240.0, 'equidistant', (0.1, -0.05, 0.02, -0.004))
    assert 0 < near.moved_px(wide) < 1


@pytest.mark.parametrize(
    'changes, says',
    [
        ({'fx': 0.0}, 'fx is 0'),
        ({'fy': float('nan')}, 'fy is nan'),
        ({'width': 0}, '0x480'),
        ({'cx': float('inf')}, 'finite'),
        ({'distortion_model': 'fov', 'distortion': (0.1,)}, "'fov' is not known"),
        ({'distortion_model': 'plumb_bob', 'distortion': (0.1,)}, '1 were given'),
        ({'distortion_model': 'rational_polynomial', 'distortion': (0.1,) * 14}, 'tilted'),
    ],
)
def test_a_bad_calibration_is_named(changes, says):
    good = {'width': 640, 'height': 480, 'fx': 500.0, 'fy': 500.0, 'cx': 320.0, 'cy': 240.0}
    with pytest.raises(ValueError, match=says) as error:
        Camera(**{**good, **changes})
    assert '\n' not in str(error.value)
