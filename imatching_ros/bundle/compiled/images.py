"""
The pose of one image, and the turn between two.

It is what registration.py and geometry/two_view.py say in torch, point by point. A pose is seven
numbers, a centre and a quaternion x y z w; points: (N, 3), world; xy: (N, 2) on the plane z = 1;
cov: (N, 3), uu uv vv, px^2; fx and fy in pixels.
"""

from __future__ import annotations

import math

import numpy as np

from ..solver.compiled.linearise import CAUCHY, GEMAN_MCCLURE, HUBER
from ..solver.compiled.poses import clear, copy, dot, retract, rotations
from ..solver.problem import BEHIND_PX, MIN_DEPTH
from ...geometry.two_view import HYPOTHESES
from ...jit import at, b1, entry, F8, f8, i8, inner, void

_vector, _rows, _mask = f8[::1], f8[:, ::1], b1[::1]


@inner(void(F8, i8, F8))
def turned(T, K, R):
    """Write to R (K, 9) the rotations of poses (K, 7)."""
    for k in range(K):
        rotations(at(T, 7 * k + 3), 1, at(R, 9 * k))


# One image against known landmarks, as in registration.py ----------------------------------------


@inner(b1(F8, F8, f8, F8, F8))
def solve6(H, g, damping, step, L):
    """Write the damped step, by Cholesky; return whether H is definite. L: (6, 6), room."""
    for i in range(6):
        row = at(L, 6 * i)
        for j in range(i + 1):
            x = H[6 * i + j] - dot(row, at(L, 6 * j), j)
            if i > j:
                row[j] = x / L[7 * j]
                continue
            x += damping * (H[7 * i] + 1e-12)
            if not x > 0:
                return False
            row[i] = math.sqrt(x)
        step[i] = (-g[i] - dot(row, step, i)) / row[i]
    for i in range(5, -1, -1):
        step[i] /= L[7 * i]
        for k in range(i):
            step[k] -= L[6 * i + k] * step[i]
    return True


@inner(void(f8, f8, f8, F8))
def lever(x, y, z, J):
    """Write behind three numbers their cross product with x, y, z, which stands before them."""
    J[3], J[4], J[5] = y * J[2] - z * J[1], z * J[0] - x * J[2], x * J[1] - y * J[0]


@inner(f8(F8, F8, i8, F8, F8, F8, f8, f8, i8, f8, F8, F8, F8))
def normal_equations(q, c, N, points, xy, cov, fx, fy, kernel, scale, H, g, room):
    """Return the cost, and write H (6, 6), its lower triangle, and g (6,). room: (21,)."""
    c2, cost = scale * scale, 0.0
    R, Jx, Jy = at(room, 0), at(room, 9), at(room, 15)
    rotations(q, 1, R)
    clear(H, 36)
    clear(g, 6)
    for n in range(N):
        p, seen, v = at(points, 3 * n), at(xy, 2 * n), at(cov, 3 * n)
        dx, dy, dz = p[0] - c[0], p[1] - c[1], p[2] - c[2]
        Z = R[2] * dx + R[5] * dy + R[8] * dz
        s, w, xx, uv, yy, gx, gy, x, y = BEHIND_PX**2, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        front = Z > MIN_DEPTH
        if front:
            x = (R[0] * dx + R[3] * dy + R[6] * dz) / Z
            y = (R[1] * dx + R[4] * dy + R[7] * dz) / Z
            determinant = v[0] * v[2] - v[1] * v[1]
            xx, uv, yy = v[2] / determinant, -v[1] / determinant, v[0] / determinant
            ex, ey = (x - seen[0]) * fx, (y - seen[1]) * fy
            gx, gy = xx * ex + uv * ey, uv * ex + yy * ey
            s = ex * gx + ey * gy
        if kernel == HUBER:
            cost += s if s <= c2 else 2 * scale * math.sqrt(s) - c2
            w = scale / math.sqrt(max(s, c2))
        elif kernel == CAUCHY:
            cost += c2 * math.log1p(s / c2)
            w = c2 / (c2 + s)
        elif kernel == GEMAN_MCCLURE:
            w = c2 / (c2 + s)
            cost += w * s
            w *= w
        else:
            cost += s
        if not front:
            continue
        for j in range(3):
            ahead = R[3 * j + 2]
            Jx[j], Jy[j] = (x * ahead - R[3 * j]) * fx / Z, (y * ahead - R[3 * j + 1]) * fy / Z
        lever(dx, dy, dz, Jx)
        lever(dx, dy, dz, Jy)
        for i in range(6):
            jx, jy = w * (xx * Jx[i] + uv * Jy[i]), w * (uv * Jx[i] + yy * Jy[i])
            g[i] += w * (gx * Jx[i] + gy * Jy[i])
            for j in range(i + 1):
                H[6 * i + j] += jx * Jx[j] + jy * Jy[j]
    return 0.5 * cost


@entry(void(_vector, _rows, _rows, _rows, f8, f8, i8, f8, i8, _vector))
def _refine(T, points, xy, cov, fx, fy, kernel, scale, iterations, room):
    N, points, xy, cov = len(points), at(points, 0), at(xy, 0), at(cov, 0)
    c, q, T_new, step, H = at(T, 0), at(T, 3), at(room, 0), at(room, 7), at(room, 13)
    H_new, more = at(H, 42), at(H, 84)
    damping = 1e-4
    cost = normal_equations(q, c, N, points, xy, cov, fx, fy, kernel, scale, H, at(H, 36), more)
    for _ in range(iterations):
        cost_new = np.inf
        if solve6(H, at(H, 36), damping, step, more):
            retract(q, c, step, at(T_new, 3), T_new)
            cost_new = normal_equations(
                at(T_new, 3), T_new, N, points, xy, cov, fx, fy, kernel, scale, H_new,
                at(H_new, 36), more,
            )
        if cost_new < cost:
            done = cost - cost_new < 1e-6 * cost
            copy(T_new, c, 7)
            H, H_new = H_new, H
            cost, damping = cost_new, damping * 0.1
            if done:
                break
        else:
            damping *= 10
            if damping > 1e3:
                break


def refine(T, points, xy, cov, fx, fy, kernel, scale, iterations):
    """Return a pose (7,) refined as registration.py's ``refine`` does."""
    T = T.copy()
    _refine(T, points, xy, cov, fx, fy, kernel, scale, iterations, np.empty(140))
    return T


@inner(f8(F8, F8, F8, F8, f8, f8))
def distance(R, c, p, xy, fx, fy):
    """Return pixels between a point's image and where it is seen; infinite behind the camera."""
    x, y, z = p[0] - c[0], p[1] - c[1], p[2] - c[2]
    Z = R[2] * x + R[5] * y + R[8] * z
    if not Z > MIN_DEPTH:
        return np.inf
    ex = ((R[0] * x + R[3] * y + R[6] * z) / Z - xy[0]) * fx
    ey = ((R[1] * x + R[4] * y + R[7] * z) / Z - xy[1]) * fy
    return math.sqrt(ex * ex + ey * ey)


@entry(void(_vector, _rows, _rows, f8, f8, f8, _vector, _mask))
def _agreeing(T, points, xy, fx, fy, inlier_px, R, good):
    T, R, p, seen = at(T, 0), at(R, 0), at(points, 0), at(xy, 0)
    turned(T, 1, R)
    for n in range(len(good)):
        good[n] = distance(R, T, at(p, 3 * n), at(seen, 2 * n), fx, fy) < inlier_px


def agreeing(T, points, xy, fx, fy, inlier_px):
    """Say which points (N,) lie in front of a camera and within ``inlier_px`` of their image."""
    good = np.empty(len(points), np.bool_)
    _agreeing(T, points, xy, fx, fy, inlier_px, np.empty(9), good)
    return good


# Two images, as in geometry/two_view.py ----------------------------------------------------------


@inner(void(F8, F8, F8))
def frame(a, b, axes):
    """Write an orthonormal frame, its axes as rows, built on two directions to axes (9,)."""
    x, y, z = axes, at(axes, 3), at(axes, 6)
    for j in range(3):
        x[j] = a[j] + b[j]
    cross(a, b, z)
    x_size = max(math.sqrt(dot(x, x, 3)), 1e-12)
    z_size = max(math.sqrt(dot(z, z, 3)), 1e-12)
    for j in range(3):
        x[j] /= x_size
        z[j] /= z_size
    cross(z, x, y)


@inner(void(F8, F8, F8))
def cross(a, b, c):
    """Write the cross product of a and b to c."""
    for j in range(3):
        k, m = (j + 1) % 3, (j + 2) % 3
        c[j] = a[k] * b[m] - a[m] * b[k]


@inner(f8(F8, F8, F8))
def turn_error2(R, a, xy):
    """
    Return the squared distance, on the plane z = 1, of a turned ray from where it is seen.

    It is infinite where the ray points backwards.
    """
    Z = dot(at(R, 6), a, 3)
    if Z <= 0:
        return np.inf
    Z = max(Z, 1e-6)
    x, y = dot(R, a, 3) / Z - xy[0], dot(at(R, 3), a, 3) / Z - xy[1]
    return x * x + y * y


@inner(void(F8, F8, i8))
def rays(xy, ray, n):
    """Write the unit rays (N, 3) of points on the plane z = 1."""
    for i in range(n):
        a, b = at(xy, 2 * i), at(ray, 3 * i)
        b[2] = 1 / math.sqrt(dot(a, a, 2) + 1)
        b[0], b[1] = a[0] * b[2], a[1] * b[2]


@inner(void(F8, F8, i8, f8, f8))
def turn(a, b, stride, c, s):
    """Turn four pairs of numbers, ``stride`` apart, by an angle of this cosine and sine."""
    for k in range(4):
        x, y = a[stride * k], b[stride * k]
        a[stride * k], b[stride * k] = c * x - s * y, s * x + c * y


@inner(i8(F8, F8))
def largest_eigenvector(A, V):
    """Return which row of V (4, 4) is A's, which is overwritten, by Jacobi's turns."""
    clear(V, 16)
    for p in range(4):
        V[5 * p] = 1.0
    for _ in range(30):
        off, diagonal = 0.0, 0.0
        for p in range(4):
            diagonal += A[5 * p] * A[5 * p]
            off += dot(at(A, 4 * p), at(A, 4 * p), p)
        if off <= 1e-34 * diagonal:
            break
        for p in range(3):
            for q in range(p + 1, 4):
                if A[4 * p + q] == 0:
                    continue
                theta = (A[5 * q] - A[5 * p]) / (2 * A[4 * p + q])
                t = (1.0 if theta >= 0 else -1.0) / (abs(theta) + math.sqrt(theta * theta + 1))
                c = 1 / math.sqrt(t * t + 1)
                turn(at(A, p), at(A, q), 4, c, t * c)
                turn(at(A, 4 * p), at(A, 4 * q), 1, c, t * c)
                turn(at(V, 4 * p), at(V, 4 * q), 1, c, t * c)
    best = 0
    for p in range(1, 4):
        if A[5 * p] > A[5 * best]:
            best = p
    return best


@entry(void(_rows, _rows, f8, _vector, _vector))
def _relative_rotation(xy_i, xy_j, threshold, q, room):
    N, bound, xy_j, q = len(xy_i), threshold * threshold, at(xy_j, 0), at(q, 0)
    R, best, before, after = at(room, 0), at(room, 9), at(room, 18), at(room, 27)
    A, V, M, a = at(room, 36), at(room, 52), at(room, 68), at(room, 77)
    b = at(a, 3 * N)
    rays(at(xy_i, 0), a, N)
    rays(xy_j, b, N)
    tried, least = min(HYPOTHESES, N), np.inf
    for h in range(tried):
        first = h * (N - 1) // (tried - 1)
        second = (first + max(N // 2, 1)) % N
        frame(at(a, 3 * first), at(a, 3 * second), before)
        frame(at(b, 3 * first), at(b, 3 * second), after)
        for i in range(3):
            for j in range(3):
                R[3 * i + j] = 0.0
                for k in range(3):
                    R[3 * i + j] += after[3 * k + i] * before[3 * k + j]
        total = 0.0
        for n in range(N):
            total += min(turn_error2(R, at(a, 3 * n), at(xy_j, 2 * n)), bound)
            if total >= least:
                break
        if total < least:
            least = total
            copy(R, best, 9)
    for _ in range(4):
        clear(M, 9)
        for n in range(N):
            x, y = at(a, 3 * n), at(b, 3 * n)
            if turn_error2(best, x, at(xy_j, 2 * n)) < bound:
                for i in range(3):
                    for j in range(3):
                        M[3 * i + j] += x[i] * y[j]
        # w x y z: without any ray, the turn is none
        A[0] = M[0] + M[4] + M[8]
        for i in range(3):
            j, k = (i + 1) % 3, (i + 2) % 3
            A[1 + i] = A[4 + 4 * i] = M[3 * j + k] - M[3 * k + j]
            A[5 * i + 5] = M[4 * i] - M[4 * j] - M[4 * k]
            A[4 * j + k + 5] = A[4 * k + j + 5] = M[3 * j + k] + M[3 * k + j]
        v = at(V, 4 * largest_eigenvector(A, V))
        sign = -1.0 if v[0] < 0 else 1.0
        q[0], q[1], q[2], q[3] = sign * v[1], sign * v[2], sign * v[3], sign * v[0]
        rotations(q, 1, best)


def relative_rotation(xy_i, xy_j, threshold):
    """
    Return the quaternion x y z w of two_view.py's ``relative_rotation`` of two points or more.

    It is refined by Horn's (1987) quaternions, whose optimum is Kabsch's.
    """
    q = np.empty(4)
    _relative_rotation(xy_i, xy_j, threshold, q, np.empty(77 + 6 * len(xy_i)))
    return q
