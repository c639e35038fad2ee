"""
Grey textures made by the program: the wallpaper of the synthetic scenes.

Every function takes a random generator and a size in pixels and returns an (H, W) uint8 array. All
carry structure at several scales, down to the single texel, so that a near view is not blurry;
some are weak on purpose, for a matcher must also meet plain walls.
"""

from __future__ import annotations

import cv2
import numpy as np

GLYPHS = np.array(list('ABCDEFGHKLMNPRSTUVXYZabdefghkmnprst0123456789&%#?+'))


def fractal(
    rng: np.random.Generator, height: int, width: int, coarse: float, gain: float = 0.6
) -> np.ndarray:
    """
    Return noise (H, W) float32 of zero mean and unit deviation.

    It has octaves from ``coarse`` texels down to one, each ``gain`` times as strong as the last.
    """
    total = np.zeros((height, width), np.float32)
    weight, cell = 1.0, float(coarse)
    while cell >= 1.0:
        grid = rng.standard_normal(
            (int(height / cell) + 3, int(width / cell) + 3), dtype=np.float32
        )
        total += weight * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
        weight, cell = weight * gain, cell / 2.1
    return (total - total.mean()) / total.std()


def plaster(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return a weak texture: a gradient, faint stains, fine grain."""
    ramp = (
        np.linspace(-1, 1, width)[None] * rng.uniform(-25, 25)
        + np.linspace(-1, 1, height)[:, None] * 12
    )
    return _grey(rng.uniform(120, 190) + ramp + 6 * fractal(rng, height, width, width / 5, 0.75))


def stains(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return stone, concrete or a worn floor: noise of many octaves with scratches."""
    out = _grey(
        rng.uniform(115, 175) + 28 * fractal(rng, height, width, min(height, width) / 6, 0.8)
    )
    for _ in range(60):
        start = rng.uniform(0, (width, height))
        steps = rng.normal(0, min(height, width) / 25, (6, 2)).cumsum(0)
        cv2.polylines(
            out, [(start + steps).astype(np.int32)], False, rng.uniform(20, 230), 1, cv2.LINE_AA
        )
    return out


def bricks(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """
    Return bricks or tiles, cells of their own grey with joints and grain.

    Odd rows are shifted by half a cell, or not.
    """
    rows = int(rng.integers(8, 18))
    cell_h = height / rows
    cell_w = cell_h * rng.uniform(1.0, 2.6)
    shift = 0.5 * rng.integers(0, 2)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    row = np.floor(y / cell_h)
    column = x / cell_w + shift * (row % 2)
    grey = rng.uniform(70, 200, (rows + 1, int(width / cell_w) + 3)).astype(np.float32)
    out = grey[row.astype(int), column.astype(int)]
    edge = np.minimum(cell_h * (y / cell_h - row), cell_w * (column % 1))
    out = np.where(edge < max(2.0, 0.06 * cell_h), rng.uniform(30, 225), out)
    return _grey(out + 14 * fractal(rng, height, width, cell_h, 0.75))


def boards(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return wooden boards: noise stretched along the grain, each board of its own tone."""
    grain = cv2.resize(
        fractal(rng, height, max(8, width // 12), height / 20, 0.8), (width, height)
    )
    count = int(rng.integers(4, 9))
    board = np.arange(height) * count // height
    tone = rng.uniform(70, 170, count)[board][:, None]
    out = tone + 22 * grain + 6 * fractal(rng, height, width, 4)
    out[np.diff(board, prepend=0) > 0] = 25
    return _grey(out)


def shapes(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return overlapping discs, boxes and polygons of all sizes over noise."""
    out = _grey(rng.uniform(90, 180) + 12 * fractal(rng, height, width, width / 6, 0.75))
    for size in min(height, width) * np.geomspace(0.22, 0.015, 90):
        x, y = rng.uniform(0, (width, height)).astype(int).tolist()
        grey = rng.uniform(15, 240)
        kind = rng.integers(3)
        if kind == 0:
            axes = (
                max(1, int(size * rng.uniform(0.3, 1))),
                max(1, int(size * rng.uniform(0.3, 1))),
            )
            cv2.ellipse(out, (x, y), axes, rng.uniform(0, 180), 0, 360, grey, -1, cv2.LINE_AA)
        else:
            corners = np.array([x, y]) + rng.normal(0, size, (3 + kind, 2))
            cv2.fillPoly(out, [cv2.convexHull(corners.astype(np.int32))], grey, cv2.LINE_AA)
    return _grain(rng, out, 5)


def poster(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return print: blocks of text-like glyphs in several sizes, bars, a picture."""
    paper = rng.uniform(150, 225) if rng.random() < 0.7 else rng.uniform(30, 80)
    out = _grey(paper + 5 * fractal(rng, height, width, width / 4))
    ink = 25.0 if paper > 120 else 225.0
    unit = min(height, width)
    y = 0.0
    while y < height:
        size = unit * rng.choice([0.03, 0.045, 0.07, 0.12])
        y += 1.6 * size
        if rng.random() < 0.15:
            cv2.rectangle(
                out, (0, int(y)), (int(width * rng.uniform(0.3, 1)), int(y + size)),
                rng.uniform(20, 230), -1,
            )
            continue
        text = ''.join(rng.choice(GLYPHS, int(width / size * 1.4)))
        x = int(rng.uniform(0, 0.2) * width)
        thick = max(1, int(size / 9))
        cv2.putText(
            out, text, (x, int(y)), cv2.FONT_HERSHEY_SIMPLEX, size / 22, ink, thick, cv2.LINE_AA
        )
    for _ in range(2):
        h, w = int(height * rng.uniform(0.2, 0.35)), int(width * rng.uniform(0.2, 0.35))
        top, left = int(rng.uniform(0, height - h)), int(rng.uniform(0, width - w))
        out[top:top + h, left:left + w] = shapes(rng, h, w)
    return _grain(rng, out, 4)


def facade(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """
    Return the front of a house, of brick or plaster.

    It has storeys, windows with frames and reflections, and a shop sign.
    """
    out = (bricks if rng.random() < 0.5 else stains)(rng, height, width)
    out = _grey(0.5 * out + rng.uniform(50, 120))
    storeys, columns = int(rng.integers(2, 5)), int(rng.integers(3, 8))
    step_y, step_x = height / storeys, width / columns
    tall, wide = step_y * rng.uniform(0.45, 0.65), step_x * rng.uniform(0.35, 0.65)
    frame = rng.uniform(10, 240)
    for storey in range(storeys):
        cv2.line(
            out, (0, int(storey * step_y)), (width, int(storey * step_y)), frame,
            max(1, int(step_y / 40)),
        )
        for column in range(columns):
            h, w = int(tall), int(wide)
            top, left = int((storey + 0.25) * step_y), int((column + 0.5) * step_x - wide / 2)
            pane = _grey(rng.uniform(15, 110) + 14 * fractal(rng, h, w, w / 2))
            out[top:top + h, left:left + w] = pane[:height - top]
            cv2.rectangle(out, (left, top), (left + w, top + h), frame, max(1, int(step_x / 40)))
            cv2.line(
                out, (left + w // 2, top), (left + w // 2, top + h), frame,
                max(1, int(step_x / 60)),
            )
            if rng.random() < 0.5:
                cv2.line(
                    out, (left, top + h // 3), (left + w, top + h // 3), frame,
                    max(1, int(step_x / 60)),
                )
    sign_h = int(step_y * 0.2)
    top = int((storeys - 1) * step_y)
    left, right = sorted(rng.uniform(0, width, 2).astype(int))
    if right - left > sign_h:
        out[top:top + sign_h, left:right] = cv2.resize(
            poster(rng, 8 * sign_h, 8 * sign_h), (right - left, sign_h)
        )
    return _grain(rng, out, 6)


def clouds(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return a bright sky, brighter at the horizon, with soft clouds."""
    ramp = np.linspace(170, 215, height)[:, None]
    return _grey(ramp + 13 * fractal(rng, height, width, width / 5, 0.45))


def _grey(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 8, 247).astype(np.uint8)


def _grain(rng: np.random.Generator, image: np.ndarray, deviation: float) -> np.ndarray:
    return _grey(image + deviation * fractal(rng, *image.shape, 16, 0.8))
