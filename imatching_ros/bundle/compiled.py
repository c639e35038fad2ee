"""
The solver of adjust.py compiled for the CPU.

The same equations and the same decisions, landmarks side by side.

Observed landmarks are sorted by the keyframes they span and stand in blocks of ``LANES``, one per
SIMD lane. A block holds a *cell* for every pose that any of its landmarks is seen by, a cell one
*layer* per row that observes it; what is missing has no information. Sums run in a fixed order on
one thread, so that equal input gives equal bits.

State, residual, gradient, cost and Cholesky factors are float64. The Jacobian is rounded to
float32 before anything is made of it, so that the normal equations are exactly those of one
matrix; the elimination's products are float32, their sum float64. That costs a step about seven
digits, which the next step repairs.

Importing this module compiles it, once per machine: numba keeps the result beside the file or in
the user's cache.
"""

from __future__ import annotations

import math

from imatching_ros.bundle.problem import BEHIND_PX, MIN_DEPTH
from imatching_ros.bundle.robust import KERNELS
from numba import njit, types
import numpy as np

LANES = 64
CHUNK = 16  #: lanes; where two cells have none in common, their product is left out
HUBER, CAUCHY, GEMAN_MCCLURE = (
    KERNELS.index(name) for name in ('huber', 'cauchy', 'geman_mcclure')
)

# Rows of the flat scratch memory, LANES values each. One array with constant offsets: the compiler
# then sees that nothing overlaps, and vectorises.
N = LANES
DX, DY, DZ, U, V, INVERSE, FRONT = 0, N, 2 * N, 3 * N, 4 * N, 5 * N, 6 * N
EX, EY, GX, GY, S, WEIGHT, BEND = 7 * N, 8 * N, 9 * N, 10 * N, 11 * N, 12 * N, 13 * N
XX, XY, YY, BX, BY = 14 * N, 15 * N, 16 * N, 17 * N, 18 * N
W0, W1, W2, W3, W4, W5 = 19 * N, 20 * N, 21 * N, 22 * N, 23 * N, 24 * N
L00, L10, L11, L20, L21, L22 = 25 * N, 26 * N, 27 * N, 28 * N, 29 * N, 30 * N
Q0, Q1, Q2 = 31 * N, 32 * N, 33 * N
SCRATCH = 34 * N

# Not "nnan" or "ninf": comparisons with what is not finite must keep their meaning.
_compiled = njit(cache=True, fastmath={'reassoc', 'contract', 'arcp', 'nsz'}, error_model='numpy')


@_compiled
def layout(pose, landmark, poses, landmarks):
    """
    Return where every observation goes.

    Blocks of cells of layers, which chunks of its lanes a cell fills, and the envelope of the
    reduced system.
    """
    observations = len(pose)
    low, high = np.full(landmarks, poses), np.full(landmarks, -1)
    for o in range(observations):
        m = landmark[o]
        low[m], high[m] = min(low[m], pose[o]), max(high[m], pose[o])
    # Counting sort of the observed landmarks by first pose, two at a time, and last, these up and
    # down: neighbours see much the same.
    start = np.zeros(poses * poses + 1, np.int64)
    place = np.full(landmarks, -1)
    for m in range(landmarks):
        if high[m] >= 0:
            pair = low[m] // 2
            place[m] = pair * poses + (high[m] if pair % 2 else poses - 1 - high[m])
            start[place[m] + 1] += 1
    start = np.cumsum(start)
    total = start[-1]
    for m in range(landmarks):
        if place[m] >= 0:
            start[place[m]] += 1
            place[m] = start[place[m]] - 1
    blocks = (total + LANES - 1) // LANES
    order = np.full(blocks * LANES, -1)
    first_row = np.zeros(landmarks + 1, np.int64)
    for m in range(landmarks):
        if place[m] >= 0:
            order[place[m]] = m
    for o in range(observations):
        first_row[landmark[o] + 1] += 1
    first_row = np.cumsum(first_row)

    cell_of_block = np.zeros(blocks + 1, np.int64)
    most = min(observations, blocks * poses)
    cell_pose, layer_of_cell = np.zeros(most, np.int64), np.zeros(most + 1, np.int64)
    slot, lane = np.zeros(observations, np.int64), np.zeros(observations, np.int64)
    envelope = np.arange(poses)
    count = np.zeros((poses, LANES), np.int64)
    cells, layers = 0, 0
    chunks = np.zeros((most, 2), np.int64)
    base = np.zeros(poses, np.int64)
    for b in range(blocks):
        begin, end = poses, -1
        for i in range(LANES):
            m = order[b * LANES + i]
            if m < 0:
                continue
            begin, end = min(begin, low[m]), max(end, high[m])
            for o in range(first_row[m], first_row[m + 1]):
                k = pose[o]
                slot[o], lane[o] = count[k, i], i
                count[k, i] += 1
                envelope[k] = min(envelope[k], low[m])
        for k in range(begin, end + 1):
            deepest, left, right = 0, LANES, 0
            for i in range(LANES):
                if count[k, i] > 0:
                    left, right = min(left, i), i
                    deepest = max(deepest, count[k, i])
                    count[k, i] = 0
            if deepest:
                base[k] = layers
                cell_pose[cells] = k
                chunks[cells, 0], chunks[cells, 1] = left // CHUNK, right // CHUNK + 1
                layers += deepest
                cells += 1
                layer_of_cell[cells] = layers
        cell_of_block[b + 1] = cells
        for i in range(LANES):
            m = order[b * LANES + i]
            if m >= 0:
                for o in range(first_row[m], first_row[m + 1]):
                    slot[o] += base[pose[o]]
    return (
        order, cell_of_block, cell_pose[:cells], layer_of_cell[:cells + 1], chunks[:cells], slot,
        lane, envelope,
    )


@_compiled
def place_observations(slot, lane, layers, xy, cov):
    """
    (layers, 5 * LANES): x, y and the information's uu, uv, vv.

    All zero where nothing is observed.
    """
    rows = np.zeros((layers, 5 * LANES))
    for o in range(len(slot)):
        row, i = rows[slot[o]], lane[o]
        uu, uv, vv = cov[o, 0], cov[o, 1], cov[o, 2]
        determinant = uu * vv - uv * uv
        row[i], row[LANES + i] = xy[o, 0], xy[o, 1]
        row[2 * LANES + i], row[3 * LANES + i] = vv / determinant, -uv / determinant
        row[4 * LANES + i] = uu / determinant
    return rows


@_compiled
def place_points(points, order, origin):
    """(blocks, 3 * LANES), about the origin."""
    p = np.zeros((len(order) // LANES, 3 * LANES))
    for n in range(len(order)):
        if order[n] >= 0:
            for j in range(3):
                p[n // LANES, j * LANES + n % LANES] = points[order[n], j] - origin[j]
    return p


@_compiled
def rotations(q):
    """(K, 9), row by row."""
    R = np.empty((len(q), 9))
    for k in range(len(q)):
        size = math.sqrt(q[k, 0] ** 2 + q[k, 1] ** 2 + q[k, 2] ** 2 + q[k, 3] ** 2)
        x, y, z, w = q[k, 0] / size, q[k, 1] / size, q[k, 2] / size, q[k, 3] / size
        R[k, 0], R[k, 1], R[k, 2] = (
            1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w),
        )
        R[k, 3], R[k, 4], R[k, 5] = (
            2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w),
        )
        R[k, 6], R[k, 7], R[k, 8] = (
            2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y),
        )
    return R


@_compiled
def project(t, p, R, c):
    """Project a block's landmarks into one camera."""
    c0, c1, c2 = c[0], c[1], c[2]
    r0, r1, r2, r3, r4, r5, r6, r7, r8 = R[0], R[1], R[2], R[3], R[4], R[5], R[6], R[7], R[8]
    for i in range(LANES):
        x, y, z = p[i] - c0, p[N + i] - c1, p[2 * N + i] - c2
        depth = r2 * x + r5 * y + r8 * z
        front = depth > MIN_DEPTH
        inverse = 1.0 / (depth if front else 1.0)
        t[DX + i], t[DY + i], t[DZ + i] = x, y, z
        t[U + i] = (r0 * x + r3 * y + r6 * z) * inverse
        t[V + i] = (r1 * x + r4 * y + r7 * z) * inverse
        t[INVERSE + i] = inverse
        t[FRONT + i] = 1.0 if front else 0.0


@_compiled
def residual(t, row, fx, fy):
    """Compute g = information times residual, and s, of one layer of a projected cell."""
    for i in range(LANES):
        ex = fx * (t[U + i] - row[i])
        ey = fy * (t[V + i] - row[N + i])
        xx, xy, yy = row[2 * N + i], row[3 * N + i], row[4 * N + i]
        gx, gy = xx * ex + xy * ey, xy * ex + yy * ey
        behind = BEHIND_PX * BEHIND_PX if xx > 0 else 0.0
        t[GX + i], t[GY + i] = gx, gy
        t[S + i] = ex * gx + ey * gy if t[FRONT + i] > 0 else behind


@_compiled
def rho(t, kernel, scale):
    """Sum of the kernel's values (robust.Kernel.rho)."""
    c2, total = scale * scale, 0.0
    if kernel == HUBER:
        for i in range(LANES):
            s = t[S + i]
            total += s if s <= c2 else 2 * scale * math.sqrt(s) - c2
    elif kernel == CAUCHY:
        for i in range(LANES):
            total += c2 * math.log1p(t[S + i] / c2)
    elif kernel == GEMAN_MCCLURE:
        for i in range(LANES):
            total += c2 * t[S + i] / (c2 + t[S + i])
    else:
        for i in range(LANES):
            total += t[S + i]
    return total


@_compiled
def reweight(t, kernel, scale, curved):
    """
    Weights and, if ``curved``, what they lose along the residual.

    See robust.Kernel.weight and .radial.
    """
    c2 = scale * scale
    if kernel == HUBER:
        for i in range(LANES):
            s = t[S + i]
            t[WEIGHT + i] = scale / math.sqrt(max(s, c2))
            t[BEND + i] = 0.0 if s <= c2 else 0.8
    elif kernel == CAUCHY:
        for i in range(LANES):
            s = t[S + i]
            t[WEIGHT + i] = c2 / (c2 + s)
            t[BEND + i] = min(1 - (c2 - s) / (c2 + s), 0.8)
    elif kernel == GEMAN_MCCLURE:
        for i in range(LANES):
            s = t[S + i]
            w = c2 / (c2 + s)
            t[WEIGHT + i] = w * w
            t[BEND + i] = min(1 - (c2 - 3 * s) / (c2 + s), 0.8)
    else:
        for i in range(LANES):
            t[WEIGHT + i], t[BEND + i] = 1.0, 0.0
    energy = 0.0
    for i in range(LANES):
        w = t[WEIGHT + i] * t[FRONT + i]
        t[WEIGHT + i] = w
        energy += w * t[S + i]
        t[BEND + i] = w * t[BEND + i] / max(t[S + i], 1e-12) if curved else 0.0
    return energy


@_compiled
def evaluate(t, q, c, p, cell_of_block, cell_pose, layer_of_cell, rows, fx, fy, kernel, scale):
    """1/2 sum rho(s)."""
    R, total = rotations(q), 0.0
    for b in range(len(p)):
        for cell in range(cell_of_block[b], cell_of_block[b + 1]):
            k = cell_pose[cell]
            project(t, p[b], R[k], c[k])
            for layer in range(layer_of_cell[cell], layer_of_cell[cell + 1]):
                residual(t, rows[layer], fx, fy)
                total += rho(t, kernel, scale)
    return 0.5 * total


@_compiled
def linearise(
    t, q, c, p, cell_of_block, cell_pose, layer_of_cell, rows, fx, fy, kernel, scale, curved,
    jacobian, point, camera,
):
    """
    Compute the blocks of the normal equations at a state.

    Returns the weighted residuals' square, and how many rows have their point behind the camera.

    jacobian: (cells, 6 * LANES), W. point: (blocks, 9 * LANES), Hpp and gp. camera: (K, 27), Hcc
    and -gc.
    """
    R, energy, behind = rotations(q), 0.0, 0
    point[:] = 0.0
    camera[:] = 0.0
    for b in range(len(p)):
        for cell in range(cell_of_block[b], cell_of_block[b + 1]):
            k = cell_pose[cell]
            project(t, p[b], R[k], c[k])
            t[XX:BY + N] = 0.0
            for layer in range(layer_of_cell[cell], layer_of_cell[cell + 1]):
                row = rows[layer]
                residual(t, row, fx, fy)
                energy += reweight(t, kernel, scale, curved)
                for i in range(LANES):
                    behind += row[2 * N + i] > 0 and t[FRONT + i] == 0
                    w, bend, gx, gy = t[WEIGHT + i], t[BEND + i], t[GX + i], t[GY + i]
                    t[XX + i] += w * row[2 * N + i] - bend * gx * gx
                    t[XY + i] += w * row[3 * N + i] - bend * gx * gy
                    t[YY + i] += w * row[4 * N + i] - bend * gy * gy
                    t[BX + i] += w * gx
                    t[BY + i] += w * gy
            add_cell(t, R[k], fx, fy, jacobian[cell], point[b], camera[k])
    return energy, behind


@_compiled
def add_cell(t, R, fx, fy, w, point, camera):
    """
    Write a cell's W = A^T C to w, and add its products to the normal equations.

    W W^T and b = A^T g are added to the landmarks'; V V^T, the lower triangle row by row, and [b;
    d x b] to the camera's.
    """
    r0, r1, r2, r3, r4, r5, r6, r7, r8 = R[0], R[1], R[2], R[3], R[4], R[5], R[6], R[7], R[8]
    k0 = k1 = k2 = k3 = k4 = k5 = k6 = k7 = k8 = k9 = k10 = k11 = k12 = k13 = 0.0
    k14 = k15 = k16 = k17 = k18 = k19 = k20 = k21 = k22 = k23 = k24 = k25 = k26 = 0.0
    for i in range(LANES):
        sx, sy, u, v = fx * t[INVERSE + i], fy * t[INVERSE + i], t[U + i], t[V + i]
        ax0, ax1, ax2 = sx * (r0 - u * r2), sx * (r3 - u * r5), sx * (r6 - u * r8)
        ay0, ay1, ay2 = sy * (r1 - v * r2), sy * (r4 - v * r5), sy * (r7 - v * r8)
        gx, gy = t[BX + i], t[BY + i]
        g0, g1, g2 = ax0 * gx + ay0 * gy, ax1 * gx + ay1 * gy, ax2 * gx + ay2 * gy
        c00 = math.sqrt(t[XX + i])
        c10 = t[XY + i] / (c00 if c00 > 0 else 1.0)
        c11 = math.sqrt(max(t[YY + i] - c10 * c10, 0.0))
        # Rounded, and from here on the same for everybody.
        s0, s1 = np.float32(c00 * ax0 + c10 * ay0), np.float32(c00 * ax1 + c10 * ay1)
        s2, s3 = np.float32(c00 * ax2 + c10 * ay2), np.float32(c11 * ay0)
        s4, s5 = np.float32(c11 * ay1), np.float32(c11 * ay2)
        w[i], w[N + i], w[2 * N + i], w[3 * N + i], w[4 * N + i], w[5 * N + i] = (
            s0, s1, s2, s3, s4, s5,
        )
        a0, a1, a2 = np.float64(s0), np.float64(s1), np.float64(s2)
        b0, b1, b2 = np.float64(s3), np.float64(s4), np.float64(s5)
        h0, h1, h2 = a0 * a0 + b0 * b0, a1 * a0 + b1 * b0, a1 * a1 + b1 * b1
        h3, h4, h5 = a2 * a0 + b2 * b0, a2 * a1 + b2 * b1, a2 * a2 + b2 * b2
        point[i] += h0
        point[N + i] += h1
        point[2 * N + i] += h2
        point[3 * N + i] += h3
        point[4 * N + i] += h4
        point[5 * N + i] += h5
        point[6 * N + i] += g0
        point[7 * N + i] += g1
        point[8 * N + i] += g2
        x, y, z = t[DX + i], t[DY + i], t[DZ + i]
        a3, a4, a5 = y * a2 - z * a1, z * a0 - x * a2, x * a1 - y * a0
        b3, b4, b5 = y * b2 - z * b1, z * b0 - x * b2, x * b1 - y * b0
        k0 += h0
        k1 += h1
        k2 += h2
        k3 += h3
        k4 += h4
        k5 += h5
        k6 += a3 * a0 + b3 * b0
        k7 += a3 * a1 + b3 * b1
        k8 += a3 * a2 + b3 * b2
        k9 += a3 * a3 + b3 * b3
        k10 += a4 * a0 + b4 * b0
        k11 += a4 * a1 + b4 * b1
        k12 += a4 * a2 + b4 * b2
        k13 += a4 * a3 + b4 * b3
        k14 += a4 * a4 + b4 * b4
        k15 += a5 * a0 + b5 * b0
        k16 += a5 * a1 + b5 * b1
        k17 += a5 * a2 + b5 * b2
        k18 += a5 * a3 + b5 * b3
        k19 += a5 * a4 + b5 * b4
        k20 += a5 * a5 + b5 * b5
        k21 += g0
        k22 += g1
        k23 += g2
        k24 += y * g2 - z * g1
        k25 += z * g0 - x * g2
        k26 += x * g1 - y * g0
    # In registers until here: the lanes of many cameras would not fit the cache.
    sums = (
        k0, k1, k2, k3, k4, k5, k6, k7, k8, k9, k10, k11, k12, k13, k14, k15, k16, k17, k18, k19,
        k20, k21, k22, k23,
        k24, k25, k26,
    )  # fmt: skip
    for j in range(27):
        camera[j] += sums[j]


@_compiled
def steepest(point, H, g, free, energy):
    """Return the largest cosine between the whitened residual and a column of its Jacobian."""
    worst = 0.0
    for b in range(len(point)):
        h = point[b]
        for i in range(LANES):
            worst = max(worst, h[6 * N + i] ** 2 / max(h[i], 1e-300))
            worst = max(worst, h[7 * N + i] ** 2 / max(h[2 * N + i], 1e-300))
            worst = max(worst, h[8 * N + i] ** 2 / max(h[5 * N + i], 1e-300))
    for k in range(len(H)):
        for j in range(6):
            if free[k, j]:
                worst = max(worst, g[k, j] ** 2 / max(H[k, j * (j + 3) // 2], 1e-300))
    return math.sqrt(worst / energy) if energy > 0 else 0.0


@_compiled
def factor_points(t, h, damping):
    """Closed-form Cholesky of a block's damped Hpp; the diagonal is kept as its inverse."""
    lift = 1 + damping
    for i in range(LANES):
        h00, h10, h11, h20, h21, h22 = (
            h[i], h[N + i], h[2 * N + i], h[3 * N + i], h[4 * N + i], h[5 * N + i],
        )
        trace = h00 + h11 + h22
        floor = 1e-14 * trace if trace > 0 else 1.0
        l00 = 1 / math.sqrt(max(h00 * lift, floor))
        l10, l20 = h10 * l00, h20 * l00
        l11 = 1 / math.sqrt(max(h11 * lift - l10 * l10, floor))
        l21 = (h21 - l20 * l10) * l11
        l22 = 1 / math.sqrt(max(h22 * lift - l20 * l20 - l21 * l21, floor))
        t[L00 + i], t[L10 + i], t[L11 + i], t[L20 + i], t[L21 + i], t[L22 + i] = (
            l00, l10, l11, l20, l21, l22,
        )


@_compiled
def solve_points(t):
    """Q becomes (L L^T)^-1 Q."""
    for i in range(LANES):
        l00, l10, l11, l20, l21, l22 = (
            t[L00 + i], t[L10 + i], t[L11 + i], t[L20 + i], t[L21 + i], t[L22 + i],
        )
        z0 = t[Q0 + i] * l00
        z1 = (t[Q1 + i] - l10 * z0) * l11
        z2 = (t[Q2 + i] - l20 * z0 - l21 * z1) * l22 * l22
        z1 = (z1 - l21 * z2) * l11
        t[Q0 + i], t[Q1 + i], t[Q2 + i] = (z0 - l10 * z1 - l20 * z2) * l00, z1, z2


@_compiled
def eliminate(
    t, c, p, cell_of_block, cell_pose, chunks, jacobian, point, damping, held, envelope, reduced,
    rhs, e
):  # fmt: skip
    """
    Eliminate the landmarks.

    E E^T goes into ``reduced`` (K, K, 6, 6), lower blocks, and E y into the lanes of ``rhs`` (K, 6
    * LANES).

    Without the poses ``held``. e: (K, 18 * LANES) float32, room for a block's E.
    """
    for k in range(len(c)):
        reduced[k, envelope[k]:k + 1] = 0.0
    rhs[:] = 0.0
    cells = np.empty(len(c), np.int64)
    for b in range(len(p)):
        h, n = point[b], 0
        factor_points(t, h, damping)
        for i in range(3 * LANES):
            t[Q0 + i] = h[6 * N + i]
        solve_points(t)
        for cell in range(cell_of_block[b], cell_of_block[b + 1]):
            k = cell_pose[cell]
            if not held[k]:
                whiten(t, p[b], c[k], jacobian[cell], e[n], rhs[k])
                cells[n] = cell
                n += 1
        for i in range(n):
            for j in range(i + 1):
                # The lanes that both have.
                begin = 3 * CHUNK * max(chunks[cells[i], 0], chunks[cells[j], 0])
                end = 3 * CHUNK * min(chunks[cells[i], 1], chunks[cells[j], 1])
                if begin < end:
                    x = reduced[cell_pose[cells[i]], cell_pose[cells[j]]]
                    add_products(e[i], e[j], x, 0, 0, begin, end)
                    add_products(e[i], e[j], x, 3, 0, begin, end)
                    add_products(e[i], e[j], x, 3, 3, begin, end)
                    if i > j:
                        add_products(e[i], e[j], x, 0, 3, begin, end)


@_compiled
def whiten(t, p, c, w, e, rhs):
    """
    Write E = V (L^-1 W)^T of a cell to e (18 * LANES).

    Row by row, chunk by chunk, column by column. V W^T of Q is added to ``rhs``.
    """
    c0, c1, c2 = c[0], c[1], c[2]
    for i in range(6 * LANES):
        t[W0 + i] = w[i]
    for i in range(LANES):
        x, y, z = p[i] - c0, p[N + i] - c1, p[2 * N + i] - c2
        a0, a1, a2, b0, b1, b2 = t[W0 + i], t[W1 + i], t[W2 + i], t[W3 + i], t[W4 + i], t[W5 + i]
        a, b = (
            a0 * t[Q0 + i] + a1 * t[Q1 + i] + a2 * t[Q2 + i],
            b0 * t[Q0 + i] + b1 * t[Q1 + i] + b2 * t[Q2 + i],
        )
        m0, m1, m2 = a0 * a + b0 * b, a1 * a + b1 * b, a2 * a + b2 * b
        rhs[i] += m0
        rhs[N + i] += m1
        rhs[2 * N + i] += m2
        rhs[3 * N + i] += y * m2 - z * m1
        rhs[4 * N + i] += z * m0 - x * m2
        rhs[5 * N + i] += x * m1 - y * m0
    for first in range(0, LANES, CHUNK):
        for i in range(first, first + CHUNK):
            o0 = 2 * first + i
            o1, o2 = o0 + CHUNK, o0 + 2 * CHUNK
            x, y, z = p[i] - c0, p[N + i] - c1, p[2 * N + i] - c2
            a0, a1, a2, b0, b1, b2 = (
                t[W0 + i], t[W1 + i], t[W2 + i], t[W3 + i], t[W4 + i], t[W5 + i],
            )
            u0 = a0 * t[L00 + i]
            u1 = (a1 - t[L10 + i] * u0) * t[L11 + i]
            u2 = (a2 - t[L20 + i] * u0 - t[L21 + i] * u1) * t[L22 + i]
            v0 = b0 * t[L00 + i]
            v1 = (b1 - t[L10 + i] * v0) * t[L11 + i]
            v2 = (b2 - t[L20 + i] * v0 - t[L21 + i] * v1) * t[L22 + i]
            e0, e1, e2 = a0 * u0 + b0 * v0, a1 * u0 + b1 * v0, a2 * u0 + b2 * v0
            e[o0], e[3 * N + o0], e[6 * N + o0] = e0, e1, e2
            e[9 * N + o0], e[12 * N + o0], e[15 * N + o0] = (
                y * e2 - z * e1, z * e0 - x * e2, x * e1 - y * e0,
            )
            e0, e1, e2 = a0 * u1 + b0 * v1, a1 * u1 + b1 * v1, a2 * u1 + b2 * v1
            e[o1], e[3 * N + o1], e[6 * N + o1] = e0, e1, e2
            e[9 * N + o1], e[12 * N + o1], e[15 * N + o1] = (
                y * e2 - z * e1, z * e0 - x * e2, x * e1 - y * e0,
            )
            e0, e1, e2 = a0 * u2 + b0 * v2, a1 * u2 + b1 * v2, a2 * u2 + b2 * v2
            e[o2], e[3 * N + o2], e[6 * N + o2] = e0, e1, e2
            e[9 * N + o2], e[12 * N + o2], e[15 * N + o2] = (
                y * e2 - z * e1, z * e0 - x * e2, x * e1 - y * e0,
            )


@_compiled
def add_products(a, b, x, row, column, begin, end):
    """
    Add E E^T of some lanes to x, the innermost loop.

    Three rows by three columns at a time, so that what is read is used thrice.
    """
    a0, a1, a2 = (
        a[row * 3 * N + begin:], a[(row + 1) * 3 * N + begin:], a[(row + 2) * 3 * N + begin:],
    )
    b0, b1, b2 = (
        b[column * 3 * N + begin:], b[(column + 1) * 3 * N + begin:],
        b[(column + 2) * 3 * N + begin:],
    )
    s00 = s01 = s02 = s10 = s11 = s12 = s20 = s21 = s22 = np.float32(0)
    for i in range(end - begin):
        s00 += a0[i] * b0[i]
        s01 += a0[i] * b1[i]
        s02 += a0[i] * b2[i]
        s10 += a1[i] * b0[i]
        s11 += a1[i] * b1[i]
        s12 += a1[i] * b2[i]
        s20 += a2[i] * b0[i]
        s21 += a2[i] * b1[i]
        s22 += a2[i] * b2[i]
    x[row, column] += s00
    x[row, column + 1] += s01
    x[row, column + 2] += s02
    x[row + 1, column] += s10
    x[row + 1, column + 1] += s11
    x[row + 1, column + 2] += s12
    x[row + 2, column] += s20
    x[row + 2, column + 1] += s21
    x[row + 2, column + 2] += s22


@_compiled
def prior_coordinates(prior_pose, prior_T, q, c):
    """lie.local of the prior's poses (6 P,)."""
    d = np.empty(6 * len(prior_pose))
    for n in range(len(prior_pose)):
        k = prior_pose[n]
        x, y, z, w = q[k, 0], q[k, 1], q[k, 2], q[k, 3]
        a, b, e, f = -prior_T[n, 3], -prior_T[n, 4], -prior_T[n, 5], prior_T[n, 6]
        rx, ry, rz = (
            w * a + f * x + y * e - z * b, w * b + f * y + z * a - x * e,
            w * e + f * z + x * b - y * a,
        )
        rw = w * f - x * a - y * b - z * e
        sine = math.sqrt(rx * rx + ry * ry + rz * rz)
        size = 2 * math.atan2(sine, abs(rw)) / sine if sine > 1e-150 else 2.0
        size = -size if rw < 0 else size
        for j in range(3):
            d[6 * n + j] = c[k, j] - prior_T[n, j]
        d[6 * n + 3], d[6 * n + 4], d[6 * n + 5] = size * rx, size * ry, size * rz
    return d


@_compiled
def prior_cost(prior_pose, prior_T, prior_H, prior_g, prior_constant, q, c):
    """PosePrior.cost."""
    if len(prior_pose) == 0:
        return 0.0
    d = prior_coordinates(prior_pose, prior_T, q, c)
    total = dot(prior_g, d) + prior_constant
    for i in range(len(d)):
        total += 0.5 * d[i] * dot(prior_H[i], d)
    return total


@_compiled
def linearise_prior(prior_pose, prior_T, prior_H, prior_g, q, c, G, H, g):
    """
    Linearise the prior as PosePrior.linearise does.

    The Hessian goes to G (6 P, 6 P), and what belongs to single poses added to H and g.
    """
    d = prior_coordinates(prior_pose, prior_T, q, c)
    J = np.empty((len(prior_pose), 3, 3))
    for n in range(len(prior_pose)):
        x, y, z = d[6 * n + 3], d[6 * n + 4], d[6 * n + 5]
        square = x * x + y * y + z * z
        if square < 0.0025:
            b = 1 / 12 + square / 720 + square * square / 30240
        else:
            half = math.sqrt(square) / 2
            b = (1 - half / math.tan(half)) / square
        J[n, 0, 0], J[n, 1, 1], J[n, 2, 2] = (
            1 - b * (y * y + z * z), 1 - b * (x * x + z * z), 1 - b * (x * x + y * y),
        )
        J[n, 0, 1], J[n, 1, 0] = b * x * y + 0.5 * z, b * x * y - 0.5 * z
        J[n, 0, 2], J[n, 2, 0] = b * x * z - 0.5 * y, b * x * z + 0.5 * y
        J[n, 1, 2], J[n, 2, 1] = b * y * z + 0.5 * x, b * y * z - 0.5 * x
    size = len(d)
    for i in range(size):
        for n in range(len(prior_pose)):
            for j in range(3):
                G[i, 6 * n + j] = prior_H[i, 6 * n + j]
                G[i, 6 * n + 3 + j] = 0.0
                for m in range(3):
                    G[i, 6 * n + 3 + j] += prior_H[i, 6 * n + 3 + m] * J[n, m, j]
    for n in range(len(prior_pose)):
        for i in range(size):
            a, b, e = G[6 * n + 3, i], G[6 * n + 4, i], G[6 * n + 5, i]
            for j in range(3):
                G[6 * n + 3 + j, i] = J[n, 0, j] * a + J[n, 1, j] * b + J[n, 2, j] * e
        k = prior_pose[n]
        for j in range(6):
            slope = prior_g[6 * n + j] + dot(prior_H[6 * n + j], d)
            if j < 3:
                g[k, j] += slope
            else:
                for m in range(3):
                    g[k, 3 + m] += J[n, j - 3, m] * slope
            for m in range(j + 1):
                H[k, j * (j + 1) // 2 + m] += G[6 * n + j, 6 * n + m]


@_compiled
def solve_cameras(H, g, reduced, rhs, free, damping, envelope, prior_pose, G, A, step):
    """
    Solve (Hcc - E E^T) step = -(gc + E y); False if not definite.

    E y comes with its sign; G as ``linearise_prior``; A: (6 K, 6 K) to be overwritten.
    """
    K = len(H)
    for k in range(K):
        for r in range(6):
            row = A[6 * k + r]
            for j in range(envelope[k], k + 1):
                for s in range(6):
                    row[6 * j + s] = -reduced[k, j, r, s] if free[k, r] and free[j, s] else 0.0
            if free[k, r]:
                for s in range(r + 1):
                    if free[k, s]:
                        row[6 * k + s] += H[k, r * (r + 1) // 2 + s] * (
                            1 + damping if r == s else 1.0
                        )
                if H[k, r * (r + 3) // 2] == 0:  # what nothing observes stays where it is
                    row[6 * k + r] = 1.0
                step[k, r] = -g[k, r] - rhs[k, r * LANES:(r + 1) * LANES].sum()
            else:
                row[6 * k + r], step[k, r] = 1.0, 0.0
    for n in range(len(prior_pose)):
        for m in range(len(prior_pose)):
            k, j = prior_pose[n], prior_pose[m]
            for r in range(6 if k > j else 0):
                for s in range(6):
                    if free[k, r] and free[j, s]:
                        A[6 * k + r, 6 * j + s] += G[6 * n + r, 6 * m + s]
    # Cholesky by rows inside the envelope, which it preserves.
    x = step.reshape(6 * K)
    for i in range(6 * K):
        begin, row = 6 * envelope[i // 6], A[i]
        for j in range(begin, i):
            lower = max(begin, 6 * envelope[j // 6])
            row[j] = (row[j] - dot(row[lower:j], A[j, lower:j])) * A[j, j]
        pivot = row[i] - dot(row[begin:i], row[begin:i])
        if not pivot > 0:
            return False
        row[i] = 1 / math.sqrt(pivot)  # kept as its inverse
        x[i] = (x[i] - dot(row[begin:i], x[begin:i])) * row[i]
    for i in range(6 * K - 1, -1, -1):
        begin, row = 6 * envelope[i // 6], A[i]
        x[i] *= row[i]
        for j in range(begin, i):
            x[j] -= row[j] * x[i]
    return True


@_compiled
def dot(a, b):
    total = 0.0
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@_compiled
def step_points(t, c, p, cell_of_block, cell_pose, jacobian, point, damping, step, moved):
    """
    Landmarks after the step that follows the cameras'.

    Returns its slope and its damped length.
    """
    slope, length = 0.0, 0.0
    for b in range(len(p)):
        h, here, there = point[b], p[b], moved[b]
        for i in range(3 * LANES):
            t[Q0 + i] = -h[6 * N + i]
        for cell in range(cell_of_block[b], cell_of_block[b + 1]):
            k = cell_pose[cell]
            recall(t, here, c[k], jacobian[cell], step[k])
        factor_points(t, h, damping)
        solve_points(t)
        for i in range(LANES):
            x, y, z = t[Q0 + i], t[Q1 + i], t[Q2 + i]
            slope += x * h[6 * N + i] + y * h[7 * N + i] + z * h[8 * N + i]
            length += x * x * h[i] + y * y * h[2 * N + i] + z * z * h[5 * N + i]
        for i in range(3 * LANES):
            there[i] = here[i] + t[Q0 + i]
    return slope, length


@_compiled
def recall(t, p, c, w, step):
    """W V^T of a camera's step, added to Q: what the step does to a block's landmarks."""
    c0, c1, c2 = c[0], c[1], c[2]
    s0, s1, s2, s3, s4, s5 = step[0], step[1], step[2], step[3], step[4], step[5]
    for i in range(LANES):
        x, y, z = p[i] - c0, p[N + i] - c1, p[2 * N + i] - c2
        v0, v1, v2 = s0 + s4 * z - s5 * y, s1 + s5 * x - s3 * z, s2 + s3 * y - s4 * x
        a0, a1, a2, b0, b1, b2 = (
            w[i], w[N + i], w[2 * N + i], w[3 * N + i], w[4 * N + i], w[5 * N + i],
        )
        a, b = a0 * v0 + a1 * v1 + a2 * v2, b0 * v0 + b1 * v1 + b2 * v2
        t[Q0 + i] += a0 * a + b0 * b
        t[Q1 + i] += a1 * a + b1 * b
        t[Q2 + i] += a2 * a + b2 * b


@_compiled
def retract(q, c, step, held, q_new, c_new):
    """lie.retract; poses ``held`` stay to the last bit."""
    for k in range(len(q)):
        if held[k]:
            q_new[k], c_new[k] = q[k], c[k]
            continue
        for j in range(3):
            c_new[k, j] = c[k, j] + step[k, j]
        hx, hy, hz = 0.5 * step[k, 3], 0.5 * step[k, 4], 0.5 * step[k, 5]
        angle = math.sqrt(hx * hx + hy * hy + hz * hz)
        size = math.sin(angle) / angle if angle > 0 else 1.0
        hx, hy, hz, hw = size * hx, size * hy, size * hz, math.cos(angle)
        x, y, z, w = q[k, 0], q[k, 1], q[k, 2], q[k, 3]
        x, y, z, w = (
            hw * x + w * hx + hy * z - hz * y, hw * y + w * hy + hz * x - hx * z,
            hw * z + w * hz + hx * y - hy * x,
            hw * w - hx * x - hy * y - hz * z,
        )  # fmt: skip
        size = math.sqrt(x * x + y * y + z * z + w * w)
        q_new[k, 0], q_new[k, 1], q_new[k, 2], q_new[k, 3] = x / size, y / size, z / size, w / size


@_compiled
def stay(t, q, c, p, q_new, c_new, p_new, cell_of_block, cell_pose, layer_of_cell, rows):
    """Put landmarks that passed a camera where system.py's ``stay`` does."""
    R, R_new = rotations(q), rotations(q_new)
    for b in range(len(p)):
        here, there = p[b], p_new[b]
        for cell in range(cell_of_block[b], cell_of_block[b + 1]):
            k = cell_pose[cell]
            project(t, here, R[k], c[k])
            t[S:S + N] = t[FRONT:FRONT + N]
            project(t, there, R_new[k], c_new[k])
            for layer in range(layer_of_cell[cell], layer_of_cell[cell + 1]):
                for i in range(LANES):
                    if t[S + i] != t[FRONT + i] and rows[layer, 2 * N + i] > 0:
                        for j in range(3):
                            there[j * N + i] = here[j * N + i] + c_new[k, j] - c[k, j]


_f8, _i8 = types.float64, types.int64


@njit(
    types.Tuple((_f8[:, ::1], _f8[:, ::1], _i8, _f8, _f8, _f8, types.boolean))(
        _f8[:, ::1], _f8[:, ::1], _i8[::1], _i8[::1], _f8[:, ::1], _f8[:, ::1], _f8, _f8,
        types.boolean[:, ::1],
        _i8, _f8, _i8, _f8, _f8, _i8[::1], _f8[:, ::1], _f8[:, ::1], _f8[::1], _f8,
    ),
    cache=True, error_model='numpy', nogil=True,
)  # fmt: skip
def minimise(
    T, points, pose, landmark, xy, cov, fx, fy, free, kernel, scale, max_iterations,
    relative_decrease, gradient,
    prior_pose, prior_T, prior_H, prior_g, prior_constant,
):  # fmt: skip
    """
    adjust.py's ``_minimise``.

    T (K, 7), points (L, 3), iterations, cost, relative decrease, gradient, converged.
    """
    K, origin = len(T), T[0, :3].copy()
    order, cell_of_block, cell_pose, layer_of_cell, chunks, slot, lane, envelope = layout(
        pose, landmark, K, len(points)
    )  # fmt: skip
    rows = place_observations(slot, lane, layer_of_cell[-1], xy, cov)
    blocks, cells = len(cell_of_block) - 1, len(cell_pose)
    q, c, p = T[:, 3:].copy(), T[:, :3] - origin, place_points(points, order, origin)
    prior_T = prior_T.copy()
    for n in range(len(prior_pose)):
        prior_T[n, :3] -= origin
        envelope[prior_pose[n]] = min(envelope[prior_pose[n]], prior_pose.min())
    G = np.empty((6 * len(prior_pose), 6 * len(prior_pose)))
    q_new, c_new, p_new = q.copy(), c.copy(), p.copy()
    t, jacobian = np.zeros(SCRATCH), np.empty((cells, 6 * LANES), np.float32)
    point, camera = np.empty((blocks, 9 * LANES)), np.empty((K, 27))
    reduced, rhs, A = np.empty((K, K, 6, 6)), np.empty((K, 6 * LANES)), np.empty((6 * K, 6 * K))
    e, step, held = np.empty((K, 18 * LANES), np.float32), np.zeros((K, 6)), np.empty(K, np.bool_)
    for k in range(K):
        held[k] = not free[k].any()

    cost = evaluate(
        t, q, c, p, cell_of_block, cell_pose, layer_of_cell, rows, fx, fy, kernel, scale
    )
    cost += prior_cost(prior_pose, prior_T, prior_H, prior_g, prior_constant, q, c)
    t[S:S + N] = BEHIND_PX * BEHIND_PX
    each = 0.5 * rho(t, kernel, scale) / LANES  # what a row costs whose point is behind its camera
    iterations, decrease, damping, growth = 0, 1.0, 1e-4, 2.0
    while True:
        energy, behind = linearise(
            t, q, c, p, cell_of_block, cell_pose, layer_of_cell, rows, fx, fy, kernel, scale,
            decrease < 1e-4,
            jacobian, point, camera,
        )  # fmt: skip
        H, g = camera[:, :21].copy(), -camera[:, 21:]
        if len(prior_pose):
            linearise_prior(prior_pose, prior_T, prior_H, prior_g, q, c, G, H, g)
            energy += 2 * prior_cost(prior_pose, prior_T, prior_H, prior_g, prior_constant, q, c)
        slope_norm = steepest(point, H, g, free, energy)
        converged = cost <= 1e-18 * len(pose) or (
            decrease < relative_decrease and slope_norm < gradient
        )
        if converged or iterations >= max_iterations:
            break
        cost_new, predicted, refused = np.inf, 0.0, False
        while damping < 1e12:
            eliminate(
                t, c, p, cell_of_block, cell_pose, chunks, jacobian, point, damping, held,
                envelope, reduced, rhs, e
            )  # fmt: skip
            if solve_cameras(H, g, reduced, rhs, free, damping, envelope, prior_pose, G, A, step):
                slope, length = step_points(
                    t, c, p, cell_of_block, cell_pose, jacobian, point, damping, step, p_new
                )
                for k in range(K):
                    for j in range(6):
                        slope += g[k, j] * step[k, j]
                        length += H[k, j * (j + 3) // 2] * step[k, j] * step[k, j]
                predicted = 0.5 * (damping * length - slope)
                retract(q, c, step, held, q_new, c_new)
                if refused:
                    stay(
                        t, q, c, p, q_new, c_new, p_new, cell_of_block, cell_pose, layer_of_cell,
                        rows,
                    )  # fmt: skip
                cost_new = evaluate(
                    t, q_new, c_new, p_new, cell_of_block, cell_pose, layer_of_cell, rows, fx, fy,
                    kernel, scale,
                ) + prior_cost(prior_pose, prior_T, prior_H, prior_g, prior_constant, q_new, c_new)
                if cost_new < cost or predicted <= 1e-13 * cost:
                    break
            damping, growth, refused = damping * growth, growth * 2, True
        if not cost_new < cost:
            decrease, converged = 0.0, slope_norm < gradient
            break
        gain = (cost - cost_new) / max(predicted, 1e-300)
        damping, growth = max(damping * max(0.1, 1 - (2 * gain - 1) ** 3), 1e-12), 2.0
        decrease, cost = (cost - cost_new) / max(cost - behind * each, 1e-300), cost_new
        q, c, p, q_new, c_new, p_new = q_new, c_new, p_new, q, c, p
        iterations += 1

    T_best, points_best = np.concatenate((c + origin, q), 1), points.copy()
    for n in range(len(order)):
        if order[n] >= 0:
            for j in range(3):
                points_best[order[n], j] = p[n // LANES, j * LANES + n % LANES] + origin[j]
    return T_best, points_best, iterations, cost, decrease, slope_norm, converged


@njit(
    _f8[:, ::1](
        _f8[:, ::1], _f8[:, ::1], _i8[::1], _i8[::1], _f8[:, ::1], _f8[:, ::1], _f8, _f8, _i8, _f8,
        _i8[::1],
        _f8[:, ::1], _f8[:, ::1], _f8[::1],
    ),
    cache=True, error_model='numpy', nogil=True,
)  # fmt: skip
def reduced_system(
    T, points, pose, landmark, xy, cov, fx, fy, kernel, scale, prior_pose, prior_T, prior_H,
    prior_g
):  # fmt: skip
    """system.py's ``reduce`` without damping: the matrix (6 K, 6 K), its products in float64."""
    K, origin = len(T), T[0, :3].copy()
    order, cell_of_block, cell_pose, layer_of_cell, chunks, slot, lane, envelope = layout(
        pose, landmark, K, len(points)
    )  # fmt: skip
    rows = place_observations(slot, lane, layer_of_cell[-1], xy, cov)
    blocks, cells = len(cell_of_block) - 1, len(cell_pose)
    q, c, p = T[:, 3:].copy(), T[:, :3] - origin, place_points(points, order, origin)
    t, jacobian = np.zeros(SCRATCH), np.empty((cells, 6 * LANES), np.float32)
    point, camera = np.empty((blocks, 9 * LANES)), np.empty((K, 27))
    linearise(
        t, q, c, p, cell_of_block, cell_pose, layer_of_cell, rows, fx, fy, kernel, scale, False,
        jacobian, point, camera
    )  # fmt: skip
    H = camera[:, :21]
    reduced, rhs, e = np.empty((K, K, 6, 6)), np.empty((K, 6 * LANES)), np.empty((K, 18 * LANES))
    held = np.zeros(K, np.bool_)
    eliminate(
        t, c, p, cell_of_block, cell_pose, chunks, jacobian, point, 0.0, held, envelope, reduced,
        rhs, e,
    )
    S = np.zeros((6 * K, 6 * K))
    for k in range(K):
        for j in range(envelope[k], k + 1):
            for r in range(6):
                for s in range(r + 1 if j == k else 6):
                    x = H[k, r * (r + 1) // 2 + s] if j == k else 0.0
                    S[6 * k + r, 6 * j + s] = S[6 * j + s, 6 * k + r] = x - reduced[k, j, r, s]
    P = len(prior_pose)
    if P:
        G = np.empty((6 * P, 6 * P))
        linearise_prior(
            prior_pose, prior_T, prior_H, prior_g, T[:, 3:], T[:, :3], G, np.zeros((K, 21)),
            np.zeros((K, 6))
        )  # fmt: skip
        for i in range(6 * P):
            for j in range(6 * P):
                S[6 * prior_pose[i // 6] + i % 6, 6 * prior_pose[j // 6] + j % 6] += G[i, j]
    return S
