"""
The prior on P poses, 1/2 d'H d + g'd + constant with d (6 P,) as ``lie.local``.

pose: (P,), indices of the problem's poses. T: (P, 7), the linearisation point. H: (6 P, 6 P) and
g: (6 P,).
"""

from __future__ import annotations

import math

from .poses import dot
from ....jit import at, F8, f8, I8, i8, inner, void


@inner(void(I8, i8, F8, F8, F8, F8))
def prior_coordinates(pose, P, T, q, c, d):
    """Write ``lie.local`` of the prior's poses, which are those of a state, to d (6 P,)."""
    for n in range(P):
        k, t, s = pose[n], at(T, 7 * n), at(d, 6 * n)
        o = at(q, 4 * k)
        x, y, z, w = o[0], o[1], o[2], o[3]
        a, b, e, f = -t[3], -t[4], -t[5], t[6]
        rx, ry = w * a + f * x + y * e - z * b, w * b + f * y + z * a - x * e
        rz, rw = w * e + f * z + x * b - y * a, w * f - x * a - y * b - z * e
        sine = math.sqrt(rx * rx + ry * ry + rz * rz)
        size = 2 * math.atan2(sine, abs(rw)) / sine if sine > 1e-150 else 2.0
        size = -size if rw < 0 else size
        for j in range(3):
            s[j] = c[3 * k + j] - t[j]
        s[3], s[4], s[5] = size * rx, size * ry, size * rz


@inner(f8(I8, i8, F8, F8, F8, f8, F8, F8, F8))
def prior_cost(pose, P, T, H, g, constant, q, c, d):
    """Return what the prior adds to the cost, as PosePrior.cost does. d: (6 P,), room."""
    if P == 0:
        return 0.0
    prior_coordinates(pose, P, T, q, c, d)
    total = dot(g, d, 6 * P) + constant
    for i in range(6 * P):
        total += 0.5 * d[i] * dot(at(H, 6 * P * i), d, 6 * P)
    return total


@inner(void(F8, F8))
def left_jacobian_inverse(d, J):
    """Write lie.left_jacobian_inverse of a rotation vector to J (9,)."""
    x, y, z = d[0], d[1], d[2]
    square = x * x + y * y + z * z
    if square < 0.0025:
        b = 1 / 12 + square / 720 + square * square / 30240
    else:
        half = math.sqrt(square) / 2
        b = (1 - half / math.tan(half)) / square
    J[0], J[4], J[8] = 1 - b * (y * y + z * z), 1 - b * (x * x + z * z), 1 - b * (x * x + y * y)
    J[1], J[3] = b * x * y + 0.5 * z, b * x * y - 0.5 * z
    J[2], J[6] = b * x * z - 0.5 * y, b * x * z + 0.5 * y
    J[5], J[7] = b * y * z + 0.5 * x, b * y * z - 0.5 * x


@inner(void(I8, i8, F8, F8, F8, F8, F8, F8, F8, F8, F8, F8))
def linearise_prior(pose, P, T, prior_H, prior_g, q, c, d, J, G, H, g):
    """
    Linearise the prior as PosePrior.linearise does.

    The Hessian goes to G (6 P, 6 P), and what belongs to single poses is added to H (K, 21) and g
    (K, 6). d: (6 P,) and J: (P, 9), room.
    """
    prior_coordinates(pose, P, T, q, c, d)
    size = 6 * P
    for n in range(P):
        left_jacobian_inverse(at(d, 6 * n + 3), at(J, 9 * n))
    for i in range(size):
        for n in range(P):
            row, out, j9 = at(prior_H, size * i + 6 * n), at(G, size * i + 6 * n), at(J, 9 * n)
            for j in range(3):
                out[j] = row[j]
                out[3 + j] = row[3] * j9[j] + row[4] * j9[3 + j] + row[5] * j9[6 + j]
    for n in range(P):
        block, j9 = at(G, size * (6 * n + 3)), at(J, 9 * n)
        for i in range(size):
            a, b, e = block[i], block[size + i], block[2 * size + i]
            for j in range(3):
                block[size * j + i] = j9[j] * a + j9[3 + j] * b + j9[6 + j] * e
        H_k, g_k = at(H, 21 * pose[n]), at(g, 6 * pose[n])
        for j in range(6):
            slope = prior_g[6 * n + j] + dot(at(prior_H, size * (6 * n + j)), d, size)
            if j < 3:
                g_k[j] += slope
            else:
                for m in range(3):
                    g_k[3 + m] += j9[3 * (j - 3) + m] * slope
            for m in range(j + 1):
                H_k[j * (j + 1) // 2 + m] += G[size * (6 * n + j) + 6 * n + m]
