"""The camera against OpenCV, and its gradients."""

import cv2
from imatching_ros.geometry.camera import Camera
import numpy as np
import pytest
import torch

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
    """
    The centre of a picture's light stays where it is.

    One bright pixel, and the mean of those around it.
    """
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


def test_camera_info():
    camera = Camera.from_camera_info(
        640, 480, [500, 0, 320, 0, 501, 240, 0, 0, 1], [0.0] * 5, 'plumb_bob'
    )
    assert (camera.fx, camera.fy, camera.cx, camera.cy, camera.distortion_model) == (
        500, 501, 320, 240, 'none',
    )
    camera = Camera.from_camera_info(640, 480, [500, 0, 320, 0, 501, 240, 0, 0, 1], [0.1] * 5, '')
    assert (camera.distortion_model, camera.distortion) == ('plumb_bob', (0.1,) * 5)


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
