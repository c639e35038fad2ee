"""Where a recording is made: a furnished room, or a winding street."""

from __future__ import annotations

import numpy as np

from . import textures
from .motion import Road
from .scene import Scene


def room(rng: np.random.Generator, texels_per_m: float, surfaces: str = 'mixed') -> Scene:
    """
    Return a furnished room, 7 x 6 x 3 m about the origin of x and y.

    Its middle, 3 x 2.4 m, is left free for the camera. ``surfaces`` are "mixed", "plain" (weak
    textures and no pictures on the walls) or "repetitive" (bricks and boards alone).
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
        places = np.arange(-wide / 2 + 0.2, wide / 2 - 1.4, 1.25)
        for left in places if surfaces != 'plain' else ():
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
    Return a winding street along ``road``.

    It has ground, houses on both sides, parked cars, posts, far hills and a sky.
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


class _Builder:
    """Collects quads and textures into a Scene."""

    def __init__(self, rng: np.random.Generator, texels_per_m: float = 0.0) -> None:
        self.rng, self.texels_per_m = rng, texels_per_m
        self.quads, self.texture, self.shade, self.images = [], [], [], []

    def pool(self, kinds, count: int, texels: tuple[int, int]) -> list[int]:
        """Return indices of ``count`` new textures, (height, width) texels, kinds in turn."""
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
        Add a box that is turned by yaw, radians, about z, and seen from outside or inside.

        Its faces -x +x -y +y -z +z carry the pool's textures ``faces``, or, where ``kinds`` is
        given, new ones of these kinds.
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


def _planar(angle: float) -> np.ndarray:
    return np.array([np.cos(angle), np.sin(angle), 0.0])
