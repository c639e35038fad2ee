"""
Numbers in a row, and poses.

``q`` (K, 4) quaternions x y z w, ``c`` (K, 3) centres and ``R`` (K, 9) rotations row by row stand
in flat memory, as all that is passed by pointer.
"""

from __future__ import annotations

import math

from ....jit import at, F8, f8, i8, inner, void


@inner(void(F8, i8))
def clear(x, n):
    """Write n zeros to x."""
    for i in range(n):
        x[i] = 0.0


@inner(void(F8, F8, i8))
def copy(x, y, n):
    """Copy n numbers from x to y."""
    for i in range(n):
        y[i] = x[i]


@inner(f8(F8, F8, i8))
def dot(a, b, n):
    """Return the scalar product of n numbers with n others."""
    total = 0.0
    for i in range(n):
        total += a[i] * b[i]
    return total


@inner(void(F8, i8, F8))
def rotations(q, K, R):
    """Write to R the rotations of K quaternions of any length."""
    for k in range(K):
        a, b = at(q, 4 * k), at(R, 9 * k)
        size = math.sqrt(dot(a, a, 4))
        x, y, z, w = a[0] / size, a[1] / size, a[2] / size, a[3] / size
        b[0], b[1], b[2] = 1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)
        b[3], b[4], b[5] = 2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)
        b[6], b[7], b[8] = 2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)


@inner(void(F8, F8, F8, F8, F8))
def retract(q, c, step, q_new, c_new):
    """Write one pose after a step (6,), as ``lie.retract`` does."""
    for j in range(3):
        c_new[j] = c[j] + step[j]
    hx, hy, hz = 0.5 * step[3], 0.5 * step[4], 0.5 * step[5]
    angle = math.sqrt(hx * hx + hy * hy + hz * hz)
    size = math.sin(angle) / angle if angle > 0 else 1.0
    hx, hy, hz, hw = size * hx, size * hy, size * hz, math.cos(angle)
    x, y, z, w = q[0], q[1], q[2], q[3]
    q_new[0] = hw * x + w * hx + hy * z - hz * y
    q_new[1] = hw * y + w * hy + hz * x - hx * z
    q_new[2] = hw * z + w * hz + hx * y - hy * x
    q_new[3] = hw * w - hx * x - hy * y - hz * z
    size = math.sqrt(dot(q_new, q_new, 4))
    for j in range(4):
        q_new[j] /= size
