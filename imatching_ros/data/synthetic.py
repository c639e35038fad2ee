"""
Recordings made by the program.

Textured 3-D scenes, camera paths, a camera's faults, exact ground truth.

A scene is a list of textured parallelograms. A pixel's ray meets each of their planes in closed
form, so depth is exact and needs no GL; the nearest one wins. World frame: z up, metres. Camera
frame: optical.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
import shutil
import tempfile

import cv2
from imatching_ros.data import textures
from imatching_ros.files import write_tum
from imatching_ros.geometry import lie
from imatching_ros.geometry.camera import Camera
import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import get_typestore, Stores
import torch
from torch import Tensor

LEVELS = 7  #: of a texture's pyramid; sizes are multiples of 2^(LEVELS - 1)
PAD = 2  #: texels repeated around each level, so that interpolation never reads its neighbour
NEAR = 0.02  #: metres; nothing nearer is drawn
#: Where a pixel is sampled (pixels from its centre): four rooks, none sharing a row or a column.
SAMPLES = ((-0.375, -0.125), (0.125, -0.375), (-0.125, 0.375), (0.375, 0.125))
START_NS = 1_700_000_000_000_000_000  #: stamp of a recording's first frame

Motion = Callable[[np.ndarray], np.ndarray]  # seconds (N,) -> T_world_camera (N, 7)


@dataclass(frozen=True)
class Sensor:
    """
    What a camera does to the light that reaches it.

    Out of the scene's irradiance E in [0, 1] comes ``255 * (gain * vignette * E + pattern + noise)
    ** gamma``, where gain and gamma wander with time. Noise is Gaussian; at E = 1/2 a fifth of its
    variance is read noise, the rest shot noise, which grows with E. The pattern stays: most of it
    is columns, as the amplifiers of a CMOS sensor make.
    """

    noise: float = 2.0  #: standard deviation at mid-grey, grey levels of 255
    #: standard deviation of what each column and pixel adds to every image, grey levels
    fixed_pattern: float = 0.0
    #: noise is blurred by a Gaussian of this deviation (as in-camera processing does)
    grain_px: float = 0.0
    exposure_s: float = 0.008  #: the shutter's opening: how long motion is averaged
    brightness: float = 1.0  #: mean gain
    #: by how much the gain (in e-folds) and the gamma change over some seconds
    wander: float = 0.15
    vignetting: float = 0.25  #: loss of light in the corners, 0 to 1

    @classmethod
    def low_light(cls, strength: float) -> Sensor:
        """
        Return a sensor in the dark.

        0 is daylight, 1 a picture whose noise (25 grey levels) all but hides the texture.
        """
        if not 0.0 <= strength <= 1.0:
            raise ValueError(f'low light has a strength from 0 to 1, {strength:g} was given')
        return cls(
            noise=2.0 + 23.0 * strength,
            grain_px=0.6 * strength,
            exposure_s=0.008 + 0.017 * strength,
            brightness=1.0 - 0.45 * strength,
            wander=0.15 + 0.2 * strength,
            vignetting=0.25 + 0.3 * strength,
        )

    def pattern(self, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """
        Return the sensor's fixed pattern, (H, W) float32, in units of full light.

        It is for images of ``size`` (W, H).
        """
        columns = rng.standard_normal((1, size[0]), dtype=np.float32)
        pixels = rng.standard_normal(size[::-1], dtype=np.float32)
        return np.float32(self.fixed_pattern / 255) * (
            np.float32(0.9) * columns + np.float32(0.44) * pixels
        )

    def expose(
        self, irradiance: np.ndarray, wander: np.ndarray, rng: np.random.Generator,
        pattern: np.ndarray | float = 0.0,
    ) -> np.ndarray:
        """
        Return the image (H, W) uint8 of an irradiance (H, W) float32 in [0, 1].

        wander: two values, about -1 to 1.
        """
        height, width = irradiance.shape
        gain = np.float32(self.brightness * np.exp(self.wander * wander[0]))
        light = irradiance * gain * self._vignette(height, width)
        noise = rng.standard_normal((height, width), dtype=np.float32)
        if self.grain_px > 0:
            noise = cv2.GaussianBlur(noise, (0, 0), self.grain_px)
            noise /= noise.std()
        light += (self.noise / 255) * np.sqrt(0.2 + 1.6 * light) * noise + pattern
        np.clip(light, 0, 1, out=light)
        light = cv2.pow(light, float(np.exp(self.wander * wander[1])))
        return np.rint(255 * light).astype(np.uint8)

    def _vignette(self, height: int, width: int) -> np.ndarray:
        y, x = (
            np.linspace(-1, 1, height, dtype=np.float32)[:, None],
            np.linspace(-1, 1, width, dtype=np.float32),
        )
        return 1 - np.float32(self.vignetting / 2) * (x * x + y * y)


class Scene:
    """
    Textured parallelograms: a point is ``origin + s * right + t * down`` with s, t in [0, 1].

    Each is seen from the side where `right` points right and `down` points down; from behind it is
    not there.
    """

    def __init__(
        self, quads: np.ndarray, texture: np.ndarray, shade: np.ndarray, images: list[np.ndarray]
    ) -> None:
        """
        Take the surfaces and their images. quads (Q, 3, 3) float64.

        Rows origin, right, down, metres; texture (Q,): index of its image (H, W) uint8; shade
        (Q,): factor on its brightness.
        """
        self.quads = quads
        self.atlas, place = _pack(images)  # one picture of all pyramids: a frame is two look-ups
        self.place = place[texture]  # (Q, 4): x, y, width, height of level 0
        self.shade = shade.astype(np.float32)

    def render(self, T_world_camera: Tensor, camera: Camera) -> tuple[np.ndarray, np.ndarray]:
        """
        Return irradiance (H, W) float32 in [0, 1] and depth (H, W) float32.

        They are of a camera at rest at T_world_camera (7,).

        Depth is that of the pixel's centre along the optical axis, metres, exact; 0 where nothing
        is seen.
        """
        return self.image(T_world_camera.expand(len(SAMPLES), 7), camera), self.depth(
            T_world_camera, camera
        )

    def image(self, T_world_camera: Tensor, camera: Camera) -> np.ndarray:
        """
        Irradiance (H, W) float32 in [0, 1].

        Averaged over the exposure's poses T_world_camera (4, 7).

        The four poses share out the four samples of every pixel, so that motion blur costs
        nothing.
        """
        total = np.zeros((camera.height, camera.width), np.float32)
        for pose, offset in zip(T_world_camera, SAMPLES, strict=True):
            total += self._sample(pose, camera, offset)
        return total / np.float32(255 * len(SAMPLES))

    def depth(self, T_world_camera: Tensor, camera: Camera) -> np.ndarray:
        """
        Depth (H, W) float32 of the pixels' centres along the optical axis, metres.

        Seen from T_world_camera (7,).
        """
        return _inverse(
            self._cast(T_world_camera, _rays(camera, (0.0, 0.0), np.float64))[1]
        ).astype(np.float32)

    def _cast(
        self, pose: Tensor, rays: tuple[np.ndarray, ...]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        Return the nearest quad along each ray.

        Its index (H, W), 1 / depth (H, W), and the linear forms (Q, 3, 3).

        With the camera frame's o + s r + t d = z (x, y, 1), the rows of the inverse of [r d o]
        times (x, y, 1) are s / z, t / z and 1 / z: all three are linear in the ray.
        """
        x, y, columns, rows = rays
        R, t = lie.rotation(pose[3:]).numpy(), pose[:3].numpy()
        local = self.quads @ R
        local[:, 0] -= t @ R
        front = np.einsum('qi,qi->q', np.cross(local[:, 1], local[:, 2]), local[:, 0]) > 1e-9
        forms = np.zeros((len(local), 3, 3))
        forms[front] = np.linalg.inv(local[front][:, [1, 2, 0]].transpose(0, 2, 1))
        exact = forms.astype(x.dtype)

        nearest = np.zeros(x.shape, x.dtype)  # 1 / depth
        index = np.full(x.shape, -1, np.int16)
        for q, box in _visible(local, front, columns, rows):
            bx, by = x[box], y[box]
            (a, b, c), (d, e, f), (g, h, i) = exact[q]
            w = g * bx + h * by + i
            wins = w > nearest[box]
            if not wins.any():
                continue
            s = a * bx + b * by + c
            wins &= (s >= 0) & (s <= w)
            s = d * bx + e * by + f
            wins &= (s >= 0) & (s <= w)
            np.copyto(nearest[box], w, where=wins)
            np.copyto(index[box], q, where=wins)
        return index, nearest, forms

    def _sample(self, pose: Tensor, camera: Camera, offset: tuple[float, float]) -> np.ndarray:
        """
        Return grey values (H, W) float32 in [0, 255].

        They are along the rays through one point of each pixel.
        """
        x, y, *_ = rays = _rays(camera, offset, np.float32)
        index, nearest, forms = self._cast(pose, rays)
        depth = _inverse(nearest)
        width, height = self.place[:, 2], self.place[:, 3]
        forms[:, 0] *= width[:, None]
        forms[:, 1] *= height[:, None]
        a, b, c, d, e, f, g, h, _ = (
            np.ascontiguousarray(v, np.float32).take(index) for v in forms.reshape(-1, 9).T
        )
        u = (a * x + b * y + c) * depth
        v = (d * x + e * y + f) * depth
        # The pixel's longer side on the texture, in texels; one level finer, as four samples share
        # the pixel.
        along_x = (np.square(a - u * g) + np.square(d - v * g)) / np.float32(camera.fx**2)
        along_y = (np.square(b - u * h) + np.square(e - v * h)) / np.float32(camera.fy**2)
        side = np.maximum(np.maximum(along_x, along_y) * depth * depth, 1e-12)
        level = np.clip(0.5 * np.log2(side) - 1, 0, LEVELS - 1.001)
        lower = np.floor(level)
        blend = level - lower
        left, top, wide = (self.place[:, k].astype(np.float32).take(index) for k in range(3))
        grey = self._look_up(u, v, left, top, wide, lower)
        grey += blend * (self._look_up(u, v, left, top, wide, lower + 1) - grey)
        grey *= self.shade.take(index)
        grey[index < 0] = 0
        return grey

    def _look_up(self, u, v, left, top, wide, level) -> np.ndarray:
        scale = np.exp2(-level)
        map_x = left + (2 * PAD) * level + (2 - 2 * scale) * wide + u * scale - np.float32(0.5)
        map_y = top + v * scale - np.float32(0.5)
        return cv2.remap(self.atlas, map_x, map_y, cv2.INTER_LINEAR).astype(np.float32)


def room(rng: np.random.Generator, texels_per_m: float, surfaces: str = 'mixed') -> Scene:
    """
    Return a furnished room, 7 x 6 x 3 m about the origin of x and y.

    Its middle, 3 x 2.4 m, is left free for the camera.

    surfaces: "mixed"; "plain", weak textures and no pictures on the walls; or "repetitive", bricks
    and boards alone.
    """
    build = _Builder(rng, texels_per_m)
    wall = (textures.bricks, textures.stains, textures.plaster, textures.boards)
    kinds = (
        textures.shapes, textures.poster, textures.bricks, textures.boards, textures.stains,
        textures.plaster,
    )
    if surfaces == 'plain':
        wall, kinds = (textures.plaster,) * 4, (textures.plaster,) * 5 + (textures.stains,)
    elif surfaces == 'repetitive':
        wall, kinds = (textures.bricks,) * 4, (textures.bricks, textures.boards) * 3
    build.box(
        (0, 0, 1.5), (7, 6, 3), 0.0, [*rng.permutation(4), int(rng.choice([1, 3])), 2], wall,
        inside=True,
    )

    # pictures on the walls
    for ahead, reach, wide in ((0, 3.48, 6), (1, 2.98, 7), (2, 3.48, 6), (3, 2.98, 7)):
        out, right = _planar(ahead * np.pi / 2), _planar((ahead - 1) * np.pi / 2)
        for left in (
            np.arange(-wide / 2 + 0.2, wide / 2 - 1.4, 1.25) if surfaces != 'plain' else ()
        ):
            across, down = rng.uniform(0.5, 1.1), rng.uniform(0.4, 1.0)
            corner = (
                out * reach + right * (left + rng.uniform(0, 0.2)) + (0, 0, rng.uniform(1.5, 2.7))
            )
            shape = [64 * round(edge * texels_per_m / 64) or 64 for edge in (down, across)]
            (picture,) = build.pool((kinds[rng.integers(2)],), 1, shape)
            build.quad(corner, across * right, (0, 0, -down), picture, 1.0)

    def place(radius: float, angle: float, size: np.ndarray, base: float) -> None:
        at = np.array([1.15 * radius * np.cos(angle), radius * np.sin(angle), base + size[2] / 2])
        build.box(at, size, rng.uniform(0, np.pi), rng.integers(0, len(kinds), 6), kinds)

    for k in range(14):  # furniture along the walls, most of it with something on top
        angle = 2 * np.pi * (k + rng.uniform(0.2, 0.8)) / 14
        radius = rng.uniform(2.2, 2.7)
        size = rng.uniform((0.35, 0.35, 0.4), (0.9, 0.7, 1.3))
        place(radius, angle, size, 0.0)
        if rng.random() < 0.7:
            place(radius, angle, size * rng.uniform(0.35, 0.8, 3), size[2])
    for k in range(5):  # pillars and hanging boxes, nearer: they occlude
        angle = 2 * np.pi * (k + rng.uniform(0.1, 0.9)) / 5
        place(2.0, angle, np.array([*rng.uniform(0.1, 0.22, 2), 3.0]), 0.0)
        place(2.1, angle + 0.5, rng.uniform(0.2, 0.45, 3), rng.uniform(1.7, 2.3))
    return build.scene()


def street(rng: np.random.Generator, road: Road) -> Scene:
    """
    Return a winding street along `road`.

    Ground, houses on both sides, parked cars, posts, far hills and a sky.
    """
    build = _Builder(rng)
    build.box(
        (0, 0, 100), (900, 900, 210), 0.0, [0] * 6, (textures.clouds,), inside=True,
        texels=(512, 1024),
    )

    ground = build.pool((textures.stains, textures.stains, textures.bricks), 6, (1024, 1024))
    build.quad((-450, 450, -0.1), (900, 0, 0), (0, -900, 0), ground[0], 0.8)
    first, last = np.sort(np.stack([road.at(s)[0] for s in (-30.0, road.length)]), 0)
    for x in np.arange(first[0] - 30, last[0] + 30, 10.0):
        for y in np.arange(first[1] - 30, last[1] + 30, 10.0):
            if road.distance(np.array([x + 5, y + 5])) < 22:
                build.quad(
                    (x, y + 10, 0), (10, 0, 0), (0, -10, 0), int(rng.choice(ground)),
                    rng.uniform(0.8, 1.0),
                )
    paint = build.pool((textures.plaster,), 2, (64, 256))
    for s in np.arange(-15.0, road.length, 7.0):
        at, heading = road.at(s)
        along, across = _planar(heading), _planar(heading - np.pi / 2)
        for offset, long in ((0.0, 3.0), (-3.0, 7.0), (3.0, 7.0)):
            corner = np.array([*at, 0.01]) + across * (offset - 0.09)
            build.quad(
                corner + long * along, 0.18 * across, -long * along, paint[offset == 0], 1.3
            )

    fronts = build.pool((textures.facade,), 12, (640, 960))
    sides = build.pool((textures.bricks, textures.stains, textures.plaster), 6, (512, 512))
    bodies = build.pool(
        (textures.shapes, textures.poster, textures.boards, textures.stains), 10, (256, 384)
    )
    for side in (-1, 1):
        s = -20.0
        while s < road.length:
            size = np.array([rng.uniform(6, 12), 8.0, rng.uniform(4.5, 10)])
            at, heading = road.at(s + size[0] / 2)
            centre = np.array([*at, size[2] / 2]) + side * _planar(heading + np.pi / 2) * (
                rng.uniform(6.5, 8.5) + 4
            )
            face = rng.choice(fronts, 6)
            face[[0, 1]] = rng.choice(sides, 2)
            build.box(centre, size, heading, face)
            s += size[0] + rng.choice([0.0, rng.uniform(0.5, 4)])
        s = -10.0
        while s < road.length:
            at, heading = road.at(s)
            out = side * _planar(heading + np.pi / 2)
            kind = rng.random()
            if kind < 0.6:  # a car: its body and its cabin
                centre = np.array([*at, 0.6]) + out * rng.uniform(4.0, 4.5)
                build.box(centre, (4.2, 1.75, 0.8), heading, rng.choice(bodies, 6))
                build.box(centre + (0, 0, 0.68), (2.2, 1.5, 0.56), heading, rng.choice(bodies, 6))
            elif kind < 0.8:  # a crate, a kiosk
                size = rng.uniform((0.6, 0.6, 0.7), (1.6, 1.4, 2.4))
                build.box(
                    np.array([*at, size[2] / 2]) + out * 5.2, size, heading, rng.choice(bodies, 6)
                )
            else:
                build.box(
                    np.array([*at, 2.5]) + out * 4.9, (0.18, 0.18, 5), heading,
                    rng.choice(bodies, 6),
                )
            s += rng.uniform(3.5, 8)
    return build.scene()


class Road:
    """A winding centre line in the plane z = 0, by its arc length in metres."""

    def __init__(self, rng: np.random.Generator, length: float) -> None:
        self.length = length
        self._s = np.arange(-40.0, length + 40.0, 0.1)
        phase = rng.uniform(0, 2 * np.pi, 2)
        self._heading = 0.22 * np.sin(2 * np.pi * self._s / 55 + phase[0])
        self._heading += 0.10 * np.sin(2 * np.pi * self._s / 23 + phase[1])
        self._xy = 0.1 * np.cumsum(np.stack((np.cos(self._heading), np.sin(self._heading)), 1), 0)

    def at(self, s: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Point (..., 2) and heading (...), radians, at arc length s (...)."""
        xy = np.stack([np.interp(s, self._s, self._xy[:, k]) for k in range(2)], -1)
        return xy, np.interp(s, self._s, self._heading)

    def distance(self, xy: np.ndarray) -> float:
        """Metres from a point (2,) to the centre line."""
        return float(np.linalg.norm(self._xy - xy, axis=1).min())


def handheld(rng: np.random.Generator) -> Motion:
    """
    Return a hand-held path through the free middle of `room`.

    It strolls, looks about, and trembles a little.
    """
    travel = [_wander(rng, size, (0.055, 0.19, 1.1, 2.6)) for size in (
        (1.0, 0.2, 0.004, 0.001), (0.8, 0.2, 0.004, 0.001), (0.2, 0.07, 0.005, 0.001)
    )]  # fmt: skip
    turn = [_wander(rng, size, (0.035, 0.17, 1.3, 3.1)) for size in (
        (0.7, 0.08, 0.003, 0.0008), (0.12, 0.04, 0.003, 0.0008), (0.06, 0.03, 0.003, 0.0008)
    )]  # fmt: skip
    facing = rng.uniform(0, 2 * np.pi)

    def path(t: np.ndarray) -> np.ndarray:
        at = np.stack([move(t) for move in travel], -1) + (0, 0, 1.45)
        yaw, pitch, roll = (move(t) for move in turn)
        return _poses(at, facing + yaw, pitch - 0.08, roll)

    return path


def driving(rng: np.random.Generator, road: Road, speed: float) -> Motion:
    """
    Return a car's path along `road` at `speed` m/s.

    It follows the bends, sways in its lane and rocks on its springs.
    """
    sway = _wander(rng, (0.5, 0.1), (0.11, 0.3))
    rock = [
        _wander(rng, size, (0.6, 1.7)) for size in ((0.015, 0.004), (0.006, 0.003), (0.006, 0.003))
    ]

    def path(t: np.ndarray) -> np.ndarray:
        s = speed * t
        xy, heading = road.at(s)
        # The lane's offset turns the car too: heading changes by its slope.
        slope = (sway(t + 0.05) - sway(t - 0.05)) / (0.1 * speed)
        left = np.stack((-np.sin(heading), np.cos(heading)), -1)
        lift, pitch, roll = (move(t) for move in rock)
        at = np.concatenate((xy + left * sway(t)[..., None], (1.5 + lift)[..., None]), -1)
        return _poses(at, heading + slope, pitch - 0.02, roll)

    return path


def render_recording(
    out_dir: Path | str,
    *,
    seed: int = 0,
    frames: int = 150,
    size: tuple[int, int] = (640, 480),
    path: str = 'handheld',
    surfaces: str = 'mixed',
    rate_hz: float = 20.0,
    sensor: Sensor | None = None,
    depth_every: int = 1,
    camera: Camera | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """
    Render a recording with exact ground truth into the new folder `out_dir` and return its path.

    The folder holds `bag/` (rosbag2, MCAP: /camera/image_raw mono8, /camera/camera_info,
    /ground_truth/pose), `groundtruth.txt` (TUM: T_world_camera at mid-exposure, the image's
    stamp), `intrinsics.txt` and, for every `depth_every`-th frame, `depth/<stamp in ns>.npz`
    (array `depth`, float32, metres along the optical axis).

    Of the arguments,
        seed: scene, path and noise all follow from it (and from the other arguments).
        size: width and height in pixels, where no `camera` is given; the focal length is then
            0.8 times the width.
        path: "handheld" (a furnished room) or "driving" (a winding street).
        surfaces: of the room: "mixed", "plain" or "repetitive" (`room`).
        sensor: noise, blur and exposure; `Sensor()` where None, see also `Sensor.low_light`.
        progress: called with (frames done, frames) after each frame.

    The folder appears whole or not at all. Raises ValueError for an unknown path, fewer than two
    frames or rates and steps that are not positive, FileExistsError where out_dir exists already.
    """
    out_dir = Path(out_dir)
    if path not in ('handheld', 'driving'):
        raise ValueError(f"a synthetic recording's path is 'handheld' or 'driving', not '{path}'")
    if surfaces not in ('mixed', 'plain', 'repetitive'):
        raise ValueError(
            f"a room's surfaces are 'mixed', 'plain' or 'repetitive', not '{surfaces}'"
        )
    if frames < 2 or not rate_hz > 0 or depth_every < 1:
        raise ValueError(
            'a synthetic recording needs two frames or more, a positive rate and depth_every '
            'from 1'
        )
    if out_dir.exists():
        raise FileExistsError(f'{out_dir} exists already; remove it or choose another folder')
    sensor = sensor or Sensor()
    width, height = (camera.width, camera.height) if camera else size
    camera = camera or Camera(
        width, height, 0.8 * width, 0.8 * width, (width - 1) / 2, (height - 1) / 2
    )

    scene, path_at = make_scene(path, seed, camera, frames / rate_hz, surfaces)
    rng = np.random.default_rng([seed, 2])
    exposure = [_wander(rng, (0.7, 0.35), (0.13, 0.41)) for _ in range(2)]
    pattern = sensor.pattern((width, height), np.random.default_rng([seed, 3]))
    times = np.arange(frames) / rate_hz
    stamps = START_NS + np.rint(times * 1e9).astype(np.int64)
    poses = torch.from_numpy(path_at(times))
    shutter = sensor.exposure_s * ((np.arange(len(SAMPLES)) + 0.5) / len(SAMPLES) - 0.5)

    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f'.{out_dir.name}-', dir=out_dir.parent))
    try:
        (partial / 'depth').mkdir()
        with _Bag(partial / 'bag', camera) as bag:
            for k, stamp in enumerate(stamps.tolist()):
                light = scene.image(torch.from_numpy(path_at(times[k] + shutter)), camera)
                wander = np.array([move(times[k]) for move in exposure])
                bag.write(stamp, sensor.expose(light, wander, rng, pattern), poses[k])
                if k % depth_every == 0:
                    np.savez(
                        partial / 'depth' / f'{stamp}.npz', depth=scene.depth(poses[k], camera)
                    )
                if progress:
                    progress(k + 1, frames)
        truth = partial / 'groundtruth.txt'
        write_tum(truth, stamps.tolist(), poses.tolist(), of='camera_optical in world')
        K = [[camera.fx, 0, camera.cx], [0, camera.fy, camera.cy], [0, 0, 1]]
        np.savetxt(
            partial / 'intrinsics.txt',
            K,
            header=f'pinhole K, pixel centres at integers; {width} x {height}',
        )
        partial.chmod(0o755)  # mkdtemp's folder is the owner's alone
        partial.rename(out_dir)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out_dir


def make_scene(
    path: str, seed: int, camera: Camera, seconds: float, surfaces: str = 'mixed'
) -> tuple[Scene, Motion]:
    """
    Return the scene and the camera path of `render_recording`.

    With the same path, seed, camera and surfaces.
    """
    build, move = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    if path == 'handheld':
        # Finer texture than this costs more memory than a large picture's sharpness is worth.
        return room(build, min(camera.focal, 800) / 1.5, surfaces), handheld(move)
    speed = 4.5
    road = Road(move, speed * seconds + 70)
    return street(build, road), driving(move, road, speed)


class _Builder:
    """Collects quads and textures into a Scene."""

    def __init__(self, rng: np.random.Generator, texels_per_m: float = 0.0) -> None:
        self.rng, self.texels_per_m = rng, texels_per_m
        self.quads, self.texture, self.shade, self.images = [], [], [], []

    def pool(self, kinds, count: int, texels: tuple[int, int]) -> list[int]:
        """
        Return indices of `count` new textures of (height, width) texels.

        Their kinds in turn.
        """
        first = len(self.images)
        self.images += [kinds[k % len(kinds)](self.rng, *texels) for k in range(count)]
        return list(range(first, first + count))

    def quad(self, origin, right, down, texture: int, shade: float) -> None:
        self.quads.append(np.array([origin, right, down], np.float64))
        self.texture.append(texture)
        self.shade.append(shade)

    def box(
        self, centre, size, yaw: float, faces, kinds=None, inside: bool = False, texels=None
    ) -> None:
        """
        Add a box turned by yaw about z, seen from outside or inside.

        Faces -x +x -y +y -z +z carry the pool's textures `faces`, or, where `kinds` is given, new
        ones of these kinds.
        """
        up = np.array([0.0, 0.0, 1.0])
        ahead, aside = _planar(yaw), _planar(yaw + np.pi / 2)
        normals = (-ahead, ahead, -aside, aside, -up, up)
        for face, (normal, kind) in enumerate(zip(normals, faces, strict=True)):
            down = -up if face < 4 else aside * (1 if face == 4 else -1)
            right = np.cross(up, normal) if face < 4 else ahead
            across = (size[1], size[1], size[0], size[0], size[0], size[0])[face]
            along = (size[2], size[2], size[2], size[2], size[1], size[1])[face]
            right, down = right * across * (-1 if inside else 1), down * along
            origin = np.asarray(centre) + normal * size[face // 2] / 2 - right / 2 - down / 2
            if kinds is not None:
                shape = texels or [
                    max(64, 64 * round(edge * self.texels_per_m / 64)) for edge in (along, across)
                ]
                (kind,) = self.pool((kinds[kind],), 1, shape)
            # one fixed light: faces of a box differ
            light = (0.90, 1.05, 0.97, 1.12, 0.85, 1.1)[face]
            self.quad(origin, right, down, int(kind), 1.0 if texels else light)

    def scene(self) -> Scene:
        return Scene(
            np.stack(self.quads), np.array(self.texture), np.array(self.shade), self.images
        )


class _Bag:
    """The recording's bag: images, camera info and true poses under one stamp."""

    def __init__(self, folder: Path, camera: Camera) -> None:
        self.camera = camera
        self.store = get_typestore(Stores.ROS2_HUMBLE)
        self.writer = Writer(folder, version=9, storage_plugin=StoragePlugin.MCAP)

    def __enter__(self) -> _Bag:
        self.writer.open()
        self.topics = [
            self.writer.add_connection(topic, msgtype, typestore=self.store)
            for topic, msgtype in (
                ('/camera/camera_info', 'sensor_msgs/msg/CameraInfo'),
                ('/camera/image_raw', 'sensor_msgs/msg/Image'),
                ('/ground_truth/pose', 'geometry_msgs/msg/PoseStamped'),
            )
        ]
        return self

    def __exit__(self, *error) -> None:
        self.writer.close()

    def write(self, stamp: int, image: np.ndarray, pose: Tensor) -> None:
        types, camera = self.store.types, self.camera
        time = types['builtin_interfaces/msg/Time'](stamp // 10**9, stamp % 10**9)
        header = types['std_msgs/msg/Header'](time, 'camera_optical_frame')
        f, c = (camera.fx, camera.fy), (camera.cx, camera.cy)
        info = types['sensor_msgs/msg/CameraInfo'](
            header=header, height=camera.height, width=camera.width,
            distortion_model='plumb_bob' if camera.distortion_model == 'none'
            else camera.distortion_model,
            d=np.array(camera.distortion or (0.0,) * 5),
            k=np.array([f[0], 0, c[0], 0, f[1], c[1], 0, 0, 1.0]), r=np.eye(3).ravel(),
            p=np.array([f[0], 0, c[0], 0, 0, f[1], c[1], 0, 0, 0, 1.0, 0]), binning_x=0,
            binning_y=0,
            roi=types['sensor_msgs/msg/RegionOfInterest'](0, 0, 0, 0, False),
        )  # fmt: skip
        picture = types['sensor_msgs/msg/Image'](
            header, camera.height, camera.width, 'mono8', 0, camera.width, image.ravel()
        )
        x, y, z, qx, qy, qz, qw = pose.tolist()
        truth = types['geometry_msgs/msg/PoseStamped'](
            types['std_msgs/msg/Header'](time, 'world'),
            types['geometry_msgs/msg/Pose'](
                types['geometry_msgs/msg/Point'](x, y, z),
                types['geometry_msgs/msg/Quaternion'](qx, qy, qz, qw),
            ),
        )
        for topic, message in zip(self.topics, (info, picture, truth), strict=True):
            self.writer.write(topic, stamp, self.store.serialize_cdr(message, topic.msgtype))


def _wander(rng: np.random.Generator, sizes, frequencies_hz) -> Callable[[np.ndarray], np.ndarray]:
    """
    Return a smooth random function of time.

    Sines of about the given amplitudes and frequencies.
    """
    sizes = np.array(sizes) * rng.uniform(0.8, 1.2, len(sizes))
    rates = 2 * np.pi * np.array(frequencies_hz) * rng.uniform(0.8, 1.2, len(sizes))
    phases = rng.uniform(0, 2 * np.pi, len(sizes))
    return lambda t: (sizes * np.sin(rates * np.asarray(t)[..., None] + phases)).sum(-1)


def _planar(angle: float) -> np.ndarray:
    return np.array([np.cos(angle), np.sin(angle), 0.0])


def _poses(at: np.ndarray, yaw: np.ndarray, pitch: np.ndarray, roll: np.ndarray) -> np.ndarray:
    """
    Return T_world_camera (N, 7) of cameras at (N, 3).

    They look along yaw about z, pitched up, rolled clockwise.
    """
    out = np.empty((*at.shape[:-1], 7))
    out[..., :3] = at
    # Optical axes of yaw 0: z forward is x of the world, x right is -y, y down is -z.
    level = np.array([-0.5, 0.5, -0.5, 0.5])
    spin = _multiply(_about(2, yaw), level)
    out[..., 3:] = _multiply(spin, _multiply(_about(0, pitch), _about(2, roll)))
    return out


def _about(axis: int, angle: np.ndarray) -> np.ndarray:
    q = np.zeros((*np.shape(angle), 4))
    q[..., axis], q[..., 3] = np.sin(np.asarray(angle) / 2), np.cos(np.asarray(angle) / 2)
    return q


def _multiply(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Hamilton product of quaternions x y z w."""
    vector = p[..., 3:] * q[..., :3] + q[..., 3:] * p[..., :3] + np.cross(p[..., :3], q[..., :3])
    scalar = p[..., 3:] * q[..., 3:] - (p[..., :3] * q[..., :3]).sum(-1, keepdims=True)
    return np.concatenate((vector, scalar), -1)


def _inverse(nearest: np.ndarray) -> np.ndarray:
    return np.divide(1, nearest, out=np.zeros_like(nearest), where=nearest > 0)


@lru_cache(maxsize=16)
def _rays(camera: Camera, offset: tuple[float, float], dtype: type) -> tuple[np.ndarray, ...]:
    """
    Rays (x, y, 1) through the pixels' points.

    X (H, W), y (H, W), and x's range by column, y's by row.
    """
    v, u = torch.meshgrid(
        torch.arange(camera.height, dtype=torch.float64),
        torch.arange(camera.width, dtype=torch.float64), indexing='ij',
    )
    x, y = (
        camera.normalise(torch.stack((u + offset[0], v + offset[1]), -1))
        .numpy()
        .transpose(2, 0, 1)
        .astype(dtype)
    )
    x, y = np.ascontiguousarray(x), np.ascontiguousarray(y)
    return x, y, (x.min(0), x.max(0)), (y.min(1), y.max(1))


def _visible(
    local: np.ndarray, front: np.ndarray, columns, rows
) -> Iterator[tuple[int, tuple[slice, slice]]]:
    """
    Return the quads (camera frame) that the image may show.

    Each with the rows and columns of pixels that may see it.
    """
    corners = local[:, :1] + np.einsum(
        'ck,qki->qci', [[0, 0], [1, 0], [1, 1], [0, 1]], local[:, 1:]
    )
    z = corners[..., 2]
    xy = corners[..., :2] / np.maximum(z, NEAR)[..., None]
    low, high = xy.min(1), xy.max(1)
    cut = (z < NEAR).any(1)
    (left, right), (top, bottom) = columns, rows
    outside = (high < (left.min(), top.min())).any(1) | (low > (right.max(), bottom.max())).any(1)
    for q in np.flatnonzero(front & (z >= NEAR).any(1) & (cut | ~outside)):
        if cut[q]:  # cut away what is behind the camera
            here, there = corners[q], np.roll(corners[q], -1, 0)
            crossing = (here[:, 2] < NEAR) != (there[:, 2] < NEAR)
            a, b = here[crossing], there[crossing]
            kept = np.concatenate(
                (here[here[:, 2] >= NEAR], a + (b - a) * ((NEAR - a[:, 2:]) / (b - a)[:, 2:]))
            )
            kept = kept[:, :2] / kept[:, 2:]
            low[q], high[q] = kept.min(0), kept.max(0)
        across = np.flatnonzero((right >= low[q, 0]) & (left <= high[q, 0]))
        along = np.flatnonzero((bottom >= low[q, 1]) & (top <= high[q, 1]))
        if len(across) and len(along):
            yield q, (slice(along[0], along[-1] + 1), slice(across[0], across[-1] + 1))


def _pack(images: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """
    One picture of all images' pyramids and the place (N, 4) of each level 0: x, y, width, height.

    Level l lies to the right of level l - 1 and is half as large; shelves of pyramids are stacked.
    """
    step = 2 ** (LEVELS - 1)
    images = [
        cv2.copyMakeBorder(i, 0, -i.shape[0] % step, 0, -i.shape[1] % step, cv2.BORDER_REFLECT)
        for i in images
    ]
    spans = [2 * i.shape[1] + 2 * PAD * LEVELS for i in images]
    limit = max(8192, *spans)
    place = np.zeros((len(images), 4))
    x = y = shelf = 0
    for k in sorted(range(len(images)), key=lambda k: -images[k].shape[0]):
        if x + spans[k] > limit:
            x, y = 0, y + shelf
        if x == 0:
            shelf = images[k].shape[0] + 2 * PAD
        place[k] = x + PAD, y + PAD, images[k].shape[1], images[k].shape[0]
        x += spans[k]
    atlas = np.zeros((y + shelf, limit), np.uint8)
    if max(atlas.shape) >= 2**15:
        raise ValueError(
            "the scene's textures are too large; render smaller images or a shorter recording"
        )
    for image, (left, top, *_) in zip(images, place.astype(int), strict=True):
        for level in range(LEVELS):
            if level:
                image = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
            padded = cv2.copyMakeBorder(image, PAD, PAD, PAD, PAD, cv2.BORDER_REPLICATE)
            height, width = padded.shape
            atlas[top - PAD:top - PAD + height, left - PAD:left - PAD + width] = padded
            left += image.shape[1] + 2 * PAD
    return atlas, place
