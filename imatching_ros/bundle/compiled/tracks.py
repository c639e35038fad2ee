"""
The tracks of a window: which rows observe them, where they are, and which of it can be trusted.

It is what observations.py, geometry/triangulation.py and solve.py say in torch, track by track.
Rows of a problem are sorted by landmark and then by pose: pose and landmark (O,), indices of poses
T (K, 7) and points (L, 3), NaN where there is none, and xy (O, 2) on the plane z = 1.
"""

from __future__ import annotations

import math

import numpy as np

from .images import distance, turned
from ..solver.compiled.poses import copy, dot
from ...jit import at, b1, entry, F8, f8, I8, i8, inner, void

_vector, _rows, _indices, _mask = f8[::1], f8[:, ::1], i8[::1], b1[::1]


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
    """Return what observations.py's ``_arranged`` does. order: the rows, by track."""
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
    """Write the point of triangulation.intersect, of so many views in three sweeps, or NaN."""
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
