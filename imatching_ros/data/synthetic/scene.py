"""
Textured parallelograms in space, and what a camera sees of them.

A pixel's ray meets each of their planes in closed form, so depth is exact and needs no GL; the
nearest one wins. World frame: z up, metres. Camera frame: optical.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import cv2
import numpy as np
import torch
from torch import Tensor

from ...geometry import lie
from ...geometry.camera import Camera

LEVELS = 7  #: of a texture's pyramid; sizes are multiples of 2^(LEVELS - 1)
PAD = 2  #: texels repeated around each level, so that interpolation never reads its neighbour
NEAR = 0.02  #: metres; nothing nearer is drawn
#: Where a pixel is sampled (pixels from its centre): four rooks, none sharing a row or a column.
SAMPLES = ((-0.375, -0.125), (0.125, -0.375), (-0.125, 0.375), (0.375, 0.125))


class Scene:
    """
    Textured parallelograms: points ``origin + s * right + t * down`` for s, t in [0, 1].

    Each is seen from the side where ``right`` points right and ``down`` points down; from behind
    it is not there.
    """

    def __init__(
        self, quads: np.ndarray, texture: np.ndarray, shade: np.ndarray, images: list[np.ndarray]
    ) -> None:
        """
        Take the surfaces and the images on them.

        quads: (Q, 3, 3) float64, rows origin, right and down, world, metres. texture: (Q,) index
        of each one's image (H, W) uint8. shade: (Q,) factor on its brightness.
        """
        self.quads = quads
        self.atlas, place = _pack(images)  # one picture of all pyramids: a frame is two look-ups
        self.place = place[texture]  # (Q, 4): x, y, width, height of level 0
        self.shade = shade.astype(np.float32)

    def render(self, T_world_camera: Tensor, camera: Camera) -> tuple[np.ndarray, np.ndarray]:
        """
        Return what a camera at rest at T_world_camera (7,) sees.

        That is its irradiance (H, W) float32 in [0, 1] and its depth (H, W) float32: exact, of
        the pixels' centres along the optical axis, metres, 0 where nothing is seen.
        """
        at_rest = T_world_camera.expand(len(SAMPLES), 7)
        return self.image(at_rest, camera), self.depth(T_world_camera, camera)

    def image(self, T_world_camera: Tensor, camera: Camera) -> np.ndarray:
        """
        Return the irradiance (H, W) float32 in [0, 1], averaged over the time of exposure.

        T_world_camera (4, 7) are the camera's poses in that time. They share out the four samples
        of every pixel, so that motion blur costs nothing.
        """
        total = np.zeros((camera.height, camera.width), np.float32)
        for pose, offset in zip(T_world_camera, SAMPLES, strict=True):
            total += self._sample(pose, camera, offset)
        return total / np.float32(255 * len(SAMPLES))

    def depth(self, T_world_camera: Tensor, camera: Camera) -> np.ndarray:
        """
        Return the depth (H, W) float32 that is seen from T_world_camera (7,).

        It is that of the pixels' centres along the optical axis, metres, 0 where nothing is seen.
        """
        rays = _rays(camera, (0.0, 0.0), np.float64)
        return _inverse(self._cast(T_world_camera, rays)[1]).astype(np.float32)

    def _cast(
        self, pose: Tensor, rays: tuple[np.ndarray, ...]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        Return which quad is nearest along each ray.

        That is its index (H, W), -1 where there is none, 1 / depth (H, W), and the linear forms
        (Q, 3, 3) of all quads. With the camera frame's o + s r + t d = z (x, y, 1), the rows of
        the inverse of [r d o] times (x, y, 1) are s / z, t / z and 1 / z: all three are linear in
        the ray.
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
        Return grey values (H, W) float32 in [0, 255] along the rays through a point of each pixel.

        The point lies by ``offset``, px, from the pixel's centre.
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


def _inverse(nearest: np.ndarray) -> np.ndarray:
    return np.divide(1, nearest, out=np.zeros_like(nearest), where=nearest > 0)


@lru_cache(maxsize=16)
def _rays(camera: Camera, offset: tuple[float, float], dtype: type) -> tuple[np.ndarray, ...]:
    """
    Return the rays (x, y, 1) through a point of each pixel, by ``offset`` px from its centre.

    They are x (H, W), y (H, W), the least and the greatest x of each column (W,), and those of y
    of each row (H,).
    """
    v, u = torch.meshgrid(
        torch.arange(camera.height, dtype=torch.float64),
        torch.arange(camera.width, dtype=torch.float64), indexing='ij',
    )
    xy = camera.normalise(torch.stack((u + offset[0], v + offset[1]), -1)).numpy().astype(dtype)
    x, y = (np.ascontiguousarray(xy[..., k]) for k in range(2))
    return x, y, (x.min(0), x.max(0)), (y.min(1), y.max(1))


def _visible(
    local: np.ndarray, front: np.ndarray, columns, rows
) -> Iterator[tuple[int, tuple[slice, slice]]]:
    """
    Yield the quads (in the camera's frame) that the image may show.

    With each come the rows and columns of the pixels that may see it.
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
    Return one picture of all images' pyramids, and where (N, 4) each one's level 0 lies in it.

    A place is x, y, width and height, px. Level l lies to the right of level l - 1 and is half as
    large; shelves of pyramids are stacked.
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
