"""
Of the solver in compiled.py, what is done with poses: rotations, the prior, the reduced system.

``q`` (K, 4) quaternions x y z w, ``c`` (K, 3) centres and ``R`` (K, 9) rotations row by row stand
in flat memory, as all that is passed by pointer.
"""

from __future__ import annotations

import math

from imatching_ros.jit import at, b1, F8, f8, I8, i8, inner, void

LANES = 64  #: landmarks side by side: see compiled.py


@inner(void(F8, i8))
def clear(x, n):
    for i in range(n):
        x[i] = 0.0


@inner(void(F8, F8, i8))
def copy(x, y, n):
    """Copy n numbers from x to y."""
    for i in range(n):
        y[i] = x[i]


@inner(f8(F8, F8, i8))
def dot(a, b, n):
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
    """lie.retract of one pose."""
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


# The prior: pose (P,), its linearisation point T (P, 7), H (6 P, 6 P) and g (6 P,) --------------


@inner(void(I8, i8, F8, F8, F8, F8))
def prior_coordinates(pose, P, T, q, c, d):
    """Write lie.local of the prior's poses to d (6 P,)."""
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
    """PosePrior.cost. d: (6 P,), room."""
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


@inner(b1(i8, F8, F8, F8, F8, I8, f8, I8, I8, i8, F8, F8, F8))
def solve_cameras(K, H, g, reduced, rhs, free, damping, envelope, pose, P, G, A, step):
    """
    Solve (Hcc - E E^T) step = -(gc + E y); False if not definite.

    E y comes with its sign; G as of ``linearise_prior``. A: (6 K, 6 K) to be overwritten.
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
