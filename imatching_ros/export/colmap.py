"""
Keyframes, matches, two-view geometries and the solved map in the form that COLMAP reads.

The database has the tables that every COLMAP knows; the newer ones of rigs and frames COLMAP adds
by itself. In COLMAP the upper left corner of the image is (0, 0) and the first pixel's centre
(0.5, 0.5), so half a pixel is added here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import contextlib
from dataclasses import dataclass
from pathlib import Path
import sqlite3

import cv2
import numpy as np
import torch
from torch import Tensor

from ..files import replacing, write
from ..geometry import lie
from ..geometry.camera import Camera
from ..geometry.correspondences import Correspondences
from ..geometry.two_view import relative_pose

DATABASE, IMAGES, MODEL = 'database.db', 'images', 'sparse'
PAIR = 2**31 - 1  #: COLMAP numbers a pair of images PAIR * first + second
CALIBRATED = 2  #: COLMAP's mark of a two-view geometry from an essential matrix
EPIPOLAR_PX = 2.0  #: of an inlier of a two-view geometry
CENTRE = 0.5

SCHEMA = """
CREATE TABLE cameras (camera_id INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL, model INTEGER NOT NULL,
    width INTEGER NOT NULL, height INTEGER NOT NULL, params BLOB,
      prior_focal_length INTEGER NOT NULL);
CREATE TABLE images (image_id INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL,
  name TEXT NOT NULL UNIQUE,
    camera_id INTEGER NOT NULL, FOREIGN KEY(camera_id) REFERENCES cameras(camera_id));
CREATE TABLE keypoints (image_id INTEGER PRIMARY KEY NOT NULL, rows INTEGER NOT NULL,
  cols INTEGER NOT NULL, data BLOB,
    FOREIGN KEY(image_id) REFERENCES images(image_id) ON DELETE CASCADE);
CREATE TABLE matches (pair_id INTEGER PRIMARY KEY NOT NULL, rows INTEGER NOT NULL,
  cols INTEGER NOT NULL, data BLOB);
CREATE TABLE two_view_geometries (pair_id INTEGER PRIMARY KEY NOT NULL, rows INTEGER NOT NULL,
  cols INTEGER NOT NULL,
    data BLOB, config INTEGER NOT NULL, F BLOB, E BLOB, H BLOB, qvec BLOB, tvec BLOB);
"""


@dataclass(frozen=True)
class Exported:
    """How much was written."""

    images: int
    posed: int  #: images with a pose in the model
    pairs: int  #: pairs with matches
    verified: int  #: pairs with a two-view geometry
    points: int
    observations: int
    error_px: float  #: RMS reprojection error over the observations; NaN where there are none


@dataclass(frozen=True)
class _Image:
    number: int  # COLMAP's, from 1
    name: str
    place: dict[int, int]  # track to index of its keypoint
    uv: Tensor  # (N, 2) float64 px


def image_name(stamp: int) -> str:
    """Return the file of a keyframe in ``images/``."""
    return f'{stamp}.png'


def begin(folder: Path, camera: Camera) -> None:
    """
    Make room for the pictures in ``folder``.

    Raises before the work what ``write_colmap`` would after it: ValueError where COLMAP has no
    model for the camera, FileExistsError where there is a database already.
    """
    _accepted(folder, camera)
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)


def write_picture(folder: Path, stamp: int, image: np.ndarray) -> None:
    """Write a keyframe's image, (H, W) uint8, into ``images/``."""
    write(folder / IMAGES / image_name(stamp), cv2.imencode('.png', image)[1].tobytes())


def write_colmap(
    folder: Path,
    camera: Camera,
    keyframes: Sequence[Correspondences],
    T_world_camera: Mapping[int, Tensor],
    landmarks: Mapping[int, Tensor],
    prune_px: float,
) -> Exported:
    """
    Write ``database.db`` and the model ``sparse/`` beside the keyframes' pictures in ``images/``.

    ``keyframes`` are the correspondences of each keyframe, in the order of their stamps;
    ``T_world_camera`` their poses (7,) by stamp, those that have one; ``landmarks`` points (3,) by
    track. An observation belongs to the model if it reprojects less than ``prune_px`` away, a
    landmark if two images or more observe it so. Raises ValueError where COLMAP has no model for
    the camera, FileExistsError where ``folder`` holds a database already.
    """
    model, database = _accepted(folder, camera)
    images = _images(keyframes)
    pairs = list(_pairs(keyframes, images))
    geometries = [
        geometry for i, j, matches in pairs if (geometry := _two_view(camera, i, j, matches))
    ]
    _write_database(database, camera, model, images, pairs, geometries)
    points = _points(camera, images, T_world_camera, landmarks, prune_px)
    _write_model(folder, camera, model, images, T_world_camera, points)
    errors = np.concatenate([point.errors for point in points]) if points else np.empty(0)
    return Exported(
        images=len(images),
        posed=sum(stamp in T_world_camera for stamp in images),
        pairs=len(pairs),
        verified=len(geometries),
        points=len(points),
        observations=len(errors),
        error_px=float(np.sqrt(np.mean(errors**2))) if len(errors) else float('nan'),
    )


def _accepted(folder: Path, camera: Camera) -> tuple[tuple[str, int, list[float]], Path]:
    """Return the camera's model and where the database will be."""
    model, database = camera_model(camera), folder / DATABASE
    if database.exists():
        raise FileExistsError(f'{database} exists; choose another folder')
    return model, database


def camera_model(camera: Camera) -> tuple[str, int, list[float]]:
    """Return COLMAP's name, number and parameters of a camera; ValueError where it has none."""
    pinhole = [camera.fx, camera.fy, camera.cx + CENTRE, camera.cy + CENTRE]
    d = list(camera.distortion)
    if camera.distortion_model == 'none':
        return 'PINHOLE', 1, pinhole
    if camera.distortion_model == 'equidistant':
        return 'OPENCV_FISHEYE', 5, pinhole + d
    if any(d[8:]):
        raise ValueError(
            'COLMAP has no camera model with thin prism distortion; rectify the images first'
        )
    if not any(d[4:]):
        return 'OPENCV', 4, pinhole + d[:4]
    return 'FULL_OPENCV', 6, pinhole + (d + [0.0] * 4)[:8]


def _write_database(
    database: Path, camera: Camera, model: tuple[str, int, list[float]],
    images: Mapping[int, _Image], pairs: Sequence[tuple[_Image, _Image, np.ndarray]],
    geometries: Sequence[tuple],
) -> None:
    """Write the camera, the images' key points, the matches and the two-view geometries."""
    _, number, parameters = model
    row = number, camera.width, camera.height, np.array(parameters, np.float64).tobytes()
    with replacing(database) as part, contextlib.closing(sqlite3.connect(part)) as connection:
        connection.executescript(SCHEMA)
        connection.execute('INSERT INTO cameras VALUES (1, ?, ?, ?, ?, 1)', row)
        for image in images.values():
            connection.execute('INSERT INTO images VALUES (?, ?, 1)', (image.number, image.name))
            uv = (image.uv.numpy() + CENTRE).astype(np.float32)
            connection.execute(
                'INSERT INTO keypoints VALUES (?, ?, 2, ?)', (image.number, len(uv), uv.tobytes())
            )
        for i, j, matches in pairs:
            connection.execute(
                'INSERT INTO matches VALUES (?, ?, 2, ?)',
                (_pair(i, j), len(matches), matches.tobytes()),
            )
        connection.executemany(
            'INSERT INTO two_view_geometries VALUES (?, ?, 2, ?, ?, NULL, ?, NULL, ?, ?)',
            geometries,
        )
        connection.commit()


def _images(keyframes: Sequence[Correspondences]) -> dict[int, _Image]:
    """
    Return each keyframe's key points, one for each track, by stamp.

    Where a later keyframe was matched against this one, its reference points are this one's
    keypoints; the other tracks are where the most certain of its own rows has them.
    """
    found: dict[int, dict[int, Tensor]] = {message.stamp: {} for message in keyframes}
    for message in keyframes:
        for row in torch.argsort(message.cov[:, 0] + message.cov[:, 2], descending=True).tolist():
            found[message.stamp][int(message.track[row])] = message.uv[row]
    for message in keyframes:
        references = zip(
            message.ref_stamp.tolist(), message.track.tolist(), message.ref_uv, strict=True
        )
        for stamp, track, uv in references:
            if stamp in found:
                found[stamp][track] = uv
    images = {}
    for number, (stamp, points) in enumerate(found.items(), 1):
        place = {track: index for index, track in enumerate(points)}
        uv = torch.stack(list(points.values())) if points else torch.empty(0, 2)
        images[stamp] = _Image(number, image_name(stamp), place, uv.double())
    return images


def _pairs(
    keyframes: Sequence[Correspondences], images: Mapping[int, _Image]
) -> Iterator[tuple[_Image, _Image, np.ndarray]]:
    """Yield older image, newer image, and their matches (M, 2) uint32, indices of key points."""
    for message in keyframes:
        for stamp in torch.unique(message.ref_stamp).tolist():
            if stamp in images:
                i, j = images[stamp], images[message.stamp]
                tracks = message.track[message.ref_stamp == stamp].tolist()
                places = [(i.place[track], j.place[track]) for track in tracks]
                yield i, j, np.array(places, np.uint32)


def _pair(i: _Image, j: _Image) -> int:
    return PAIR * i.number + j.number


def _two_view(camera: Camera, i: _Image, j: _Image, matches: np.ndarray) -> tuple | None:
    """Return a row of two_view_geometries, or None where the pair has none."""
    rows = torch.from_numpy(matches.astype(np.int64))
    found = relative_pose(
        camera.normalise(i.uv[rows[:, 0]]), camera.normalise(j.uv[rows[:, 1]]), EPIPOLAR_PX,
        camera.focal,
    )
    if found is None:
        return None
    T, inliers = found
    R, t = lie.matrix(T).split((3, 1), -1)
    E = torch.linalg.cross(t.expand(3, 3), R, dim=0)
    kept = matches[inliers.numpy()]
    geometry = (tensor.contiguous().numpy().tobytes() for tensor in (E, T[[6, 3, 4, 5]], T[:3]))
    return _pair(i, j), len(kept), kept.tobytes(), CALIBRATED, *geometry


@dataclass(frozen=True)
class _Point:
    track: int
    xyz: Tensor  # (3,)
    seen: list[tuple[int, int]]  # stamp and index of keypoint
    errors: np.ndarray  # of each, px


def _points(
    camera: Camera,
    images: Mapping[int, _Image],
    T_world_camera: Mapping[int, Tensor],
    landmarks: Mapping[int, Tensor],
    prune_px: float,
) -> list[_Point]:
    """Return the landmarks that two images or more observe within ``prune_px``."""
    seen: dict[int, list[tuple[int, int, float]]] = {}
    for stamp, image in images.items():
        tracks = [track for track in image.place if track in landmarks]
        if stamp not in T_world_camera or not tracks:
            continue
        local = lie.act(
            lie.inverse(T_world_camera[stamp]), torch.stack([landmarks[track] for track in tracks])
        )
        places = [image.place[track] for track in tracks]
        error = (camera.project(local[:, :2] / local[:, 2:]) - image.uv[places]).norm(dim=-1)
        good = (local[:, 2] > 0) & (error < prune_px)
        for track, place, one, keep in zip(
            tracks, places, error.tolist(), good.tolist(), strict=True
        ):
            if keep:
                seen.setdefault(track, []).append((stamp, place, one))
    return [
        _Point(
            track, landmarks[track], [one[:2] for one in rows], np.array([one[2] for one in rows])
        )
        for track, rows in sorted(seen.items())
        if len(rows) > 1
    ]


def _write_model(
    folder: Path,
    camera: Camera,
    model: tuple[str, int, list[float]],
    images: Mapping[int, _Image],
    T_world_camera: Mapping[int, Tensor],
    points: Sequence[_Point],
) -> None:
    """Write the model: cameras.txt, images.txt and points3D.txt."""
    name, _, parameters = model
    lines = ['# CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]']
    lines.append(
        f'1 {name} {camera.width} {camera.height} '
        + ' '.join(f'{value:.12g}' for value in parameters)
    )
    _write_lines(folder / MODEL / 'cameras.txt', lines)

    belongs: dict[tuple[int, int], int] = {}
    for k, point in enumerate(points, 1):
        for stamp, place in point.seen:
            belongs[stamp, place] = k
    lines = [
        '# IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME',
        '# POINTS2D[] as (X, Y, POINT3D_ID)',
    ]
    for stamp, image in images.items():
        if stamp in T_world_camera:
            T = lie.inverse(T_world_camera[stamp])[[6, 3, 4, 5, 0, 1, 2]]
            lines.append(
                f'{image.number} '
                + ' '.join(f'{value:.15g}' for value in T.tolist())
                + f' 1 {image.name}'
            )
            rows = enumerate((image.uv + CENTRE).tolist())
            lines.append(
                ' '.join(
                    f'{x:.6f} {y:.6f} {belongs.get((stamp, place), -1)}' for place, (x, y) in rows
                )
            )
    _write_lines(folder / MODEL / 'images.txt', lines)

    grey: dict[int, np.ndarray] = {}
    lines = ['# POINT3D_ID, X, Y, Z, R, G, B, ERROR, TRACK[] as (IMAGE_ID, POINT2D_IDX)']
    for k, point in enumerate(points, 1):
        stamp, place = point.seen[0]
        if stamp not in grey:
            picture = cv2.imread(str(folder / IMAGES / image_name(stamp)), cv2.IMREAD_GRAYSCALE)
            at = images[stamp].uv.round().long().clamp_min(0).numpy()
            height, width = picture.shape
            grey[stamp] = picture[at[:, 1].clip(max=height - 1), at[:, 0].clip(max=width - 1)]
        colour = ' '.join([str(grey[stamp][place])] * 3)
        track = ' '.join(f'{images[stamp].number} {place}' for stamp, place in point.seen)
        xyz = ' '.join(f'{value:.12g}' for value in point.xyz.tolist())
        lines.append(f'{k} {xyz} {colour} {point.errors.mean():.6f} {track}')
    _write_lines(folder / MODEL / 'points3D.txt', lines)


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    write(path, '\n'.join([*lines, '']))
