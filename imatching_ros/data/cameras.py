"""Where a recording's camera comes from: its camera_info, a file beside it, or the user."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from ruamel.yaml import YAML, YAMLError

from ..geometry.camera import Camera, is_rectified

#: What `--camera` takes: numbers with an optional model's name, or a calibration file.
Given = str | Path | Sequence[float | str]
HOW = '--camera fx fy cx cy [model] [d ...] in pixels, or --camera calibration.yaml'


def rectified_images(rectified: str, image_topic: str | None) -> bool:
    """Return whether images are rectified: "always", "never", or as "auto" reads their topic."""
    return rectified == 'always' or rectified == 'auto' and is_rectified(image_topic or '')


def given_camera(
    given: Given, width: int, height: int, rectified: bool = False, image_topic: str | None = None
) -> Camera:
    """
    Return the camera that the user gives for images of this size.

    Numbers are ``fx fy cx cy``, px, then perhaps the distortion model's name and its
    coefficients, by default OpenCV's. A file is one that ROS's camera_calibration, or Kalibr, has
    written; of several cameras in it, that of ``image_topic``. ``rectified`` takes P of it. Raises
    ValueError, one sentence, where it cannot be used.
    """
    words = given.split() if isinstance(given, str) else [given]
    words = words if isinstance(given, str | Path) else list(map(str, given))
    if not words or _number(words[0]) is None:
        return _read_yaml(Path(given), width, height, rectified, image_topic)
    numbers = [_number(word) for word in words]
    model = ' '.join(word for word, number in zip(words, numbers, strict=True) if number is None)
    if None in numbers[:4] or len(numbers) < 4:
        raise ValueError(f'{" ".join(words)} does not begin with fx fy cx cy')
    fx, fy, cx, cy, *D = (number for number in numbers if number is not None)
    return Camera.from_intrinsics(width, height, [fx, 0, cx, 0, fy, cy, 0, 0, 1], D, model)


def camera_beside(path: Path, width: int, height: int, rectified: bool = False) -> Camera | None:
    """
    Return the camera of a video file, or a folder of pictures, from a file beside or in it.

    That is ``camera_info.yaml``, as ROS's camera_calibration writes it, or ``intrinsics.txt``, a
    3x3 matrix. None where there is neither. Raises ValueError, one sentence, where it cannot be
    used.
    """
    for folder in (path, path.parent) if path.is_dir() else (path.parent,):
        if (file := folder / 'camera_info.yaml').is_file():
            return _read_yaml(file, width, height, rectified, None)
        if (file := folder / 'intrinsics.txt').is_file():
            try:
                K = np.loadtxt(file)
                if K.shape != (3, 3):
                    raise ValueError(f'a 3x3 matrix is expected, its shape is {K.shape}')
                return Camera.from_intrinsics(width, height, K.ravel().tolist())
            except ValueError as error:
                raise ValueError(f'{file} cannot be used: {error}') from None
    return None


def _number(word: str | Path) -> float | None:
    try:
        return float(word)
    except (TypeError, ValueError):
        return None


def _read_yaml(
    file: Path, width: int, height: int, rectified: bool, image_topic: str | None
) -> Camera:
    if not file.is_file():
        raise ValueError(f'{file} does not exist; give {HOW}')
    try:
        about = YAML(typ='safe').load(file.read_text())
        if not isinstance(about, dict):
            raise ValueError('it holds no calibration')
        if 'camera_matrix' not in about:
            return _kalibr(_chosen(about, image_topic), width, height)
        _check_size(about['image_width'], about['image_height'], width, height)
        nowhere = SimpleNamespace(x_offset=0, y_offset=0, width=0, height=0)
        info = SimpleNamespace(
            width=width, height=height, k=about['camera_matrix']['data'],
            d=about['distortion_coefficients']['data'],
            distortion_model=about.get('distortion_model', ''),
            p=about.get('projection_matrix', {}).get('data', [0.0] * 12),
            roi=nowhere, binning_x=0, binning_y=0,
        )
        return Camera.from_camera_info(info, rectified)
    except KeyError as error:
        raise ValueError(f'{file} cannot be used: it has no {error}') from None
    except (ValueError, TypeError, AttributeError, YAMLError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f'{file} cannot be used: {line}') from None


def _chosen(about: dict, image_topic: str | None) -> dict:
    """Return the one camera of Kalibr's file that is meant."""
    if 'intrinsics' in about:
        return about
    cameras = {
        name: camera for name, camera in about.items()
        if isinstance(camera, dict) and 'intrinsics' in camera
    }
    if not cameras:
        raise ValueError("it is neither of ROS's camera_calibration nor of Kalibr")
    mine = [camera for camera in cameras.values() if camera.get('rostopic') == image_topic]
    if len(cameras) > 1 and len(mine) != 1:
        topics = ', '.join(str(camera.get('rostopic')) for camera in cameras.values())
        raise ValueError(f'it holds the cameras of {topics}, none of them of {image_topic}')
    return mine[0] if len(mine) == 1 else next(iter(cameras.values()))


def _kalibr(about: dict, width: int, height: int) -> Camera:
    if (kind := about.get('camera_model', 'pinhole')) != 'pinhole':
        raise ValueError(f"camera model '{kind}' is not known; calibrate as pinhole")
    _check_size(*about.get('resolution', (width, height)), width, height)
    fx, fy, cx, cy = about['intrinsics']
    D = about.get('distortion_coeffs', about.get('distortion_coefficients', []))
    model = about.get('distortion_model', '')
    return Camera.from_intrinsics(width, height, [fx, 0, cx, 0, fy, cy, 0, 0, 1], D, str(model))


def _check_size(own_width: int, own_height: int, width: int, height: int) -> None:
    if (own_width, own_height) != (width, height):
        raise ValueError(f'it is for {own_width}x{own_height}, not {width}x{height}')
