"""
Small, frequent work on single images and tracks, compiled for the CPU.

The same as registration.py, observations.py, solve.py and geometry/triangulation.py say in torch,
whose every operation on a few hundred numbers costs more than the arithmetic.
"""

from __future__ import annotations

import math

from imatching_ros.bundle.compiled import (
    CAUCHY,
    GEMAN_MCCLURE,
    HUBER,
    minimise,
    retract,
    rotations,
)
from imatching_ros.bundle.problem import BEHIND_PX, MIN_DEPTH
from imatching_ros.geometry.two_view import HYPOTHESES
from numba import njit, types
import numpy as np

# As in compiled.py.
_compiled = njit(cache=True, fastmath={'reassoc', 'contract', 'arcp', 'nsz'}, error_model='numpy')
_f8, _i8, _b1 = types.float64, types.int64, types.boolean
_vector, _rows, _indices, _mask = _f8[::1], _f8[:, ::1], _i8[::1], _b1[::1]


def _entry(signature):
    """Compiled when this module is imported, not when the first image waits for it."""
    return njit(signature, cache=True, error_model='numpy', nogil=True)


# One image against known landmarks: registration.py ----------------------------------------------


@_compiled
def solve6(H, g, damping, step):
    """Return the damped step, by Cholesky; whether the matrix is definite."""
    L = np.empty((6, 6))
    for i in range(6):
        for j in range(i + 1):
            x = H[i, j] + (damping * (H[i, i] + 1e-12) if i == j else 0.0)
            for k in range(j):
                x -= L[i, k] * L[j, k]
            if i > j:
                L[i, j] = x / L[j, j]
            elif x > 0:
                L[i, i] = math.sqrt(x)
            else:
                return False
        x = -g[i]
        for k in range(i):
            x -= L[i, k] * step[k]
        step[i] = x / L[i, i]
    for i in range(5, -1, -1):
        for k in range(i + 1, 6):
            step[i] -= L[k, i] * step[k]
        step[i] /= L[i, i]
    return True


@_compiled
def normal_equations(q, c, points, xy, cov, fx, fy, kernel, scale, H, g):
    """Return the cost; fills H (6, 6) and g (6,)."""
    R, c2, cost = rotations(q)[0], scale * scale, 0.0
    H[:], g[:] = 0.0, 0.0
    Jx, Jy = np.empty(6), np.empty(6)
    for n in range(len(points)):
        dx, dy, dz = points[n, 0] - c[0, 0], points[n, 1] - c[0, 1], points[n, 2] - c[0, 2]
        Z = R[2] * dx + R[5] * dy + R[8] * dz
        s, w, xx, uv, yy, gx, gy = BEHIND_PX**2, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        front = Z > MIN_DEPTH
        if front:
            u = (R[0] * dx + R[3] * dy + R[6] * dz) / Z
            v = (R[1] * dx + R[4] * dy + R[7] * dz) / Z
            determinant = cov[n, 0] * cov[n, 2] - cov[n, 1] * cov[n, 1]
            xx, uv, yy = cov[n, 2] / determinant, -cov[n, 1] / determinant, cov[n, 0] / determinant
            ex, ey = (u - xy[n, 0]) * fx, (v - xy[n, 1]) * fy
            gx, gy = xx * ex + uv * ey, uv * ex + yy * ey
            s = ex * gx + ey * gy
        if kernel == HUBER:
            cost += s if s <= c2 else 2 * scale * math.sqrt(s) - c2
            w = scale / math.sqrt(max(s, c2))
        elif kernel == CAUCHY:
            cost += c2 * math.log1p(s / c2)
            w = c2 / (c2 + s)
        elif kernel == GEMAN_MCCLURE:
            cost += c2 * s / (c2 + s)
            w = (c2 / (c2 + s)) ** 2
        else:
            cost += s
            w = 1.0
        if not front:
            continue
        a, b = fx / Z, fy / Z
        ax, ay, az = a * (R[0] - u * R[2]), a * (R[3] - u * R[5]), a * (R[6] - u * R[8])
        bx, by, bz = b * (R[1] - v * R[2]), b * (R[4] - v * R[5]), b * (R[7] - v * R[8])
        Jx[0], Jx[1], Jx[2] = -ax, -ay, -az
        Jx[3], Jx[4], Jx[5] = ay * dz - az * dy, az * dx - ax * dz, ax * dy - ay * dx
        Jy[0], Jy[1], Jy[2] = -bx, -by, -bz
        Jy[3], Jy[4], Jy[5] = by * dz - bz * dy, bz * dx - bx * dz, bx * dy - by * dx
        for i in range(6):
            jx, jy = w * (xx * Jx[i] + uv * Jy[i]), w * (uv * Jx[i] + yy * Jy[i])
            g[i] += w * (gx * Jx[i] + gy * Jy[i])
            for j in range(i + 1):
                H[i, j] += jx * Jx[j] + jy * Jy[j]
    for i in range(6):
        for j in range(i):
            H[j, i] = H[i, j]
    return 0.5 * cost


@_entry(_vector(_vector, _rows, _rows, _rows, _f8, _f8, _i8, _f8, _i8))
def refine(T, points, xy, cov, fx, fy, kernel, scale, iterations):
    """registration.py's ``refine``: T (7,)."""
    q, c = T[3:].copy().reshape(1, 4), T[:3].copy().reshape(1, 3)
    q_new, c_new, held, damping = q.copy(), c.copy(), np.zeros(1, np.bool_), 1e-4
    H, g, H_new, g_new = np.empty((6, 6)), np.empty(6), np.empty((6, 6)), np.empty(6)
    step = np.empty((1, 6))
    cost = normal_equations(q, c, points, xy, cov, fx, fy, kernel, scale, H, g)
    for _ in range(iterations):
        cost_new = np.inf
        if solve6(H, g, damping, step[0]):
            retract(q, c, step, held, q_new, c_new)
            cost_new = normal_equations(
                q_new, c_new, points, xy, cov, fx, fy, kernel, scale, H_new, g_new
            )
        if cost_new < cost:
            done = cost - cost_new < 1e-6 * cost
            q, c, q_new, c_new, H, g, H_new, g_new = q_new, c_new, q, c, H_new, g_new, H, g
            cost, damping = cost_new, damping * 0.1
            if done:
                break
        else:
            damping *= 10
            if damping > 1e3:
                break
    return np.concatenate((c[0], q[0]))


@_compiled
def distance(R, c, p, xy, fx, fy):
    """Pixels between a point's image and where it is seen; infinite behind the camera."""
    x, y, z = p[0] - c[0], p[1] - c[1], p[2] - c[2]
    Z = R[2] * x + R[5] * y + R[8] * z
    if not Z > MIN_DEPTH:
        return np.inf
    ex = ((R[0] * x + R[3] * y + R[6] * z) / Z - xy[0]) * fx
    ey = ((R[1] * x + R[4] * y + R[7] * z) / Z - xy[1]) * fy
    return math.sqrt(ex * ex + ey * ey)


@_entry(_mask(_vector, _rows, _rows, _f8, _f8, _f8))
def agreeing(T, points, xy, fx, fy, inlier_px):
    """Say which points (N,) lie in front of a camera and within ``inlier_px`` of their image."""
    R, good = rotations(T[3:].copy().reshape(1, 4))[0], np.empty(len(points), np.bool_)
    for n in range(len(points)):
        good[n] = distance(R, T, points[n], xy[n], fx, fy) < inlier_px
    return good


# Two images: geometry/two_view.py ----------------------------------------------------------------


@_compiled
def frame(a, b):
    """Return an orthonormal frame, its axes as rows, built on two directions."""
    x, z, y = np.empty(3), np.empty(3), np.empty(3)
    for j in range(3):
        x[j] = a[j] + b[j]
    cross(a, b, z)
    for v in (x, z):
        size = max(math.sqrt(v[0] * v[0] + v[1] * v[1] + v[2] * v[2]), 1e-12)
        for j in range(3):
            v[j] /= size
    cross(z, x, y)
    return x, y, z


@_compiled
def cross(a, b, c):
    c[0], c[1], c[2] = (
        a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0],
    )


@_compiled
def turn_error2(R, a, xy):
    """
    Squared distance on the plane z = 1 of a turned ray from where it is seen.

    Infinite behind.
    """
    Z = R[6] * a[0] + R[7] * a[1] + R[8] * a[2]
    if Z <= 0:
        return np.inf
    Z = max(Z, 1e-6)
    x = (R[0] * a[0] + R[1] * a[1] + R[2] * a[2]) / Z - xy[0]
    y = (R[3] * a[0] + R[4] * a[1] + R[5] * a[2]) / Z - xy[1]
    return x * x + y * y


@_compiled
def largest_eigenvector(A):
    """Of a symmetric matrix (4, 4), which is overwritten: Jacobi's rotations."""
    V = np.eye(4)
    for _ in range(30):
        off, diagonal = 0.0, 0.0
        for p in range(4):
            diagonal += A[p, p] ** 2
            for q in range(p):
                off += A[p, q] ** 2
        if off <= 1e-34 * diagonal:
            break
        for p in range(3):
            for q in range(p + 1, 4):
                if A[p, q] == 0:
                    continue
                theta = (A[q, q] - A[p, p]) / (2 * A[p, q])
                t = (1.0 if theta >= 0 else -1.0) / (abs(theta) + math.sqrt(theta * theta + 1))
                c = 1 / math.sqrt(t * t + 1)
                for k in range(4):
                    x, y = A[k, p], A[k, q]
                    A[k, p], A[k, q] = c * x - t * c * y, t * c * x + c * y
                for k in range(4):
                    x, y = A[p, k], A[q, k]
                    A[p, k], A[q, k] = c * x - t * c * y, t * c * x + c * y
                    x, y = V[k, p], V[k, q]
                    V[k, p], V[k, q] = c * x - t * c * y, t * c * x + c * y
    best = 0
    for p in range(1, 4):
        if A[p, p] > A[best, best]:
            best = p
    return V[:, best].copy()


@_entry(_vector(_rows, _rows, _f8))
def relative_rotation(xy_i, xy_j, threshold):
    """
    two_view.py's ``relative_rotation`` of two points or more: the quaternion x y z w.

    Refined by Horn's (1987) quaternions, whose optimum is Kabsch's.
    """
    N, bound = len(xy_i), threshold * threshold
    a, b = np.empty((N, 3)), np.empty((N, 3))
    for rays, xy in ((a, xy_i), (b, xy_j)):
        for n in range(N):
            size = math.sqrt(xy[n, 0] ** 2 + xy[n, 1] ** 2 + 1)
            rays[n, 0], rays[n, 1], rays[n, 2] = xy[n, 0] / size, xy[n, 1] / size, 1 / size
    tried, least = min(HYPOTHESES, N), np.inf
    R, best = np.empty(9), np.empty(9)
    for h in range(tried):
        first = h * (N - 1) // (tried - 1)
        second = (first + max(N // 2, 1)) % N
        before, after = frame(a[first], a[second]), frame(b[first], b[second])
        for i in range(3):
            for j in range(3):
                R[3 * i + j] = (
                    after[0][i] * before[0][j]
                    + after[1][i] * before[1][j]
                    + after[2][i] * before[2][j]
                )
        total = 0.0
        for n in range(N):
            total += min(turn_error2(R, a[n], xy_j[n]), bound)
            if total >= least:
                break
        if total < least:
            least = total
            best[:] = R
    q = np.zeros(4)
    A, M = np.empty((4, 4)), np.empty((3, 3))
    for _ in range(4):
        M[:] = 0.0
        for n in range(N):
            if turn_error2(best, a[n], xy_j[n]) < bound:
                for i in range(3):
                    for j in range(3):
                        M[i, j] += a[n, i] * b[n, j]
        # w x y z: without any ray, the turn is none
        A[0, 0], A[0, 1], A[0, 2] = (
            M[0, 0] + M[1, 1] + M[2, 2],
            M[1, 2] - M[2, 1],
            M[2, 0] - M[0, 2],
        )
        A[0, 3], A[1, 1], A[1, 2] = (
            M[0, 1] - M[1, 0],
            M[0, 0] - M[1, 1] - M[2, 2],
            M[0, 1] + M[1, 0],
        )
        A[1, 3], A[2, 2], A[2, 3] = (
            M[2, 0] + M[0, 2],
            M[1, 1] - M[0, 0] - M[2, 2],
            M[1, 2] + M[2, 1],
        )
        A[3, 3] = M[2, 2] - M[0, 0] - M[1, 1]
        for i in range(4):
            for j in range(i):
                A[i, j] = A[j, i]
        v = largest_eigenvector(A)
        sign = -1.0 if v[0] < 0 else 1.0
        q[0], q[1], q[2], q[3] = sign * v[1], sign * v[2], sign * v[3], sign * v[0]
        best[:] = rotations(q.reshape(1, 4))[0]
    return q


# Tracks of a window: solve.py. Rows are those of a problem, sorted by landmark and then by pose. -


@_entry(
    types.Tuple((_mask, _i8))(_rows, _rows, _mask, _indices, _indices, _rows, _f8, _f8, _f8, _f8)
)
def survivors(T, points, usable, pose, landmark, xy, fx, fy, prune_px, cosine):
    """
    Observations (O,) bool that reproject well.

    Of usable landmarks that have two of them with rays at least so far apart; and how many
    landmarks these are.
    """
    total, R, keep, alive = len(pose), rotations(T[:, 3:].copy()), np.zeros(len(pose), np.bool_), 0
    ray, end = np.empty((total, 3)), 0
    while end < total:
        begin, m, n, wide = end, landmark[end], 0, False
        while end < total and landmark[end] == m:
            k = pose[end]
            if usable[m] and distance(R[k], T[k], points[m], xy[end], fx, fy) < prune_px:
                keep[end] = True
                x, y, z = points[m, 0] - T[k, 0], points[m, 1] - T[k, 1], points[m, 2] - T[k, 2]
                size = math.sqrt(x * x + y * y + z * z)
                x, y, z = x / size, y / size, z / size
                for i in range(n):
                    wide = wide or ray[i, 0] * x + ray[i, 1] * y + ray[i, 2] * z < cosine
                    if wide:
                        break
                ray[n, 0], ray[n, 1], ray[n, 2] = x, y, z
                n += 1
            end += 1
        if wide:
            alive += 1
        else:
            keep[begin:end] = False
    return keep, alive


@_entry(types.Tuple((_indices, _vector))(_rows, _rows, _indices, _indices, _rows, _f8, _f8))
def errors(T, points, pose, landmark, xy, fx, fy):
    """solve.py's ``_errors``: observations (L,), and the sum of their squared residuals."""
    R = rotations(T[:, 3:].copy())
    count, total = np.zeros(len(points), np.int64), np.zeros(len(points))
    for o in range(len(pose)):
        m, k = landmark[o], pose[o]
        count[m] += 1
        total[m] += distance(R[k], T[k], points[m], xy[o], fx, fy) ** 2
    return count, total


@_entry(
    types.Tuple((_indices, _mask))(_indices, _indices, _indices, _indices, _rows, _rows, _mask)
)
def arranged(order, track, stamp, ref_stamp, xy, cov, valid):
    """observations.py's ``_arranged``, track by track. order: the rows, by track."""
    total, end, count = len(track), 0, 0
    rows, begun = np.empty(2 * total, np.int64), np.empty(2 * total, np.bool_)
    image = np.empty(2 * total, np.int64)
    while end < total:
        begin, first = end, count
        while end < total and track[order[end]] == track[order[begin]]:
            n = order[end]
            end += 1
            uu, uv, vv = cov[n, 0], cov[n, 1], cov[n, 2]
            if np.isfinite(xy[n, 0] + xy[n, 1] + uu + uv + vv) and uu > 0 and uu * vv > uv * uv:
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
    return rows[:count].copy(), begun[:count].copy()


@_entry(types.Tuple((_indices, _indices, _rows, _rows))(_mask, _indices, _indices, _rows, _rows))
def select(keep, pose, landmark, xy, cov):
    """Problem.select's columns."""
    rows = np.flatnonzero(keep)
    return pose[rows], landmark[rows], xy[rows], cov[rows]


@_compiled
def agreement(p, view, axes, n, threshold, agree):
    """How many of n views see a point in front and close to where it is; fills which."""
    count = 0
    for i in range(n):
        x, y, z, R = p[0] - view[i, 0], p[1] - view[i, 1], p[2] - view[i, 2], axes[i]
        X, Y = R[0] * x + R[3] * y + R[6] * z, R[1] * x + R[4] * y + R[7] * z
        Z = R[2] * x + R[5] * y + R[8] * z
        agree[i] = (
            Z > 0 and (X - view[i, 3] * Z) ** 2 + (Y - view[i, 4] * Z) ** 2 < (threshold * Z) ** 2
        )
        count += agree[i]
    return count


@_compiled
def intersect(view, ray, mask, n):
    """triangulation.intersect of the views in the mask, with its three sweeps."""
    nowhere = (np.nan, np.nan, np.nan)
    count, ox, oy, oz = 0, 0.0, 0.0, 0.0
    for i in range(n):
        if mask[i]:
            count, ox, oy, oz = count + 1, ox + view[i, 0], oy + view[i, 1], oz + view[i, 2]
    if count < 2:
        return nowhere
    ox, oy, oz = ox / count, oy / count, oz / count
    px, py, pz = 0.0, 0.0, 0.0
    for sweep in range(3):
        xx, xy, xz, yy, yz, zz, b0, b1, b2 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        for i in range(n):
            if not mask[i]:
                continue
            x, y, z, a, b, c = (
                view[i, 0] - ox,
                view[i, 1] - oy,
                view[i, 2] - oz,
                ray[i, 0],
                ray[i, 1],
                ray[i, 2],
            )
            w = 1.0
            if sweep > 0:
                w = 1 / max((px - x) ** 2 + (py - y) ** 2 + (pz - z) ** 2, 1e-12)
            along = a * x + b * y + c * z
            xx, xy, xz = xx + w * (1 - a * a), xy - w * a * b, xz - w * a * c
            yy, yz, zz = yy + w * (1 - b * b), yz - w * b * c, zz + w * (1 - c * c)
            b0, b1, b2 = (
                b0 + w * (x - a * along), b1 + w * (y - b * along), b2 + w * (z - c * along),
            )
        u, v, t = yy * zz - yz * yz, xz * yz - xy * zz, xy * yz - xz * yy
        determinant = xx * u + xy * v + xz * t
        if not determinant > 1e-12 * ((xx + yy + zz) / 3) ** 3:
            return nowhere
        q, r, s = xx * zz - xz * xz, xy * xz - xx * yz, xx * yy - xy * xy
        px, py = (u * b0 + v * b1 + t * b2) / determinant, (v * b0 + q * b1 + r * b2) / determinant
        pz = (t * b0 + r * b1 + s * b2) / determinant
    return px + ox, py + oy, pz + oz


@_entry(_rows(_rows, _rows, _indices, _indices, _rows, _f8))
def triangulate(T, points, pose, landmark, xy, threshold):
    """
    Return the points (L, 3).

    Those with which not every view agrees triangulated afresh where that finds more views
    (triangulation.triangulate_robust). Of several rows of a landmark in one pose the last one
    counts.
    """
    total, R, points = len(pose), rotations(T[:, 3:].copy()), points.copy()
    view, ray = np.empty((total, 5)), np.empty((total, 3))  # centre, x, y; and the direction
    axes = np.empty((total, 9))
    agree, trial, chosen = (
        np.empty(total, np.bool_), np.empty(total, np.bool_), np.empty(total, np.bool_),
    )
    end = 0
    while end < total:
        m, n = landmark[end], 0
        while end < total and landmark[end] == m:
            k = pose[end]
            end += 1
            if end < total and landmark[end] == m and pose[end] == k:
                continue
            x, y = xy[end - 1, 0], xy[end - 1, 1]
            size = math.sqrt(x * x + y * y + 1)
            for j in range(3):
                view[n, j] = T[k, j]
                ray[n, j] = (R[k, 3 * j] * x + R[k, 3 * j + 1] * y + R[k, 3 * j + 2]) / size
            view[n, 3], view[n, 4], axes[n] = x, y, R[k]
            n += 1
        if n < 2:
            continue
        here = (points[m, 0], points[m, 1], points[m, 2])
        known = agreement(here, view, axes, n, threshold, agree)
        if known == n:
            continue
        agree[:n] = True
        best = intersect(view, ray, agree, n)
        most = agreement(best, view, axes, n, threshold, agree)
        if most < n and n > 2:
            # Pairs of views: each with the next, with the one a third and the one half of the
            # track further.
            pairs, pair_agree = -1, 0
            pair = best
            for stride in (1, max(n // 3, 1), max(n // 2, 1)):
                for i in range(n):
                    trial[:n] = False
                    trial[i] = trial[(i + stride) % n] = True
                    point = intersect(view, ray, trial, n)
                    pair_agree = agreement(point, view, axes, n, threshold, trial)
                    if pair_agree > pairs:
                        pairs, pair = pair_agree, point
                        chosen[:n] = trial[:n]
            if pairs >= most:
                best, most = pair, pairs
                agree[:n] = chosen[:n]
            fitted = intersect(view, ray, agree, n)
            refitted = agreement(fitted, view, axes, n, threshold, trial)
            if refitted >= most:
                best, most = fitted, refitted
        if most > known:
            points[m] = np.nan
            if most >= 2:
                points[m, 0], points[m, 1], points[m, 2] = best
    return points


@_compiled
def sound(points, dropped):
    return ~dropped & np.isfinite(points[:, 0] + points[:, 1] + points[:, 2])


@_entry(_b1[:, ::1](_rows, _b1))
def free_parameters(T, held):
    """adjust.py's ``free_parameters`` as a mask (K, 6): the first pose is held, or all are."""
    free = np.full((len(T), 6), not held)
    free[0] = False
    farthest, component, most = 0, 0, 0.0
    for k in range(len(T)):
        offset = T[k, :3] - T[0, :3]
        length = offset[0] * offset[0] + offset[1] * offset[1] + offset[2] * offset[2]
        if length > most:
            farthest, component, most = k, np.abs(offset).argmax(), length
    free[farthest, component] = False
    return free


@_entry(
    types.Tuple((_b1, _rows, _rows, _mask, _i8, _f8, _f8, _f8, _b1))(
        _rows, _rows, _mask, _indices, _indices, _rows, _rows, _f8, _f8, _f8, _f8, _f8, _i8, _i8,
        _b1, _b1, _i8, _f8, _i8, _f8, _f8, _indices, _rows, _rows, _vector, _f8,
    )
)  # fmt: skip
def settle(
    T, points, dropped, pose, landmark, xy, cov, fx, fy, prune_px, reach, cosine, minimum, rounds,
    once, held, kernel, scale, max_iterations, relative_decrease, gradient, prior_pose, prior_T,
    prior_H, prior_g, prior_constant,
):  # fmt: skip
    """
    solve.py's ``_Solver.adjust``.

    Whether it came to an end, T, points, the observations kept, and what ``minimise`` says of the
    last round; ``dropped`` is changed. reach: ``prune_px`` on the plane z = 1.
    """
    points = triangulate(T, points, pose, landmark, xy, reach)
    kept, tight = np.zeros(len(pose), np.bool_), False
    said = 0, 0.0, 1.0, 1.0, False
    for turn in range(2 * rounds + 1):
        keep, alive = survivors(
            T, points, sound(points, dropped), pose, landmark, xy, fx, fy, prune_px, cosine
        )
        if turn > 0:
            changed = keep != kept
            settled = not changed.any()
            if once or (tight and settled):
                return True, T, points, kept, *said
            if turn > rounds:
                for o in np.flatnonzero(changed):
                    dropped[landmark[o]] = True
                keep, alive = survivors(
                    T, points, sound(points, dropped), pose, landmark, xy, fx, fy, prune_px, cosine
                )
            tight = tight or settled or turn >= 3
        if alive < minimum or turn == 2 * rounds:
            break
        kept = keep
        columns = select(kept, pose, landmark, xy, cov)
        T, points, iterations, cost, decrease, slope, converged = minimise(
            T, points, columns[0], columns[1], columns[2], columns[3], fx, fy,
            free_parameters(T, held), kernel, scale, max_iterations,
            relative_decrease if tight else max(1e-3, relative_decrease),
            gradient if tight else 1.0, prior_pose, prior_T, prior_H, prior_g, prior_constant,
        )  # fmt: skip
        said = iterations, cost, decrease, slope, converged
    return False, T, points, kept, *said
