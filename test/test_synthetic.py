"""The rendered recordings: their poses, depths and images are of one and the same world."""

import cv2
from imatching_ros.data.recording import open_recording
from imatching_ros.data.synthetic import make_scene, render_recording, Scene, Sensor
from imatching_ros.geometry import lie
from imatching_ros.geometry.camera import Camera
import numpy as np
import pytest
import torch

CAMERA = Camera(320, 240, 256.0, 256.0, 159.5, 119.5)
BENT = Camera(
    320, 240, 256.0, 250.0, 155.0, 122.0, 'plumb_bob', (-0.25, 0.08, 0.001, -0.0005, 0.0)
)
PATHS = ['handheld', 'driving']


@pytest.fixture(scope='module', params=[('handheld', CAMERA), ('driving', CAMERA),
                                        ('handheld', BENT)],
                ids=['handheld', 'driving', 'distorted'])
def pair(request):
    """Return two views a quarter of a second apart: camera, poses (2, 7), images and depths."""
    path, camera = request.param
    scene, path_at = make_scene(path, 3, camera, 2.0)
    poses = torch.from_numpy(path_at(np.array([0.5, 0.75])))
    images, depths = zip(*(scene.render(pose, camera) for pose in poses), strict=True)
    return camera, poses, images, depths


def carried(camera, poses, depth):
    """
    Return where the first view's pixels lie in the second, by exact geometry.

    That are pixels (H, W, 2) and depth (H, W) there.
    """
    v, u = np.mgrid[:camera.height, : camera.width].astype(np.float64)
    xy = camera.normalise(torch.from_numpy(np.stack((u, v), -1)))
    points = (
        torch.cat((xy, torch.ones_like(xy[..., :1])), -1)
        * torch.from_numpy(depth).double()[..., None]
    )
    there = lie.act(lie.compose(lie.inverse(poses[1]), poses[0]), points)
    return camera.project(there[..., :2] / there[..., 2:]).numpy(), there[..., 2].numpy()


def looked_up(image, uv, how=cv2.INTER_LINEAR):
    return cv2.remap(
        image, uv[..., 0].astype(np.float32), uv[..., 1].astype(np.float32), how, borderValue=0
    )


def smooth_surface(depth):
    """
    Return the pixels whose neighbours lie on the same plane.

    There 1 / depth is linear (but for distortion).
    """
    return np.abs(cv2.Laplacian(1 / depth.astype(np.float64), cv2.CV_64F)) * depth < 2e-3


def test_a_pixel_moved_by_pose_and_depth_meets_its_own_depth_and_texture(pair):
    camera, poses, images, depths = pair
    uv, z = carried(camera, poses, depths[0])
    inside = (uv > 2).all(-1) & (uv < (camera.width - 3, camera.height - 3)).all(-1)
    # Linear interpolation is exact for 1 / depth on a plane.
    seen = 1 / np.maximum(looked_up((1 / depths[1]).astype(np.float32), uv), 1e-6)
    flat = smooth_surface(depths[0]) & (
        looked_up(smooth_surface(depths[1]).astype(np.float32), uv) == 1
    )
    error = np.abs(z / seen - 1)
    visible = inside & flat & (error < 0.02)
    assert visible.sum() > 0.5 * depths[0].size
    assert np.median(error[visible]) < 1e-4
    # The same texture: what is left is what two samplings of it differ by, far below what an
    # offset leaves.
    other = looked_up(images[1], uv)
    difference = np.abs(other - images[0])[visible]
    shifted = np.abs(looked_up(images[1], uv + (1.0, 0.0)) - images[0])[visible]
    assert np.median(difference) < 0.02
    assert difference.mean() < 0.6 * shifted.mean()


@pytest.mark.parametrize('camera', [CAMERA, BENT], ids=['pinhole', 'distorted'])
# from magnified down to several levels of the pyramid
@pytest.mark.parametrize('distance', [0.7, 1.5, 4.0, 9.0])
def test_a_spot_of_the_texture_is_drawn_where_its_point_projects(camera, distance):
    # A shift common to all images would cancel between two views, so one view is held against
    # closed form.
    size, spot = 512, (0.4, 0.65)
    t, s = np.mgrid[:size, :size]
    radius = 4 * distance  # texels: two pixels, so small that its perspective centre is its middle
    around = ((s + 0.5) / size - spot[0]) ** 2 + ((t + 0.5) / size - spot[1]) ** 2
    texture = (240 * np.exp(-0.5 * around * (size / radius) ** 2)).astype(np.uint8)
    quad = np.array([[-0.55, -0.5, distance], [1.0, 0.05, 0.05], [0.02, 1.0, -0.08]])
    scene = Scene(quad[None], np.array([0]), np.array([1.0]), [texture])
    image, depth = scene.render(lie.identity(), camera)
    v, u = np.mgrid[:camera.height, : camera.width]
    centre = np.array([(image * u).sum(), (image * v).sum()]) / image.sum()
    point = torch.from_numpy(quad[0] + spot[0] * quad[1] + spot[1] * quad[2])
    expected = camera.project(point[:2] / point[2]).numpy()
    assert np.abs(centre - expected).max() < 0.03
    assert abs(depth[tuple(np.rint(expected[::-1]).astype(int))] - point[2]) < 0.01
    # beside the quad there is nothing
    assert depth[0, 0] == 0 and image[0, 0] == 0 or distance < 1


def test_registration_finds_no_offset(pair):
    camera, poses, images, depths = pair
    uv, z = carried(camera, poses, depths[0])
    seen = looked_up(depths[1], uv, cv2.INTER_NEAREST)
    visible = np.abs(z / np.maximum(seen, 1e-6) - 1) < 0.01
    other = looked_up(images[1], uv)
    gx, gy = (
        cv2.Sobel(other, cv2.CV_32F, 1, 0, scale=1 / 8),
        cv2.Sobel(other, cv2.CV_32F, 0, 1, scale=1 / 8),
    )
    inner = cv2.erode(visible.astype(np.uint8), np.ones((7, 7)))[4:-4, 4:-4] > 0
    gradient = np.stack((gx[4:-4, 4:-4][inner], gy[4:-4, 4:-4][inner]), -1)
    offset = np.linalg.lstsq(gradient, (images[0] - other)[4:-4, 4:-4][inner], rcond=None)[0]
    assert np.abs(offset).max() < 0.03


def test_some_of_what_one_view_sees_is_hidden_in_the_other(pair):
    camera, poses, _, depths = pair
    uv, z = carried(camera, poses, depths[0])
    inside = (uv > 0).all(-1) & (uv < (camera.width - 1, camera.height - 1)).all(-1)
    hidden = inside & (z > 1.05 * looked_up(depths[1], uv, cv2.INTER_NEAREST))
    assert 0.001 < hidden.sum() / inside.sum() < 0.3


def test_depth_is_that_of_the_ray_and_the_plane():
    # The ground of the street is z = 0: in closed form.
    scene, path_at = make_scene('driving', 0, CAMERA, 2.0)
    pose = torch.from_numpy(path_at(np.array(0.3)))
    depth = torch.from_numpy(scene.depth(pose, CAMERA)).double()
    v, u = torch.meshgrid(torch.arange(240.0), torch.arange(320.0), indexing='ij')
    xy = CAMERA.normalise(torch.stack((u, v), -1).double())
    rays = lie.rotate(pose[3:], torch.cat((xy, torch.ones_like(xy[..., :1])), -1))
    ground = -pose[2] / rays[..., 2]
    on_ground = (depth - ground).abs() < 1e-5 * depth
    assert on_ground[200:].double().mean() > 0.5
    assert (depth > 0).all() and (depth[ground > 0] < 1.08 * ground[ground > 0]).all()


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('seed', range(3))
def test_motion_has_rotation_and_parallax_and_never_leaves_the_scene(path, seed):
    scene, path_at = make_scene(path, seed, CAMERA, 12.0)
    median, parallax, least = [], [], []
    for t in np.arange(0, 11.5, 1.3):
        poses = torch.from_numpy(path_at(np.array([t, t + 0.25])))  # five frames at 20 Hz
        depth = scene.depth(poses[0], CAMERA)
        uv, _ = carried(CAMERA, poses, depth)
        spun, _ = carried(CAMERA, torch.cat((poses[:, :3] * 0, poses[:, 3:]), 1), depth)
        v, u = np.mgrid[:240, :320]
        median.append(np.median(np.linalg.norm(uv - np.stack((u, v), -1), axis=-1)))
        parallax.append(np.median(np.linalg.norm(uv - spun, axis=-1)))
        least.append(depth.min())
    assert 4 < np.median(median) < 25  # pixels at 320 x 240
    assert np.median(parallax) > 2
    assert min(least) > 0.3  # neither inside a box nor through a wall


@pytest.mark.parametrize('path', PATHS)
def test_pictures_are_textured_but_not_everywhere_and_well_exposed(path):
    scene, path_at = make_scene(path, 5, CAMERA, 8.0)
    rng = np.random.default_rng(0)
    for t in (0.5, 4.0, 7.5):
        light = scene.image(torch.from_numpy(path_at(np.full(4, t))), CAMERA)
        image = Sensor().expose(light, np.zeros(2), rng)
        assert 80 < image.mean() < 190 and image.std() > 20
        corners = cv2.goodFeaturesToTrack(image, 2000, 0.01, 4)
        assert len(corners) > 300
        deviation = np.sqrt(cv2.blur(light * light, (15, 15)) - cv2.blur(light, (15, 15)) ** 2)
        assert np.percentile(deviation, 95) > 5 * np.percentile(deviation, 5)


def test_a_room_may_be_plain_or_repetitive():
    slope = {}
    for surfaces in ('mixed', 'plain', 'repetitive'):
        scene, path_at = make_scene('handheld', 0, CAMERA, 2.0, surfaces)
        images = [
            scene.render(torch.from_numpy(pose), CAMERA)[0]
            for pose in path_at(np.array([0.0, 1.0, 2.0]))
        ]
        slope[surfaces] = np.mean([np.abs(np.diff(image, axis=1)).mean() for image in images])
    assert slope['plain'] < 0.5 * slope['mixed'] and slope['plain'] < 0.7 * slope['repetitive']
    with pytest.raises(ValueError, match="'mixed', 'plain' or 'repetitive', not 'gold'"):
        render_recording('nowhere', surfaces='gold')


def test_textures_do_not_alias():
    # A picture of half the size must be the average of the larger one's pixels; aliasing would add
    # its own.
    large = Camera(640, 480, 512.0, 512.0, 319.5, 239.5)
    scene, path_at = make_scene('driving', 1, large, 2.0)
    pose = torch.from_numpy(path_at(np.array(1.0)))
    averaged = cv2.resize(scene.render(pose, large)[0], (320, 240), interpolation=cv2.INTER_AREA)
    image = scene.render(pose, CAMERA)[0]
    assert np.abs(image - averaged).mean() < 0.015
    # Between neighbouring samples of a moving view, aliased texture would flicker.
    assert np.std(image - averaged) < 0.25 * np.std(averaged)


def test_the_sensor_blurs_darkens_and_adds_its_noise():
    rng = np.random.default_rng(0)
    flat = np.full((240, 320), 0.5, np.float32)
    plain = Sensor(noise=4.0, vignetting=0.0, wander=0.0)
    images = np.stack([plain.expose(flat, np.zeros(2), rng) for _ in range(4)]).astype(float)
    assert abs(images.mean() - 127.5) < 0.2 and abs(images.std() - 4.0) < 0.1
    dark = plain.expose(flat * 0.1, np.zeros(2), rng).astype(float)
    assert dark.std() < 0.8 * images.std()  # shot noise grows with the light
    gain = Sensor(noise=0.0, vignetting=0.0, wander=0.2)
    assert gain.expose(flat, np.array([1.0, 0.0]), rng).mean() == round(127.5 * np.exp(0.2))
    shaded = Sensor(noise=0.0, vignetting=0.4).expose(flat, np.zeros(2), rng)
    assert abs(shaded[0, 0] / shaded[120, 160] - 0.6) < 0.02
    assert Sensor.low_light(1.0).noise > 5 * Sensor.low_light(0.0).noise
    with pytest.raises(ValueError, match='strength'):
        Sensor.low_light(1.5)

    scene, path_at = make_scene('handheld', 2, CAMERA, 2.0)
    still = scene.image(torch.from_numpy(path_at(np.full(4, 1.0))), CAMERA)
    moved = scene.image(torch.from_numpy(path_at(1.0 + np.linspace(-0.03, 0.03, 4))), CAMERA)
    assert cv2.Laplacian(moved, cv2.CV_32F).std() < 0.85 * cv2.Laplacian(still, cv2.CV_32F).std()


@pytest.mark.parametrize('path', PATHS)
def test_a_recording_is_whole_exact_and_the_same_every_time(tmp_path, path):
    done = []
    options = {
        'seed': 7, 'frames': 6, 'size': (160, 120), 'path': path, 'rate_hz': 10.0,
        'depth_every': 5, 'sensor': Sensor.low_light(0.5),
    }
    folder = render_recording(tmp_path / 'a', progress=lambda k, n: done.append((k, n)), **options)
    again = render_recording(tmp_path / 'b', **options)
    other = render_recording(tmp_path / 'c', **{**options, 'seed': 8})
    assert done == [(k, 6) for k in range(1, 7)]
    # nothing half-made is left
    assert sorted(item.name for item in tmp_path.iterdir()) == ['a', 'b', 'c']
    recording, twin, stranger = (open_recording(where) for where in (folder, again, other))
    assert len(recording) == 6 and recording.camera == Camera(160, 120, 128.0, 128.0, 79.5, 59.5)
    stamps = []
    for (stamp, image), (twin_stamp, twin_image), (_, strange) in zip(
        recording, twin, stranger, strict=True
    ):
        assert (
            stamp == twin_stamp
            and np.array_equal(image, twin_image)
            and not np.array_equal(image, strange)
        )
        stamps.append(stamp)
    assert np.diff(stamps).tolist() == [10**8] * 5
    scene, path_at = make_scene(path, 7, recording.camera, 0.6)
    truth = torch.from_numpy(path_at(np.arange(6) / 10))
    assert recording.ground_truth[0].tolist() == stamps and torch.equal(
        recording.ground_truth[1], truth
    )
    written = np.loadtxt(folder / 'groundtruth.txt')
    assert np.abs(written[:, 1:] - truth.numpy()).max() < 1e-9
    assert np.loadtxt(folder / 'intrinsics.txt').tolist() == [
        [128, 0, 79.5],
        [0, 128, 59.5],
        [0, 0, 1],
    ]
    assert [recording.depth(stamp) is not None for stamp in stamps] == [
        True, False, False, False, False, True,
    ]
    assert np.array_equal(recording.depth(stamps[5]), scene.depth(truth[5], recording.camera))
    assert recording.depth(stamps[5]).dtype == np.float32


def test_a_distorting_camera_is_written_with_its_distortion(tmp_path):
    folder = render_recording(tmp_path / 'bent', frames=2, camera=BENT)
    assert open_recording(folder).camera == BENT


def test_nothing_is_left_of_a_recording_that_is_broken_off(tmp_path):
    def stop(done, frames):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        render_recording(tmp_path / 'a', frames=3, size=(64, 48), progress=stop)
    assert not list(tmp_path.iterdir())


def test_bad_requests_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'handheld' or 'driving', not 'flying'"):
        render_recording(tmp_path / 'a', path='flying')
    with pytest.raises(ValueError, match='two frames'):
        render_recording(tmp_path / 'a', frames=1)
    with pytest.raises(FileExistsError, match='exists already'):
        render_recording(tmp_path)
