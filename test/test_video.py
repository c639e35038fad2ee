"""Video files and folders of pictures as recordings."""

import cv2
from imatching_ros.data.recording import Recording, RecordingError
from imatching_ros.data.sieve import BROKEN, RESIZED
from imatching_ros.data.video import open_images
import numpy as np
import pytest

K = np.array([[300.0, 0, 79.5], [0, 310.0, 59.5], [0, 0, 1]])
YAML = """image_width: 160
image_height: 120
camera_name: left
camera_matrix: {rows: 3, cols: 3, data: [200.0, 0, 80.0, 0, 201.0, 60.0, 0, 0, 1]}
distortion_model: plumb_bob
distortion_coefficients: {rows: 1, cols: 5, data: [-0.1, 0.01, 0.0, 0.0, 0.0]}
projection_matrix: {rows: 3, cols: 4, data: [190.0, 0, 81.0, 0, 0, 191.0, 61.0, 0, 0, 0, 1, 0]}
"""


def picture(k):
    image = np.full((120, 160), 60, np.uint8)
    image[20:100, 10 * k:10 * k + 30] = 200
    return image


@pytest.fixture
def video(tmp_path):
    path = tmp_path / 'drive.avi'
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), 20.0, (160, 120))
    assert writer.isOpened()
    for k in range(8):
        writer.write(cv2.cvtColor(picture(k), cv2.COLOR_GRAY2BGR))
    writer.release()
    return path


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / 'pictures'
    path.mkdir()
    for k in range(8):
        cv2.imwrite(str(path / f'frame_{k:04d}.png'), picture(k))
    return path


def test_a_video_is_a_recording(video):
    np.savetxt(video.parent / 'intrinsics.txt', K)
    recording = open_images(video)
    assert (recording.camera.fx, recording.camera.fy, recording.camera.cx) == (300.0, 310.0, 79.5)
    for _ in range(2):  # any number of times
        items = list(recording)
        assert len(items) == len(recording) == 8
        assert [stamp for stamp, _ in items] == [50_000_000 * k for k in range(8)]
        for k, (_, image) in enumerate(items):
            assert image.shape == (120, 160) and image.dtype == np.uint8
            assert np.abs(image.astype(int) - picture(k)).mean() < 3  # it is compressed


def test_a_folder_of_pictures_is_one(folder):
    (folder / 'camera_info.yaml').write_text(YAML)
    recording = open_images(folder)
    assert (
        recording.camera.distortion[0] == -0.1 and recording.camera.distortion_model == 'plumb_bob'
    )
    items = list(recording)
    assert len(items) == len(recording) == 8 and all(
        (image == picture(k)).all() for k, (_, image) in enumerate(items)
    )
    assert [stamp for stamp, _ in items][:3] == [0, 33333333, 66666667]
    given = open_images(folder, camera=[250.0, 250.0, 80.0, 60.0])
    assert given.camera.fx == 250.0 and given.camera.distortion_model == 'none'
    assert open_images(folder, rectified='always').camera.fx == 190.0
    for k, file in enumerate(sorted(folder.glob('*.png'))):
        file.rename(folder / f'{1_700_000_000_000_000_000 + 10 * k}.png')
    assert [stamp - 1_700_000_000_000_000_000 for stamp, _ in open_images(folder)] == [
        10 * k for k in range(8)
    ]


def test_a_bag_stays_a_bag(daylight):
    assert isinstance(open_images(daylight), Recording)
    assert isinstance(open_images(daylight / 'bag'), Recording)


def test_what_cannot_be_used_is_named(video, folder, tmp_path):
    for path in (video, folder):
        with pytest.raises(RecordingError, match='has no intrinsics: give --camera fx fy cx cy'):
            open_images(path)
        with pytest.raises(RecordingError, match='1 2 3 does not begin with fx fy cx cy'):
            open_images(path, camera=[1, 2, 3])
        with pytest.raises(RecordingError, match='1 2 radtan 3 does not begin with fx fy cx cy'):
            open_images(path, camera='1 2 radtan 3')
        with pytest.raises(RecordingError, match='fx is 0'):
            open_images(path, camera=[0, 2, 3, 4])
    (folder / 'camera_info.yaml').write_text(YAML.replace('160', '640'))
    with pytest.raises(RecordingError, match='it is for 640x120, not 160x120'):
        open_images(folder)
    (folder / 'camera_info.yaml').write_text('{')
    with pytest.raises(RecordingError, match='camera_info.yaml cannot be used'):
        open_images(folder)
    (folder / 'camera_info.yaml').unlink()
    (folder / 'intrinsics.txt').write_text('1 2 3\n')
    with pytest.raises(RecordingError, match='a 3x3 matrix is expected'):
        open_images(folder)
    np.savetxt(folder / 'intrinsics.txt', K)
    (tmp_path / 'empty.mp4').write_bytes(b'no video')
    with pytest.raises(RecordingError, match='holds no video'):
        open_images(tmp_path / 'empty.mp4')
    with pytest.raises(RecordingError, match='does not exist'):
        open_images(tmp_path / 'nowhere.mp4')


def test_pictures_that_cannot_be_used_are_left_out_and_counted(folder):
    np.savetxt(folder / 'intrinsics.txt', K)
    (folder / 'frame_0000.png').write_bytes(b'no picture')
    cv2.imwrite(str(folder / 'frame_0003.png'), picture(3)[:60])
    recording = open_images(folder)
    for _ in range(2):
        stamps = [stamp for stamp, _ in recording]
        assert stamps == [round(k / 30 * 1e9) for k in (1, 2, 4, 5, 6, 7)] and len(recording) == 8
        assert recording.left_out == {BROKEN: 1, RESIZED: 1}
    (note,) = recording.notes()
    assert '2 of 8 images were left out' in note and 'frame_0000.png cannot be read' in note
    for file in folder.glob('*.png'):
        file.write_bytes(b'no picture')
    with pytest.raises(RecordingError, match='no picture of .* can be used: 8 of 8 images'):
        list(recording)
    with pytest.raises(RecordingError, match='frame_0000.png cannot be read as a picture'):
        open_images(folder)


def test_pictures_named_by_stamps_that_do_not_grow_are_left_out(folder):
    np.savetxt(folder / 'intrinsics.txt', K)
    names = ['0999999999999999', '1000000000000000', '999999999999999', '1000000033000000']
    for k, file in enumerate(sorted(folder.glob('*.png'))):
        file.rename(folder / f'{names[k]}.png') if k < 4 else file.unlink()
    assert [stamp for stamp, _ in open_images(folder)] == [10**15, 10**15 + 33_000_000]


def test_pictures_of_16_bits_and_turned_ones_are_read_as_a_bag_reads_them(folder):
    np.savetxt(folder / 'intrinsics.txt', K)
    for k, file in enumerate(sorted(folder.glob('*.png'))):
        cv2.imwrite(str(file), picture(k).astype(np.uint16) * 10 + 7000)
    images = [image for _, image in open_images(folder)]
    assert all(np.ptp(image) > 150 for image in images)
    assert len({int(image[0, 0]) for image in images}) == 1  # steady


def test_the_messages_of_pictures_are_those_of_a_bag(folder):
    np.savetxt(folder / 'intrinsics.txt', K)
    recording = open_images(folder)
    (stamp, kind, camera), *images = recording.messages()
    assert (stamp, kind, camera) == (0, 'camera', recording.camera) and len(images) == 8
    for (stamp, kind, message), (own, image) in zip(images, recording, strict=True):
        assert kind == 'image' and message.__msgtype__ == 'sensor_msgs/msg/Image'
        header = message.header.stamp
        assert stamp == own == header.sec * 10**9 + header.nanosec
        assert (message.encoding, message.step) == ('mono8', 160)
        assert np.array_equal(message.data.reshape(message.height, message.width), image)
    assert recording.camera_of(images[3][0]) == camera and recording.depth(0) is None


KALIBR = """cam0:
  camera_model: pinhole
  distortion_coeffs: [-0.28, 0.07, 0.0002, 0.00002]
  distortion_model: radtan
  intrinsics: [210.0, 211.0, 80.0, 60.0]
  resolution: [160, 120]
  rostopic: /cam0/image_raw
cam1:
  camera_model: pinhole
  distortion_coeffs: [0.01, 0.02, 0.03, 0.04]
  distortion_model: equidistant
  intrinsics: [220.0, 221.0, 80.0, 60.0]
  resolution: [160, 120]
  rostopic: /cam1/image_raw
"""


def test_a_calibration_file_is_given(folder, video, tmp_path):
    (tmp_path / 'ros.yaml').write_text(YAML)
    (tmp_path / 'kalibr.yaml').write_text(KALIBR)
    for path in (folder, video):
        assert open_images(path, camera=tmp_path / 'ros.yaml').camera.fx == 200.0
        assert open_images(path, camera=str(tmp_path / 'ros.yaml')).camera.distortion[0] == -0.1
        right = open_images(path, '/cam1/image_raw', camera=tmp_path / 'kalibr.yaml').camera
        assert (right.fx, right.distortion_model) == (220.0, 'equidistant')
        with pytest.raises(RecordingError, match='of /cam0/image_raw, /cam1/image_raw, none'):
            open_images(path, camera=tmp_path / 'kalibr.yaml')
    (tmp_path / 'one.yaml').write_text(KALIBR.partition('cam1')[0])
    one = open_images(folder, camera=tmp_path / 'one.yaml').camera
    assert (one.fx, one.distortion) == (210.0, (-0.28, 0.07, 0.0002, 0.00002))
    (tmp_path / 'other.yaml').write_text('a: 1')
    with pytest.raises(RecordingError, match="neither of ROS's camera_calibration nor of Kalibr"):
        open_images(folder, camera=tmp_path / 'other.yaml')
    (tmp_path / 'omni.yaml').write_text(KALIBR.replace('pinhole', 'omni').partition('cam1')[0])
    with pytest.raises(RecordingError, match="camera model 'omni' is not known"):
        open_images(folder, camera=tmp_path / 'omni.yaml')
