"""
What expectation.py does with each query, compiled for the CPU, without gradients.

Torch would read and write tensors of all queries times all cells a dozen times over; here one
query is done after the other, and what it needs stays in the cache. The results are those of
expectation.py but for rounding. One thread: a call is shorter than it takes to divide it.

Importing this module compiles it, once per machine: numba keeps the result beside the file or in
the user's cache.
"""

from __future__ import annotations

import math

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
import numpy as np

# As in expectation.py. They stand here again because numba compiles anew only when this file has
# changed.
COARSE, RELIABILITY, FINE = 8, 4, 2
COARSE_RADIUS, FINE_RADIUS, MEAN_RADIUS, SEARCH_RADIUS = 2, 4, 2, 5
EDGE = 2 * FINE_RADIUS + 1
LOG2_E = np.float32(1 / math.log(2))
# Of 2^x between -1/2 and 1/2: Taylor, exact to float32
C1, C2, C3, C4, C5, C6 = (np.float32(math.log(2) ** k / math.factorial(k)) for k in range(1, 7))
HALF, ONE, LOWEST = np.float32(0.5), np.float32(1), np.float32(-120)
LEAST = np.float32(1e-6)  # mass

_fast = {'reassoc', 'contract', 'arcp', 'nsz'}
_compiled = njit(cache=True, fastmath=_fast, error_model='numpy')
_f4 = types.float32
_vector, _rows, _map = _f4[::1], _f4[:, ::1], _f4[:, :, ::1]
_half_map = types.uint16[:, :, ::1]


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


@_compiled
def exp(x):
    """Of x <= 0, without a branch or a call, so that loops of it are vectorised."""
    t = max(x * LOG2_E, LOWEST)
    n = np.int32(t - HALF)
    f = t - np.float32(n)
    p = ONE + f * (C1 + f * (C2 + f * (C3 + f * (C4 + f * (C5 + f * C6)))))
    return p * power_of_two(n)


@njit(cache=True, fastmath=_fast | {'nnan'}, error_model='numpy')
def largest(s):
    """Return the largest of s and its index."""
    peak = s[0]
    for i in range(len(s)):
        peak = max(peak, s[i])
    for i in range(len(s)):
        if s[i] == peak:
            return peak, i
    return peak, 0


@_compiled
def sum_exp(s, peak):
    """Sum of exp(s - peak)."""
    total = np.float32(0)
    for i in range(len(s)):
        total += exp(s[i] - peak)
    return total


# Below, a map is flat, and a descriptor in it begins `at` an index without sign: views of arrays
# would be counted, and indices with one are asked whether they count from the end.


@_compiled
def begin(row, column, columns, channels):
    """Return where a cell's descriptor begins in a flat map."""
    return np.uintp((row * columns + column) * channels)


@_compiled
def dot(d, coarse, at):
    """Of a descriptor and one of a map."""
    total = np.float32(0)
    for k in range(len(d)):
        total += d[k] * coarse[at + np.uintp(k)]
    return total


@_compiled
def cosine(d, fine, at):
    """Of a descriptor and one of a map of bfloat16, which is made unit."""
    total, square = np.float32(0), np.float32(0)
    for k in range(len(d)):
        x = from_bfloat16(fine[at + np.uintp(k)])
        total += d[k] * x
        square += x * x
    return total / max(np.float32(math.sqrt(square)), np.float32(1e-12))


@_compiled
def add(d, share, fine, at):
    """Add to a descriptor a share of one of a map of bfloat16, which is made unit."""
    square = np.float32(0)
    for k in range(len(d)):
        x = from_bfloat16(fine[at + np.uintp(k)])
        square += x * x
    share /= max(np.float32(math.sqrt(square)), np.float32(1e-12))
    for k in range(len(d)):
        d[k] += share * from_bfloat16(fine[at + np.uintp(k)])


@_compiled
def between(x, low, high):
    """X where it lies between, else the nearer end; what is no number is the lower end."""
    if not x > low:
        return np.float32(low)
    return np.float32(min(x, np.float32(high)))


@_compiled
def corner(u, stride, size):
    """Return the left one of the two cells around a pixel, the right one, and its share."""
    x = between((u + HALF) / np.float32(stride) - HALF, np.float32(0), size - 1)
    left = int(x)
    return left, min(left + 1, size - 1), x - np.float32(left)


@_compiled
def reliability(log_odds, u, v):
    """``ExpectationMatcher.reliability`` of one point."""
    left, right, x = corner(u, RELIABILITY, log_odds.shape[1])
    top, bottom, y = corner(v, RELIABILITY, log_odds.shape[0])
    above = (ONE - x) * log_odds[top, left] + x * log_odds[top, right]
    below = (ONE - x) * log_odds[bottom, left] + x * log_odds[bottom, right]
    return (ONE - y) * above + y * below


@_compiled
def scale_to(d, length):
    """Give d this length."""
    factor = length / max(np.float32(math.sqrt(dot(d, d, np.uintp(0)))), np.float32(1e-12))
    for k in range(len(d)):
        d[k] *= factor


@_compiled
def coarse_descriptor(coarse, h, w, u, v, scale, d):
    """Of a point of the reference, as long as the scale."""
    left, right, x = corner(u, COARSE, w)
    top, bottom, y = corner(v, COARSE, h)
    a, b = begin(top, left, w, len(d)), begin(top, right, w, len(d))
    c, e = begin(bottom, left, w, len(d)), begin(bottom, right, w, len(d))
    for n in range(len(d)):
        k = np.uintp(n)
        above = (ONE - x) * coarse[a + k] + x * coarse[b + k]
        below = (ONE - x) * coarse[c + k] + x * coarse[e + k]
        d[n] = (ONE - y) * above + y * below
    scale_to(d, scale)


@_compiled
def fine_descriptor(fine, h, w, u, v, scale, d):
    """Of a point of the reference, as long as the scale."""
    left, right, x = corner(u, FINE, w)
    top, bottom, y = corner(v, FINE, h)
    d[:] = np.float32(0)
    add(d, (ONE - x) * (ONE - y), fine, begin(top, left, w, len(d)))
    add(d, x * (ONE - y), fine, begin(top, right, w, len(d)))
    add(d, (ONE - x) * y, fine, begin(bottom, left, w, len(d)))
    add(d, x * y, fine, begin(bottom, right, w, len(d)))
    scale_to(d, scale)


@_compiled
def first_cell(x, stride, radius, size):
    """Of a window around a pixel that is moved inwards at the border."""
    offset = np.float32((stride - 1) / 2)
    centre = int(np.rint(between((x - offset) / np.float32(stride), np.float32(0), size - 1)))
    return max(min(centre, size - 1 - radius), radius) - radius


@njit(
    types.Tuple((_rows, _rows, _vector, _map))(
        _map, _half_map, _map, _half_map, _rows, _rows, _rows, _rows, _f4, _f4, _vector, _vector,
    ),
    cache=True, fastmath=_fast, error_model='numpy', nogil=True,
)  # fmt: skip
def match(
    coarse_i, fine_i, coarse_j, fine_j, reliability_j, queries, around, similarity, scale_coarse,
    scale_fine, log_cov, log_odds,
):
    """
    ``ExpectationMatcher.match`` of queries (N, 2), px in the reference i, in the target j.

    Maps are channels last, fine ones the bits of bfloat16. The region searched lies about
    ``around`` (N, 2) px; where that is empty, it is the whole image, and ``similarity`` (N, h * w)
    has been made. Uv, coarse_uv (N, 2), score (N,), cov (N, 2, 2).
    """
    N, (h, w), (H, W) = len(queries), coarse_j.shape[:2], fine_j.shape[:2]
    uv, coarse_uv = np.empty((N, 2), np.float32), np.empty((N, 2), np.float32)
    score, cov = np.empty(N, np.float32), np.empty((N, 2, 2), np.float32)
    d_coarse = np.empty(coarse_i.shape[2], np.float32)
    d_fine = np.empty(fine_i.shape[2], np.float32)
    (h_i, w_i), (H_i, W_i) = coarse_i.shape[:2], fine_i.shape[:2]
    flat_coarse_i, flat_coarse_j = coarse_i.reshape(-1), coarse_j.reshape(-1)
    flat_fine_i, flat_fine_j = fine_i.reshape(-1), fine_j.reshape(-1)
    scratch = np.empty((2 * SEARCH_RADIUS + 1) ** 2, np.float32)
    near = np.empty(EDGE * EDGE, np.float32)
    a_cov, b_cov = math.exp(log_cov[0]), math.exp(log_cov[1])
    for n in range(N):
        u, v = queries[n]
        # Coarse: equation 5 over the window around the mode of the region
        if len(around):
            centre_x = first_cell(around[n, 0], COARSE, 0, w)
            centre_y = first_cell(around[n, 1], COARSE, 0, h)
            left, right = max(centre_x - SEARCH_RADIUS, 0), min(centre_x + SEARCH_RADIUS + 1, w)
            top, bottom = max(centre_y - SEARCH_RADIUS, 0), min(centre_y + SEARCH_RADIUS + 1, h)
            coarse_descriptor(flat_coarse_i, h_i, w_i, u, v, scale_coarse, d_coarse)
            s, i = scratch[:(right - left) * (bottom - top)], 0
            for y in range(top, bottom):
                for x in range(left, right):
                    s[i] = dot(d_coarse, flat_coarse_j, begin(y, x, w, len(d_coarse)))
                    i += 1
        else:
            left, right, top, bottom, s = 0, w, 0, h, similarity[n]
        width = right - left
        peak, mode = largest(s)
        first_x = max(min(left + mode % width, w - 1 - COARSE_RADIUS), COARSE_RADIUS)
        first_y = max(min(top + mode // width, h - 1 - COARSE_RADIUS), COARSE_RADIUS)
        inside, mean_x, mean_y = np.float32(0), np.float32(0), np.float32(0)
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
        coarse_uv[n, 0] = mean_x / inside * np.float32(COARSE) + np.float32((COARSE - 1) / 2)
        coarse_uv[n, 1] = mean_y / inside * np.float32(COARSE) + np.float32((COARSE - 1) / 2)

        # Fine: the same over the cells around the mode of a window
        fine_descriptor(flat_fine_i, H_i, W_i, u, v, scale_fine, d_fine)
        left = first_cell(coarse_uv[n, 0], FINE, FINE_RADIUS, W)
        top = first_cell(coarse_uv[n, 1], FINE, FINE_RADIUS, H)
        for y in range(EDGE):
            for x in range(EDGE):
                at = begin(top + y, left + x, W, len(d_fine))
                near[y * EDGE + x] = cosine(d_fine, flat_fine_j, at)
        peak, mode = largest(near)
        first_x = max(min(mode % EDGE, EDGE - 1 - MEAN_RADIUS), MEAN_RADIUS) - MEAN_RADIUS
        first_y = max(min(mode // EDGE, EDGE - 1 - MEAN_RADIUS), MEAN_RADIUS) - MEAN_RADIUS
        inside, mean_x, mean_y = np.float32(0), np.float32(0), np.float32(0)
        xx, xy, yy = np.float32(0), np.float32(0), np.float32(0)
        for j in range(2 * MEAN_RADIUS + 1):
            for i in range(2 * MEAN_RADIUS + 1):
                weight = exp(near[(first_y + j) * EDGE + first_x + i] - peak)
                # From the window's middle: small numbers, so that little is lost below
                x, y = np.float32(i - MEAN_RADIUS), np.float32(j - MEAN_RADIUS)
                inside += weight
                mean_x += weight * x
                mean_y += weight * y
                xx += weight * x * x
                xy += weight * x * y
                yy += weight * y * y
        mass = inside / sum_exp(near, peak)
        mean_x, mean_y = mean_x / inside, mean_y / inside
        offset = np.float32((FINE - 1) / 2)
        found_u = (np.float32(left + first_x + MEAN_RADIUS) + mean_x) * np.float32(FINE) + offset
        found_v = (np.float32(top + first_y + MEAN_RADIUS) + mean_y) * np.float32(FINE) + offset
        uv[n, 0], uv[n, 1] = found_u, found_v
        a = a_cov * FINE**2
        cov[n, 0, 0] = max(xx / inside - mean_x * mean_x, np.float32(0)) * a + b_cov
        cov[n, 0, 1] = cov[n, 1, 0] = (xy / inside - mean_x * mean_y) * a
        cov[n, 1, 1] = max(yy / inside - mean_y * mean_y, np.float32(0)) * a + b_cov
        odds = (
            log_odds[0] * reliability(reliability_j, found_u, found_v)
            + log_odds[1] * math.log(max(mass, LEAST)) + log_odds[2] * coarse_cosine
            + log_odds[3] * peak / scale_fine + log_odds[4]
        )
        score[n] = ONE / (ONE + math.exp(-odds))
    return uv, coarse_uv, score, cov
