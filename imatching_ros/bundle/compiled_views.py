"""
Small, frequent work on single images and tracks, compiled for the CPU.

The same as registration.py, observations.py, solve.py and geometry/triangulation.py say in torch,
whose every operation on a few hundred numbers costs more than the arithmetic.
"""

from __future__ import annotations

import math

import numpy as np

from .solver.compiled.linearise import CAUCHY, GEMAN_MCCLURE, HUBER
from .solver.compiled.poses import clear, copy, dot, retract, rotations
from .solver.problem import BEHIND_PX, MIN_DEPTH
from ..geometry.two_view import HYPOTHESES
from ..jit import at, b1, entry, F8, f8, I8, i8, inner, void

_vector, _rows, _indices, _mask = f8[::1], f8[:, ::1], i8[::1], b1[::1]


@inner(void(F8, i8, F8))
def turned(T, K, R):
    """Write to R (K, 9) the rotations of poses (K, 7)."""
    for k in range(K):
        rotations(at(T, 7 * k + 3), 1, at(R, 9 * k))


# One image against known landmarks: registration.py ----------------------------------------------


@inner(b1(F8, F8, f8, F8, F8))
def solve6(H, g, damping, step, L):
    """Return the damped step, by Cholesky; whether the matrix is definite. L: (6, 6), room."""
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
    """Return the cost; fills H (6, 6), the lower triangle, and g (6,)."""
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
    """registration.py's ``refine``: T (7,)."""
    T = T.copy()
    _refine(T, points, xy, cov, fx, fy, kernel, scale, iterations, np.empty(140))
    return T


@inner(f8(F8, F8, F8, F8, f8, f8))
def distance(R, c, p, xy, fx, fy):
    """Pixels between a point's image and where it is seen; infinite behind the camera."""
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


# Two images: geometry/two_view.py ----------------------------------------------------------------


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
    for j in range(3):
        k, m = (j + 1) % 3, (j + 2) % 3
        c[j] = a[k] * b[m] - a[m] * b[k]


@inner(f8(F8, F8, F8))
def turn_error2(R, a, xy):
    """
    Squared distance on the plane z = 1 of a turned ray from where it is seen.

    Infinite behind.
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
    two_view.py's ``relative_rotation`` of two points or more: the quaternion x y z w.

    Refined by Horn's (1987) quaternions, whose optimum is Kabsch's.
    """
    q = np.empty(4)
    _relative_rotation(xy_i, xy_j, threshold, q, np.empty(77 + 6 * len(xy_i)))
    return q


# Tracks of a window: solve.py. Rows are those of a problem, sorted by landmark and then by pose. -


@entry(i8(_rows, _rows, _mask, _indices, _indices, _rows, f8, f8, f8, f8, _mask, _vector))
def _survivors(
    T, points, usable, pose, landmark, xy, fx, fy, prune_px, cosine, keep, room
):
    K, total, alive, end = len(T), len(pose), 0, 0
    T, points, xy, pose, landmark = (
        at(T, 0), at(points, 0), at(xy, 0), at(pose, 0), at(landmark, 0),
    )
    R, ray = at(room, 3 * total), at(room, 0)
    turned(T, K, R)
    while end < total:
        begin, m, n, wide = end, landmark[end], 0, False
        while end < total and landmark[end] == m:
            k, p = pose[end], at(points, 3 * m)
            c = at(T, 7 * k)
            keep[end] = usable[m] and (
                distance(at(R, 9 * k), c, p, at(xy, 2 * end), fx, fy) < prune_px
            )
            if keep[end]:
                new = at(ray, 3 * n)
                for j in range(3):
                    new[j] = p[j] - c[j]
                size = math.sqrt(dot(new, new, 3))
                for j in range(3):
                    new[j] /= size
                for i in range(n):
                    if wide:
                        break
                    wide = dot(at(ray, 3 * i), new, 3) < cosine
                n += 1
            end += 1
        if wide:
            alive += 1
        else:
            for o in range(begin, end):
                keep[o] = False
    return alive


def survivors(T, points, usable, pose, landmark, xy, fx, fy, prune_px, cosine):
    """
    Return observations (O,) bool that reproject well, and of how many landmarks these are.

    They are of usable landmarks that have two of them with rays at least so far apart.
    """
    keep, room = np.empty(len(pose), np.bool_), np.empty(3 * len(pose) + 9 * len(T))
    alive = _survivors(
        T, points, usable, pose, landmark, xy, fx, fy, prune_px, cosine, keep, room
    )
    return keep, alive


@entry(i8(*[_indices] * 4, _rows, _rows, _mask, _indices, _mask, _indices))
def _arranged(order, track, stamp, ref_stamp, xy, cov, valid, rows, begun, image):
    total, end, count = len(track), 0, 0
    order, track, stamp, ref_stamp = at(order, 0), at(track, 0), at(stamp, 0), at(ref_stamp, 0)
    rows, image = at(rows, 0), at(image, 0)
    while end < total:
        begin, first = end, count
        while end < total and track[order[end]] == track[order[begin]]:
            n = order[end]
            end += 1
            mean, v = at(xy, 2 * n), at(cov, 3 * n)
            finite = math.isfinite(mean[0] + mean[1] + v[0] + v[1] + v[2])
            if finite and v[0] > 0 and v[0] * v[2] > v[1] * v[1]:
                rows[count], begun[count], image[count] = n, False, stamp[n]
                count += 1
        for i in range(begin, end):
            n, known = order[i], not valid[order[i]]
            for j in range(begin, end):
                known = known or stamp[order[j]] == ref_stamp[n]
            for j in range(first, count):
                known = known or (begun[j] and image[j] == ref_stamp[n])
            if not known:
                rows[count], begun[count], image[count] = n, True, ref_stamp[n]
                count += 1
        for i in range(first + 1, count):  # by image; equal ones stay in order
            j, n, began, when = i, rows[i], begun[i], image[i]
            while j > first and image[j - 1] > when:
                rows[j], begun[j], image[j] = rows[j - 1], begun[j - 1], image[j - 1]
                j -= 1
            rows[j], begun[j], image[j] = n, began, when
    return count


def arranged(order, track, stamp, ref_stamp, xy, cov, valid):
    """observations.py's ``_arranged``, track by track. order: the rows, by track."""
    rows, image = np.empty((2, 2 * len(track)), np.int64)
    begun = np.empty(2 * len(track), np.bool_)
    count = _arranged(order, track, stamp, ref_stamp, xy, cov, valid, rows, begun, image)
    return rows[:count].copy(), begun[:count].copy()


@inner(i8(F8, F8, F8, i8, f8, I8))
def agreement(p, view, axes, n, threshold, agree):
    """Write which of n views see a point in front and close to where it is; return how many."""
    count = 0
    for i in range(n):
        v, R = at(view, 5 * i), at(axes, 9 * i)
        x, y, z = p[0] - v[0], p[1] - v[1], p[2] - v[2]
        Z = R[2] * x + R[5] * y + R[8] * z
        u = R[0] * x + R[3] * y + R[6] * z - v[3] * Z
        w = R[1] * x + R[4] * y + R[7] * z - v[4] * Z
        agree[count] = i
        count += (Z > 0) & (u * u + w * w < (threshold * Z) ** 2)
    return count


@inner(void(F8, F8, I8, i8, F8))
def intersect(view, ray, which, count, found):
    """triangulation.intersect of so many views, with its three sweeps, or NaN."""
    ox, oy, oz = 0.0, 0.0, 0.0
    for i in range(count):
        v = at(view, 5 * which[i])
        ox, oy, oz = ox + v[0], oy + v[1], oz + v[2]
    for j in range(3):
        found[j] = np.nan
    if count < 2:
        return
    ox, oy, oz = ox / count, oy / count, oz / count
    px, py, pz = 0.0, 0.0, 0.0
    for sweep in range(3):
        xx, xy, xz, yy, yz, zz, b0, b1, b2 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        for i in range(count):
            v, r, w = at(view, 5 * which[i]), at(ray, 3 * which[i]), 1.0
            x, y, z, a, b, c = v[0] - ox, v[1] - oy, v[2] - oz, r[0], r[1], r[2]
            if sweep > 0:
                w = 1 / max((px - x) ** 2 + (py - y) ** 2 + (pz - z) ** 2, 1e-12)
            along = a * x + b * y + c * z
            xx += w * (1 - a * a)
            xy -= w * a * b
            xz -= w * a * c
            yy += w * (1 - b * b)
            yz -= w * b * c
            zz += w * (1 - c * c)
            b0 += w * (x - a * along)
            b1 += w * (y - b * along)
            b2 += w * (z - c * along)
        u, v, t = yy * zz - yz * yz, xz * yz - xy * zz, xy * yz - xz * yy
        determinant = xx * u + xy * v + xz * t
        if not determinant > 1e-12 * ((xx + yy + zz) / 3) ** 3:
            return
        q, r, s = xx * zz - xz * xz, xy * xz - xx * yz, xx * yy - xy * xy
        px, py = (u * b0 + v * b1 + t * b2) / determinant, (v * b0 + q * b1 + r * b2) / determinant
        pz = (t * b0 + r * b1 + s * b2) / determinant
    found[0], found[1], found[2] = px + ox, py + oy, pz + oz


@entry(void(_rows, _rows, _indices, _indices, _rows, f8, _vector, _indices))
def _triangulate(T, points, pose, landmark, xy, threshold, room, which):
    total, K, end = len(pose), len(T), 0
    T, points, pose, landmark, xy = (
        at(T, 0), at(points, 0), at(pose, 0), at(landmark, 0), at(xy, 0),
    )
    view, ray, axes = at(room, 0), at(room, 5 * total), at(room, 8 * total)
    R, best = at(room, 17 * total), at(room, 17 * total + 9 * K)
    point = at(best, 3)
    agree, trial, pair = at(which, 0), at(which, total), at(which, 2 * total)
    turned(T, K, R)
    while end < total:
        m, n = landmark[end], 0
        while end < total and landmark[end] == m:
            k, x, y = pose[end], xy[2 * end], xy[2 * end + 1]
            end += 1
            if end < total and landmark[end] == m and pose[end] == k:
                continue
            R_k, v, r = at(R, 9 * k), at(view, 5 * n), at(ray, 3 * n)
            size = math.sqrt(x * x + y * y + 1)
            for j in range(3):
                v[j] = T[7 * k + j]
                r[j] = (R_k[3 * j] * x + R_k[3 * j + 1] * y + R_k[3 * j + 2]) / size
            v[3], v[4] = x, y
            copy(R_k, at(axes, 9 * n), 9)
            n += 1
        here = at(points, 3 * m)
        known = agreement(here, view, axes, n, threshold, agree)
        if n < 2 or known == n:
            continue
        for i in range(n):
            agree[i] = i
        intersect(view, ray, agree, n, best)
        most = agreement(best, view, axes, n, threshold, agree)
        if most < n and n > 2:
            # Pairs of views: each with the next, with the one a third and the one half of the
            # track further.
            pairs = -1
            for fraction in range(3):
                stride = max(n // (4 - fraction), 1) if fraction else 1
                for i in range(n):
                    pair[0], pair[1] = i, (i + stride) % n
                    intersect(view, ray, pair, 2, point)
                    count = agreement(point, view, axes, n, threshold, trial)
                    if count > pairs:
                        pairs = count
                        copy(point, at(best, 6), 3)
            if pairs >= most:
                copy(at(best, 6), best, 3)
            most = agreement(best, view, axes, n, threshold, agree)
            intersect(view, ray, agree, most, point)
            count = agreement(point, view, axes, n, threshold, trial)
            if count >= most:
                most = count
                copy(point, best, 3)
        if most > known:
            for j in range(3):
                here[j] = best[j] if most >= 2 else np.nan


def triangulate(T, points, pose, landmark, xy, threshold):
    """
    Return the points (L, 3).

    Those with which not every view agrees are triangulated afresh where that finds more views
    (triangulation.triangulate_robust). Of several rows of a landmark in one pose the last one
    counts.
    """
    points, total = points.copy(), len(pose)
    room, which = np.empty(17 * total + 9 * len(T) + 9), np.empty(2 * total + 2, np.int64)
    _triangulate(T, points, pose, landmark, xy, threshold, room, which)
    return points
