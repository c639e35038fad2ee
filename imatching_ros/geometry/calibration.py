"""What a calibration says: lens models by all their names, and intrinsics that cannot be."""

from __future__ import annotations

from collections.abc import Sequence
import math

#: Distortion models of sensor_msgs/CameraInfo and the number of coefficients each accepts.
DISTORTION_MODELS = {
    'none': (0,), 'plumb_bob': (4, 5), 'rational_polynomial': (8, 12, 14), 'equidistant': (4,),
}
#: What drivers and calibration programs call them; '' and 'none' leave it to the coefficients.
NAMES = {
    '': 'plumb_bob', 'none': 'plumb_bob',
    'plumb_bob': 'plumb_bob', 'plumbbob': 'plumb_bob', 'brown': 'plumb_bob',
    'brown_conrady': 'plumb_bob', 'radtan': 'plumb_bob', 'radial_tangential': 'plumb_bob',
    'rational_polynomial': 'rational_polynomial', 'rational': 'rational_polynomial',
    'equidistant': 'equidistant', 'equi': 'equidistant', 'fisheye': 'equidistant',
    'kannala_brandt': 'equidistant', 'kannala_brandt4': 'equidistant',
}
#: A focal length below this share of the image's size is none: beyond 173 degrees on a flat image
#: plane, beyond 5 radians from the axis of a fisheye.
SHORTEST = {'equidistant': 0.1}
SHORTEST_FLAT = 0.03
RATIO = 4.0  #: of fx and fy; beyond, one of them is wrong
EDGE = 0.01  #: share of the image's size: a principal point nearer to the edge was never filled in
#: Where the principal point lies at such a share of width and height alike, the calibration is for
#: an image of another size: a quarter, for one of half the size.
OTHER_SIZE = 0.28
ALIKE = 0.03


def lens(model: str, coefficients: Sequence[float]) -> tuple[str, tuple[float, ...]]:
    """
    Return the distortion model and the coefficients that a calibration means.

    Models are known by their usual names, in small letters or large. OpenCV's models are told
    apart by the number of coefficients, as OpenCV tells them, where they have more than the name
    allows; zeros at the end count for nothing, and all-zero coefficients are no distortion, by
    whatever name. Raises ValueError, one sentence, for models that are not known.
    """
    D = [float(value) for value in coefficients]
    for k, value in enumerate(D, 1):
        if not math.isfinite(value):
            raise ValueError(
                f'distortion coefficient {k} is {value:g}; all must be finite: calibrate the '
                'camera again'
            )
    while D and D[-1] == 0.0:
        D.pop()
    if not D:
        return 'none', ()
    name = NAMES.get(plain(model))
    if name is None:
        raise ValueError(
            f"distortion model '{model}' is not known; use one of {', '.join(DISTORTION_MODELS)}, "
            'or rectify the images'
        )
    if name == 'plumb_bob' and len(D) > max(DISTORTION_MODELS[name]):
        name = 'rational_polynomial'
    counts = [count for count in DISTORTION_MODELS[name] if count >= len(D)]
    if not counts:
        raise ValueError(
            f"distortion model '{model}' takes {max(DISTORTION_MODELS[name])} coefficients at "
            f'most, {len(D)} were given'
        )
    # as many as were given, where that is a number that the model has
    count = len(coefficients) if len(coefficients) in counts else counts[0]
    return name, (*D, *[0.0] * (count - len(D)))


def plain(model: str) -> str:
    """Return the model's name in small letters, its words joined by underscores."""
    return '_'.join(model.lower().replace('-', ' ').replace('_', ' ').split())


def focal_lengths(fx: float, fy: float) -> None:
    """Raise ValueError, one sentence, where one of them is no length."""
    for name, value in (('fx', fx), ('fy', fy)):
        if not 0.0 < value < math.inf:
            raise ValueError(
                f'the camera is not calibrated: {name} is {value:g}, it must be a positive '
                'number of pixels; calibrate the camera and publish its camera_info'
            )


def intrinsics(
    matrix: Sequence[float], width: int, height: int, model: str, name: str = 'K'
) -> tuple[float, float, float, float]:
    """
    Return ``fx fy cx cy``, px, of a row-major 3x3 matrix for an image of this size.

    Raises ValueError, one sentence with the number that cannot be, where no camera has these
    intrinsics. ``model`` is the lens's, ``name`` what the matrix is called in that sentence.
    """
    fx, skew, cx, zero, fy, cy, left, below, one = (float(value) for value in matrix)
    focal_lengths(fx, fy)
    for place, value in enumerate(matrix):
        if not math.isfinite(value):
            raise ValueError(
                f'the camera is not calibrated: {name}[{place}] is {value:g}; all numbers must '
                'be finite'
            )
    if cx <= 1.0 and cy <= 1.0 and cx > 0.0 < cy and max(fx, fy) < 10.0 < min(width, height):
        raise ValueError(
            f'{name} is normalised: fx is {fx:g} and cx {cx:g} where pixels are expected; '
            f'multiply fx and cx by {width}, fy and cy by {height}'
        )
    shortest = SHORTEST.get(model, SHORTEST_FLAT)
    for axis, value, size in (('fx', fx, width), ('fy', fy, height)):
        if value < shortest * size:
            raise ValueError(
                f'{name} cannot be: {axis} is {value:g} px for an image of {width}x{height}, '
                'shorter than any lens; calibrate the camera again'
            )
    if not 1 / RATIO < fx / fy < RATIO:
        raise ValueError(
            f'{name} cannot be: fx is {fx:g} and fy {fy:g}, but pixels are nearly square; '
            'calibrate the camera again'
        )
    if cx == cy == 0.0 and (left or below):
        raise ValueError(
            f'{name} is transposed: its last row is {left:g}, {below:g}, {one:g}, which belong '
            'into its last column; write it row by row'
        )
    for place, value in ((3, zero), (6, left), (7, below)):
        if abs(value) > 1e-6:
            raise ValueError(f'{name} cannot be: {name}[{place}] is {value:g}, it must be 0')
    if abs(skew) * height > 2 * fy:  # some points would be off by a pixel and more
        raise ValueError(
            f'{name} cannot be: {name}[1], the skew, is {skew:g}, it must be 0; write the matrix '
            'row by row, and calibrate without skew'
        )
    if abs(one - 1.0) > 1e-3 and one != 0.0:  # where it was left out, nothing depends on it
        raise ValueError(f'{name} cannot be: {name}[8] is {one:g}, it must be 1')
    for axis, value, size in (('cx', cx, width), ('cy', cy, height)):
        if not EDGE * size < value + 0.5 < (1 - EDGE) * size:
            raise ValueError(
                f'{name} cannot be: {axis} is {value:g}, on or beyond the edge of an image of '
                f'{width}x{height}; publish the calibration of this image size'
            )
    x, y = (cx + 0.5) / width, (cy + 0.5) / height
    if abs(x - y) < ALIKE and not OTHER_SIZE < x < 1 - OTHER_SIZE:
        raise ValueError(
            f'{name} cannot be: the principal point ({cx:g}, {cy:g}) is the middle of an image '
            f'of about {2 * cx + 1:.0f}x{2 * cy + 1:.0f}, not of {width}x{height}; publish the '
            'calibration of this image size, and binning only beside that of the whole sensor'
        )
    return fx, fy, cx, cy
