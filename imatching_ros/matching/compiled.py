"""
What expectation.py does with each query, compiled for the CPU, without gradients.

Torch would read and write tensors of all queries times all cells a dozen times over; here one
query is done after the other, and what it needs stays in the cache. The results are those of
expectation.py but for rounding. One thread: a call is shorter than it takes to divide it.
"""

from __future__ import annotations

import math

from imatching_ros.jit import at, entry, F4, f4, FAST, i8, inner, void
from imatching_ros.matching.encoder import COARSE, FINE, RELIABILITY
from imatching_ros.matching.families.expectation import (
    COARSE_RADIUS,
    FINE_RADIUS,
    MEAN_RADIUS,
    SEARCH_RADIUS,
)
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
import numpy as np

EDGE = 2 * FINE_RADIUS + 1
REGION = (2 * SEARCH_RADIUS + 1) ** 2
LOG2_E = np.float32(1 / math.log(2))
# Of 2^x between -1/2 and 1/2: Taylor, exact to float32
C1, C2, C3, C4, C5, C6 = (np.float32(math.log(2) ** k / math.factorial(k)) for k in range(1, 7))
ZERO, HALF, ONE, LOWEST = (np.float32(x) for x in (0, 0.5, 1, -120))
LEAST, TINY = np.float32(1e-6), np.float32(1e-12)  # mass, length

_u2 = types.uint16
U2 = types.CPointer(_u2)
_vector, _rows, _map, _half_map = f4[::1], f4[:, ::1], f4[:, :, ::1], _u2[:, :, ::1]


@intrinsic
def from_bfloat16(context, bits):
    """Return the number whose bfloat16 has these bits (uint16)."""
    def build(context, builder, signature, arguments):
        wide = builder.zext(arguments[0], ir.IntType(32))
        wide = builder.shl(wide, ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(types.uint16), build


@intrinsic
def power_of_two(context, exponent):
    """Return 2^n for an int32 n."""
    def build(context, builder, signature, arguments):
        biased = builder.add(arguments[0], ir.Constant(ir.IntType(32), 127))
        return builder.bitcast(
            builder.shl(biased, ir.Constant(ir.IntType(32), 23)), ir.FloatType()
        )

    return types.float32(types.int32), build


@inner(f4(f4))
def exp(x):
    """Of x <= 0, without a branch or a call, so that loops of it are vectorised."""
    t = max(x * LOG2_E, LOWEST)
    n = np.int32(t - HALF)
    f = t - np.float32(n)
    p = ONE + f * (C1 + f * (C2 + f * (C3 + f * (C4 + f * (C5 + f * C6)))))
    return p * power_of_two(n)


@inner(i8(F4, i8), fastmath=FAST | {'nnan'})
def largest(s, n):
    """Return the index of the largest of n numbers."""
    peak = s[0]
    for i in range(n):
        peak = max(peak, s[i])
    for i in range(n):
        if s[i] == peak:
            return i
    return 0


@inner(f4(F4, f4, i8))
def sum_exp(s, peak, n):
    """Sum of exp(s - peak)."""
    total = np.float32(0)
    for i in range(n):
        total += exp(s[i] - peak)
    return total


@inner(f4(F4, F4, i8))
def dot(a, b, n):
    total = np.float32(0)
    for k in range(n):
        total += a[k] * b[k]
    return total


@inner(f4(F4, U2, i8))
def cosine(d, fine, n):
    """Of a descriptor and one of bfloat16, which is made unit."""
    total, square = np.float32(0), np.float32(0)
    for k in range(n):
        x = from_bfloat16(fine[k])
        total += d[k] * x
        square += x * x
    return total / max(np.float32(math.sqrt(square)), TINY)


@inner(void(F4, f4, U2, i8))
def add(d, share, fine, n):
    """Add to a descriptor a share of one of bfloat16, which is made unit."""
    square = np.float32(0)
    for k in range(n):
        x = from_bfloat16(fine[k])
        square += x * x
    share /= max(np.float32(math.sqrt(square)), TINY)
    for k in range(n):
        d[k] += share * from_bfloat16(fine[k])


@inner(f4(f4, f4))
def between(x, high):
    """X where it lies between 0 and this, else the nearer end; what is no number is 0."""
    if not x > ZERO:
        return ZERO
    return min(x, high)


@inner(types.Tuple((i8, i8, f4))(f4, f4, i8))
def corner(u, stride, size):
    """Return the left one of the two cells around a pixel, the right one, and its share."""
    x = between((u + HALF) / stride - HALF, size - 1)
    left = int(x)
    return left, min(left + 1, size - 1), x - np.float32(left)


@inner(f4(F4, i8, i8, f4, f4))
def reliability(log_odds, h, w, u, v):
    """``ExpectationMatcher.reliability`` of one point."""
    left, right, x = corner(u, RELIABILITY, w)
    top, bottom, y = corner(v, RELIABILITY, h)
    above, below = at(log_odds, top * w), at(log_odds, bottom * w)
    return (ONE - y) * ((ONE - x) * above[left] + x * above[right]) + y * (
        (ONE - x) * below[left] + x * below[right]
    )


@inner(void(F4, f4, i8))
def scale_to(d, length, n):
    """Give d this length."""
    factor = length / max(np.float32(math.sqrt(dot(d, d, n))), TINY)
    for k in range(n):
        d[k] *= factor


@inner(void(F4, i8, i8, i8, f4, f4, f4, F4))
def coarse_descriptor(coarse, h, w, n, u, v, scale, d):
    """Of a point of the reference, as long as the scale."""
    left, right, x = corner(u, COARSE, w)
    top, bottom, y = corner(v, COARSE, h)
    a, b = at(coarse, (top * w + left) * n), at(coarse, (top * w + right) * n)
    c, e = at(coarse, (bottom * w + left) * n), at(coarse, (bottom * w + right) * n)
    for k in range(n):
        above = (ONE - x) * a[k] + x * b[k]
        below = (ONE - x) * c[k] + x * e[k]
        d[k] = (ONE - y) * above + y * below
    scale_to(d, scale, n)


@inner(void(U2, i8, i8, i8, f4, f4, f4, F4))
def fine_descriptor(fine, h, w, n, u, v, scale, d):
    """Of a point of the reference, as long as the scale."""
    left, right, x = corner(u, FINE, w)
    top, bottom, y = corner(v, FINE, h)
    for k in range(n):
        d[k] = ZERO
    add(d, (ONE - x) * (ONE - y), at(fine, (top * w + left) * n), n)
    add(d, x * (ONE - y), at(fine, (top * w + right) * n), n)
    add(d, (ONE - x) * y, at(fine, (bottom * w + left) * n), n)
    add(d, x * y, at(fine, (bottom * w + right) * n), n)
    scale_to(d, scale, n)


@inner(i8(f4, i8, i8, i8))
def first_cell(x, stride, radius, size):
    """Of a window around a pixel that is moved inwards at the border."""
    offset = np.float32(stride - 1) / np.float32(2)
    centre = int(np.rint(between((x - offset) / np.float32(stride), size - 1)))
    return max(min(centre, size - 1 - radius), radius) - radius


@entry(
    void(
        _map, _half_map, _map, _half_map, _rows, _rows, _rows, _rows, f4, f4, _vector, _vector,
        _rows, _rows, _vector, _rows, _vector,
    ),
    fastmath=FAST,
)
def _match(
    coarse_i, fine_i, coarse_j, fine_j, reliability_j, queries, around, similarity, scale_coarse,
    scale_fine, log_cov, log_odds, uv, coarse_uv, score, cov, room,
):
    N, near, n, m = len(queries), len(around), coarse_i.shape[2], fine_i.shape[2]
    h, w, H, W = coarse_j.shape[0], coarse_j.shape[1], fine_j.shape[0], fine_j.shape[1]
    h_i, w_i, H_i, W_i = coarse_i.shape[0], coarse_i.shape[1], fine_i.shape[0], fine_i.shape[1]
    h_r, w_r = reliability_j.shape
    coarse_i, coarse_j, fine_i, fine_j = (
        at(coarse_i, 0), at(coarse_j, 0), at(fine_i, 0), at(fine_j, 0),
    )
    reliability_j, cov, odds = at(reliability_j, 0), at(cov, 0), at(log_odds, 0)
    region, window, d = at(room, 0), at(room, REGION), at(room, REGION + EDGE * EDGE)
    a_cov, b_cov = math.exp(log_cov[0]), math.exp(log_cov[1])
    for q in range(N):
        u, v = queries[q, 0], queries[q, 1]
        # Coarse: equation 5 over the window around the mode of the region
        left, right, top, bottom, s = 0, w, 0, h, region
        if near:
            centre_x = first_cell(around[q, 0], COARSE, 0, w)
            centre_y = first_cell(around[q, 1], COARSE, 0, h)
            left, right = max(centre_x - SEARCH_RADIUS, 0), min(centre_x + SEARCH_RADIUS + 1, w)
            top, bottom = max(centre_y - SEARCH_RADIUS, 0), min(centre_y + SEARCH_RADIUS + 1, h)
            coarse_descriptor(coarse_i, h_i, w_i, n, u, v, scale_coarse, d)
            i = 0
            for y in range(top, bottom):
                for x in range(left, right):
                    s[i] = dot(d, at(coarse_j, (y * w + x) * n), n)
                    i += 1
        else:
            s = at(similarity, q * h * w)
        width = right - left
        mode = largest(s, width * (bottom - top))
        peak = s[mode]
        first_x = max(min(left + mode % width, w - 1 - COARSE_RADIUS), COARSE_RADIUS)
        first_y = max(min(top + mode // width, h - 1 - COARSE_RADIUS), COARSE_RADIUS)
        inside, mean_x, mean_y = ZERO, ZERO, ZERO
        # What of the window lies in the region
        from_x, to_x = max(first_x - COARSE_RADIUS, left), min(first_x + COARSE_RADIUS + 1, right)
        from_y, to_y = max(first_y - COARSE_RADIUS, top), min(first_y + COARSE_RADIUS + 1, bottom)
        for y in range(from_y, to_y):
            for x in range(from_x, to_x):
                weight = exp(s[(y - top) * width + x - left] - peak)
                inside += weight
                mean_x += weight * np.float32(x)
                mean_y += weight * np.float32(y)
        coarse_cosine = peak / scale_coarse
        found_u = mean_x / inside * np.float32(COARSE) + np.float32((COARSE - 1) / 2)
        found_v = mean_y / inside * np.float32(COARSE) + np.float32((COARSE - 1) / 2)
        coarse_uv[q, 0], coarse_uv[q, 1] = found_u, found_v

        # Fine: the same over the cells around the mode of a window
        fine_descriptor(fine_i, H_i, W_i, m, u, v, scale_fine, d)
        left = first_cell(found_u, FINE, FINE_RADIUS, W)
        top = first_cell(found_v, FINE, FINE_RADIUS, H)
        for y in range(EDGE):
            for x in range(EDGE):
                there = at(fine_j, ((top + y) * W + left + x) * m)
                window[y * EDGE + x] = cosine(d, there, m)
        mode = largest(window, EDGE * EDGE)
        peak = window[mode]
        first_x = max(min(mode % EDGE, EDGE - 1 - MEAN_RADIUS), MEAN_RADIUS) - MEAN_RADIUS
        first_y = max(min(mode // EDGE, EDGE - 1 - MEAN_RADIUS), MEAN_RADIUS) - MEAN_RADIUS
        inside, mean_x, mean_y, xx, xy, yy = ZERO, ZERO, ZERO, ZERO, ZERO, ZERO
        for j in range(2 * MEAN_RADIUS + 1):
            row = at(window, (first_y + j) * EDGE + first_x)
            for i in range(2 * MEAN_RADIUS + 1):
                weight = exp(row[i] - peak)
                # From the window's middle: small numbers, so that little is lost below
                x, y = np.float32(i - MEAN_RADIUS), np.float32(j - MEAN_RADIUS)
                inside += weight
                mean_x += weight * x
                mean_y += weight * y
                xx += weight * x * x
                xy += weight * x * y
                yy += weight * y * y
        mass = inside / sum_exp(window, peak, EDGE * EDGE)
        mean_x, mean_y = mean_x / inside, mean_y / inside
        offset = np.float32((FINE - 1) / 2)
        found_u = (np.float32(left + first_x + MEAN_RADIUS) + mean_x) * np.float32(FINE) + offset
        found_v = (np.float32(top + first_y + MEAN_RADIUS) + mean_y) * np.float32(FINE) + offset
        uv[q, 0], uv[q, 1] = found_u, found_v
        a, c = a_cov * np.float32(FINE * FINE), at(cov, 4 * q)
        c[0] = max(xx / inside - mean_x * mean_x, ZERO) * a + b_cov
        c[1] = (xy / inside - mean_x * mean_y) * a
        c[2] = c[1]
        c[3] = max(yy / inside - mean_y * mean_y, ZERO) * a + b_cov
        evidence = (
            odds[0] * reliability(reliability_j, h_r, w_r, found_u, found_v)
            + odds[1] * math.log(max(mass, LEAST)) + odds[2] * coarse_cosine
            + odds[3] * peak / scale_fine + odds[4]
        )
        score[q] = ONE / (ONE + math.exp(-evidence))


def match(
    coarse_i, fine_i, coarse_j, fine_j, reliability_j, queries, around, similarity, scale_coarse,
    scale_fine, log_cov, log_odds,
):
    """
    ``ExpectationMatcher.match`` of queries (N, 2), px in the reference i, in the target j.

    Maps are channels last, fine ones the bits of bfloat16. The region searched lies about
    ``around`` (N, 2) px; where that is empty, it is the whole image, and ``similarity`` (N, h * w)
    has been made. Returns uv, coarse_uv (N, 2), score (N,), cov (N, 2, 2).
    """
    shapes = [(len(queries), *rest) for rest in ((2,), (2,), (), (4,))]
    uv, coarse_uv, score, cov = (np.empty(shape, np.float32) for shape in shapes)
    channels = max(coarse_i.shape[2], fine_i.shape[2])
    _match(
        coarse_i, fine_i, coarse_j, fine_j, reliability_j, queries, around, similarity,
        scale_coarse, scale_fine, log_cov, log_odds, uv, coarse_uv, score, cov,
        np.empty(REGION + EDGE * EDGE + channels, np.float32),
    )
    return uv, coarse_uv, score, cov.reshape(-1, 2, 2)
