"""
The cameras' step: the reduced system (Hcc - E E^T) step = -(gc + E y).

Hcc comes as lower triangles (K, 21) and the Hessian G (6 P, 6 P) of the prior, E E^T as lower
blocks (K, K, 6, 6). envelope: (K,), the first pose that shares a landmark, or the prior, with
each; left of it the rows of the matrix and of its Cholesky factor are zero, and are never touched.
"""

from __future__ import annotations

import math

from .lanes import LANES
from .poses import clear, dot
from ....jit import at, b1, F8, f8, I8, i8, inner


@inner(b1(i8, F8, F8, F8, F8, I8, f8, I8, I8, i8, F8, F8, F8))
def solve_cameras(K, H, g, reduced, rhs, free, damping, envelope, pose, P, G, A, step):
    """
    Write the poses' step (6 K,), or return False where the damped system is not definite.

    reduced, rhs: as ``eliminate`` leaves them. free: (6 K,), other parameters stay. pose, G: as of
    ``linearise_prior``. A: (6 K, 6 K), room.
    """
    size = 6 * K
    for k in range(K):
        for r in range(6):
            i = 6 * k + r
            row = at(A, size * i)
            if free[i] == 0:
                clear(at(row, 6 * envelope[k]), i - 6 * envelope[k])
                row[i], step[i] = 1.0, 0.0
                continue
            for j in range(envelope[k], k + 1):
                x = at(reduced, 36 * (K * k + j) + 6 * r)
                for s in range(6):
                    row[6 * j + s] = -x[s] if free[6 * j + s] else 0.0
            h = at(H, 21 * k + r * (r + 1) // 2)
            for s in range(r + 1):
                if free[6 * k + s]:
                    row[6 * k + s] += h[s] * (1 + damping if r == s else 1.0)
            if h[r] == 0:  # what nothing observes stays where it is
                row[i] = 1.0
            total = g[i]
            lanes = at(rhs, LANES * i)
            for s in range(LANES):
                total += lanes[s]
            step[i] = -total
    for n in range(P):
        for m in range(P):
            k, j = pose[n], pose[m]
            for r in range(6 if k > j else 0):
                for s in range(6):
                    if free[6 * k + r] and free[6 * j + s]:
                        A[size * (6 * k + r) + 6 * j + s] += G[6 * P * (6 * n + r) + 6 * m + s]
    # Cholesky by rows inside the envelope, which it preserves.
    for i in range(size):
        begin, row = 6 * envelope[i // 6], at(A, size * i)
        for j in range(begin, i):
            lower, other = max(begin, 6 * envelope[j // 6]), at(A, size * j)
            row[j] = (row[j] - dot(at(row, lower), at(other, lower), j - lower)) * other[j]
        left = at(row, begin)
        pivot = row[i] - dot(left, left, i - begin)
        if not pivot > 0:
            return False
        row[i] = 1 / math.sqrt(pivot)  # kept as its inverse
        step[i] = (step[i] - dot(left, at(step, begin), i - begin)) * row[i]
    for i in range(size - 1, -1, -1):
        begin, row = 6 * envelope[i // 6], at(A, size * i)
        step[i] *= row[i]
        for j in range(begin, i):
            step[j] -= row[j] * step[i]
    return True
