"""What other programs read: COLMAP itself opens, triangulates and adjusts what is exported."""

import importlib.util
from pathlib import Path

from imatching_ros import cli, files
from imatching_ros.data.recording import open_recording
from imatching_ros.data.synthetic import render_recording
from imatching_ros.evaluation.matching import evaluation_pairs, true_matches
from imatching_ros.evaluation.trajectory import trajectory_accuracy
from imatching_ros.export.colmap import camera_model, write_colmap
from imatching_ros.geometry.camera import Camera
from imatching_ros.matching import weights
from imatching_ros.matching.detector import detect
import numpy as np
import pytest
import torch

CAMERAS = [
    Camera(640, 480, 500.0, 510.0, 320.0, 240.0),
    Camera(640, 480, 500.0, 510.0, 320.0, 240.0, 'plumb_bob', (-0.3, 0.1, 1e-3, -2e-3, 0.0)),
    Camera(640, 480, 500.0, 510.0, 320.0, 240.0, 'plumb_bob', (-0.3, 0.1, 1e-3, -2e-3, -0.02)),
    Camera(
        640, 480, 500.0, 510.0, 320.0, 240.0, 'rational_polynomial',
        (0.2, 0.1, 1e-3, 1e-3, 0.02, 0.3, 0.1, 0.01),
    ),
    Camera(640, 480, 300.0, 310.0, 320.0, 240.0, 'equidistant', (0.02, -0.01, 3e-3, -1e-3)),
]


@pytest.fixture(scope='module')
def pycolmap():
    module = pytest.importorskip(
        'pycolmap', reason='pycolmap is not installed (the extra `test` brings it)'
    )
    module.logging.minloglevel = 2
    return module


@pytest.fixture(scope='module')
def exported(daylight, tmp_path_factory):
    """Return the folder with colmap/ and map/ that `imatching export` wrote of a recording."""
    folder = tmp_path_factory.mktemp('exported')
    cli.main(
        ['export', str(daylight), '--colmap', str(folder / 'colmap'), '--map', str(folder / 'map')]
    )
    return folder


def test_colmap_has_every_keyframe_its_points_and_its_matches(pycolmap, exported, daylight):
    recording = open_recording(daylight)
    with pycolmap.Database.open(exported / 'colmap' / 'database.db') as database:
        images, camera = database.read_all_images(), database.read_camera(1)
        pictures = {path.name for path in (exported / 'colmap' / 'images').iterdir()}
        assert {image.name for image in images} == pictures and len(pictures) > 5
        assert camera.model.name == 'PINHOLE' and (camera.width, camera.height) == (320, 240)
        own = recording.camera
        np.testing.assert_allclose(camera.params, [own.fx, own.fy, own.cx + 0.5, own.cy + 0.5])
        # A pixel's centre: what the detector calls (0, 0) is (0.5, 0.5)
        stamp, picture = next(iter(recording))
        assert images[0].name == f'{stamp}.png'
        corners = {tuple(point) for point in (detect(picture, 600) + 0.5).tolist()}
        keypoints = database.read_keypoints(1)[:, :2]
        assert len(keypoints) > 100 and {tuple(point) for point in keypoints.tolist()} <= corners

        pairs, geometries = database.read_two_view_geometries()
        assert len(pairs) == database.num_matched_image_pairs() >= 2 * len(pictures) - 5
        for geometry in geometries:
            assert geometry.config == pycolmap.TwoViewGeometryConfiguration.CALIBRATED
            assert len(geometry.inlier_matches) > 50
        # The essential matrix is that of COLMAP's rays, and of its order of the two images
        matches, geometry = database.read_matches(1, 2), database.read_two_view_geometry(1, 2)
        rays = [
            camera.cam_from_img(database.read_keypoints(k + 1)[matches[:, k], :2].astype(float))
            for k in (0, 1)
        ]
        one, two = (np.column_stack((ray, np.ones(len(ray)))) for ray in rays)
        assert np.median(np.abs(np.sum(two * (one @ geometry.E.T), 1))) < 1 / own.focal
        T = geometry.cam2_from_cam1
        np.testing.assert_allclose(
            geometry.E, np.cross(T.translation, T.rotation.matrix(), axisb=0).T, atol=1e-9
        )


def test_the_model_reprojects_where_the_keypoints_are(pycolmap, exported):
    model = pycolmap.Reconstruction(exported / 'colmap' / 'sparse')
    errors = []
    for point in model.points3D.values():
        assert point.track.length() >= 2
        for element in point.track.elements:
            image = model.images[element.image_id]
            seen = image.points2D[element.point2D_idx]
            errors.append(np.linalg.norm(image.project_point(point.xyz) - seen.xy))
    assert len(errors) > 1000 and max(errors) < 3.0 and np.sqrt(np.mean(np.square(errors))) < 1.0


def test_colmap_triangulates_and_adjusts_what_was_exported(pycolmap, exported, daylight, tmp_path):
    colmap = exported / 'colmap'
    model = pycolmap.Reconstruction(colmap / 'sparse')
    ours, error = model.num_points3D(), model.compute_mean_reprojection_error()
    pycolmap.bundle_adjustment(model)
    assert model.compute_mean_reprojection_error() < error
    images = sorted(model.images.values(), key=lambda image: image.name)
    poses = [
        np.r_[T.translation, T.rotation.quat]
        for T in (image.cam_from_world().inverse() for image in images)
    ]
    stamps = np.array([int(image.name.split('.')[0]) for image in images])
    assert (
        trajectory_accuracy(
            stamps, np.array(poses), open_recording(daylight).ground_truth
        ).ate_percent
        < 2.0
    )

    again = pycolmap.triangulate_points(model, colmap / 'database.db', colmap / 'images', tmp_path)
    assert again.num_points3D() > ours / 2 and again.compute_mean_reprojection_error() < 1.0


def test_the_map_is_the_models_trajectory(pycolmap, exported):
    stamps, poses = files.read_tum(exported / 'map' / files.TRAJECTORY)
    model = pycolmap.Reconstruction(exported / 'colmap' / 'sparse')
    centres = {
        int(image.name.split('.')[0]): image.projection_center() for image in model.images.values()
    }
    assert set(stamps.tolist()) == centres.keys()
    np.testing.assert_allclose(
        poses[:, :3], [centres[stamp] for stamp in stamps.tolist()], atol=1e-7
    )
    head, _, points = (exported / 'map' / 'landmarks.ply').read_bytes().partition(b'end_header\n')
    assert (
        f'element vertex {len(points) // 12}'.encode() in head
        and len(points) // 12 >= model.num_points3D()
    )


@pytest.mark.parametrize('camera', CAMERAS, ids=lambda camera: camera_model(camera)[0])
def test_cameras_are_colmaps(pycolmap, camera):
    name, number, parameters = camera_model(camera)
    assert int(pycolmap.CameraModelId.__members__[name]) == number
    theirs = pycolmap.Camera(
        model=name, width=camera.width, height=camera.height, params=parameters
    )
    xy = torch.rand(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5
    projected = theirs.img_from_cam(np.column_stack((xy.numpy(), np.ones(50))))
    np.testing.assert_allclose(projected, camera.project(xy).numpy() + 0.5, atol=1e-6)


def test_what_cannot_be_exported_is_one_sentence(exported, daylight, tmp_path, capsys):
    for arguments, says in (
        ([], 'say what to write: --colmap DIR, --map DIR, --onnx DIR, or several'),
        (['--colmap', str(exported / 'colmap')], 'database.db exists; choose another folder'),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(['export', str(daylight), *arguments])
        assert stop.value.code == 2 and says in capsys.readouterr().err
    prism = Camera(64, 48, 50.0, 50.0, 32.0, 24.0, 'rational_polynomial', (0.1,) * 12)
    with pytest.raises(ValueError, match='no camera model with thin prism'):
        write_colmap(tmp_path, prism, [], {}, {}, 3.0)
    assert not list(tmp_path.iterdir())


def test_a_recording_too_short_for_a_map_exports_its_images(pycolmap, tmp_path):
    room = render_recording(tmp_path / 'room', frames=2, size=(160, 128), depth_every=2)
    with pytest.raises(SystemExit) as stop:
        cli.main(['export', str(room), '--colmap', str(tmp_path / 'colmap')])
    assert stop.value.code == 1
    with pycolmap.Database.open(tmp_path / 'colmap' / 'database.db') as database:
        assert database.num_images() == 1
    model = pycolmap.Reconstruction(tmp_path / 'colmap' / 'sparse')
    assert model.num_images() == model.num_points3D() == 0


@pytest.fixture
def rtabmap(daylight):
    """Return the adapter as RTAB-Map imports it, detections of two images, and the truth."""
    path = Path(cli.__file__).parent / 'export' / 'rtabmap_imatching.py'
    specification = importlib.util.spec_from_file_location('rtabmap_imatching', path)
    adapter = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(adapter)
    recording = open_recording(daylight)
    pair = evaluation_pairs(recording, 0, 39, steps=[10], per_step=1)[0]
    images = {stamp: image for stamp, image in recording if stamp in (pair.reference, pair.target)}
    adapter.init(0)
    seen = [adapter.detect(images[stamp]) for stamp in (pair.reference, pair.target)]
    queries = torch.from_numpy(seen[0][0][:, :2])
    depths = (recording.depth(stamp) for stamp in (pair.reference, pair.target))
    truth, visible = true_matches(recording.camera, pair, queries, *depths)
    return adapter, seen, truth.numpy(), visible.numpy()


def right(adapter, seen, truth, visible, kept=(slice(None), slice(None))):
    """Return the share of pairs that are right, and their number, of the key points kept."""
    (one, rows_one), (two, rows_two) = (
        (kpts[keep], rows[keep]) for (kpts, rows), keep in zip(seen, kept, strict=True)
    )
    pairs = adapter.match(
        one[:, :2], two[:, :2], one[:, 2], two[:, 2], rows_one, rows_two, 320, 240
    )
    assert pairs.dtype == np.int64 and pairs.shape == (len(pairs), 2) and pairs.flags.c_contiguous
    assert len(set(pairs[:, 0])) == len(set(pairs[:, 1])) == len(pairs)  # no key point twice
    error = np.linalg.norm(two[pairs[:, 1], :2] - truth[kept[0]][pairs[:, 0]], axis=1)[
        visible[kept[0]][pairs[:, 0]]
    ]
    return (error < 4).mean(), len(error)


def test_rtabmap_gets_true_pairs_of_images_that_it_showed(rtabmap):
    adapter, seen, truth, visible = rtabmap
    assert all(
        kpts.dtype == rows.dtype == np.float32 and kpts.shape[1] == 3 for kpts, rows in seen
    )
    share, pairs = right(adapter, seen, truth, visible)
    assert share > 0.95 and pairs > 100
    # as PyMatcher does, with a weights file
    adapter.init(64, 0.2, 20, 0, str(weights.default_path()))
    assert right(adapter, seen, truth, visible, (slice(0, None, 2), slice(None))) >= (0.95, 40)
    assert (
        adapter.match(
            *(np.empty((0, 2)),) * 2, [], [], *(np.empty((0, 64), np.float32),) * 2, 320, 240
        ).size
        == 0
    )


def test_rtabmap_gets_pairs_by_descriptors_of_images_long_ago(rtabmap):
    adapter, seen, truth, visible = rtabmap
    adapter._images.clear()
    share, pairs = right(adapter, seen, truth, visible)
    assert share > 0.5 and pairs > 100
