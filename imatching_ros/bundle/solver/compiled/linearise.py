"""
The cost 1/2 sum rho(s) and the blocks of the normal equations at a state.

With A = de/dp, d = p - c and a cell's information M = C C^T summed over its layers, W = A^T C and
V = [I; [d]x] W, as in system.py,

    Hcc = sum_l V V^T,   Hpp = sum_k W W^T,   Hcp = -V W^T,

and of these only W is kept: V follows from it and d. ``p``: (blocks, 3, LANES), the landmarks
about the origin. ``rows``: (layers, 5, LANES), of an observation x, y and the information's uu,
uv, vv, of which zeros say that there is none. ``t``: the scratch memory of lanes.py.
"""

from __future__ import annotations

import math

from numba import types
import numpy as np

from .lanes import (
    BEND,
    BX,
    BY,
    DX,
    DY,
    DZ,
    FRONT,
    GX,
    GY,
    INVERSE,
    LANES,
    N,
    N2,
    N3,
    N4,
    N5,
    N6,
    N7,
    N8,
    N9,
    S,
    U,
    V,
    WEIGHT,
    XX,
    XY,
    YY,
)
from .poses import clear, rotations
from ..problem import BEHIND_PX, MIN_DEPTH
from ..robust import KERNELS
from ....jit import at, b1, F4, F8, f8, I8, i8, inner, void

HUBER, CAUCHY, GEMAN_MCCLURE = (
    KERNELS.index(name) for name in ('huber', 'cauchy', 'geman_mcclure')
)


@inner(void(F8, F8, F8, F8))
def project(t, p, R, c):
    """Project a block's landmarks into one camera."""
    c0, c1, c2 = c[0], c[1], c[2]
    r0, r1, r2, r3, r4, r5, r6, r7, r8 = R[0], R[1], R[2], R[3], R[4], R[5], R[6], R[7], R[8]
    for i in range(LANES):
        x, y, z = p[i] - c0, p[N + i] - c1, p[N2 + i] - c2
        depth = r2 * x + r5 * y + r8 * z
        front = depth > MIN_DEPTH
        inverse = 1.0 / (depth if front else 1.0)
        t[DX + i], t[DY + i], t[DZ + i] = x, y, z
        t[U + i] = (r0 * x + r3 * y + r6 * z) * inverse
        t[V + i] = (r1 * x + r4 * y + r7 * z) * inverse
        t[INVERSE + i] = inverse
        t[FRONT + i] = 1.0 if front else 0.0


@inner(void(F8, F8, f8, f8))
def residual(t, row, fx, fy):
    """Compute g = information times residual, and s, of a layer ``row`` of a projected cell."""
    for i in range(LANES):
        ex = fx * (t[U + i] - row[i])
        ey = fy * (t[V + i] - row[N + i])
        xx, xy, yy = row[N2 + i], row[N3 + i], row[N4 + i]
        gx, gy = xx * ex + xy * ey, xy * ex + yy * ey
        behind = BEHIND_PX * BEHIND_PX if xx > 0 else 0.0
        t[GX + i], t[GY + i] = gx, gy
        t[S + i] = ex * gx + ey * gy if t[FRONT + i] > 0 else behind


@inner(f8(F8, i8, f8))
def rho(t, kernel, scale):
    """Return the sum of the kernel's values of a layer (robust.Kernel.rho)."""
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


@inner(f8(F8, i8, f8, b1))
def reweight(t, kernel, scale, curved):
    """
    Compute the weights of a layer and, if ``curved``, what they lose along the residual.

    Both are robust.Kernel's (``weight``, ``radial``). Returns the weighted residuals' square.
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


@inner(f8(F8, F8, F8, F8, F8, i8, i8, I8, I8, I8, F8, f8, f8, i8, f8))
def evaluate(
    t, R, q, c, p, K, blocks, cell_of_block, cell_pose, layer_of_cell, rows, fx, fy, kernel, scale
):
    """Return the cost 1/2 sum rho(s) of the observations at a state. R: (K, 9), room."""
    total = 0.0
    rotations(q, K, R)
    for b in range(blocks):
        for cell in range(cell_of_block[b], cell_of_block[b + 1]):
            k = cell_pose[cell]
            project(t, at(p, N3 * b), at(R, 9 * k), at(c, 3 * k))
            for layer in range(layer_of_cell[cell], layer_of_cell[cell + 1]):
                residual(t, at(rows, N5 * layer), fx, fy)
                total += rho(t, kernel, scale)
    return 0.5 * total


@inner(types.Tuple((f8, i8))(
    F8, F8, F8, F8, F8, i8, i8, I8, I8, I8, F8, f8, f8, i8, f8, b1, F4, F8, F8, F8
))
def linearise(
    t, R, q, c, p, K, blocks, cell_of_block, cell_pose, layer_of_cell, rows, fx, fy, kernel, scale,
    curved, jacobian, point, H, g,
):
    """
    Compute the blocks of the normal equations at a state.

    Returns the weighted residuals' square, and how many rows have their point behind the camera.
    Written are jacobian: (cells, 6 * LANES), W; point: (blocks, 9 * LANES), Hpp and gp; H:
    (K, 21), Hcc, lower triangles row by row; and g: (K, 6), gc. R: (K, 9), room.
    """
    energy, behind = 0.0, 0
    clear(point, N9 * blocks)
    clear(H, 21 * K)
    clear(g, 6 * K)
    rotations(q, K, R)
    for b in range(blocks):
        for cell in range(cell_of_block[b], cell_of_block[b + 1]):
            k = cell_pose[cell]
            project(t, at(p, N3 * b), at(R, 9 * k), at(c, 3 * k))
            clear(at(t, XX), N5)
            for layer in range(layer_of_cell[cell], layer_of_cell[cell + 1]):
                row = at(rows, N5 * layer)
                residual(t, row, fx, fy)
                energy += reweight(t, kernel, scale, curved)
                for i in range(LANES):
                    behind += row[N2 + i] > 0 and t[FRONT + i] == 0
                    w, bend, gx, gy = t[WEIGHT + i], t[BEND + i], t[GX + i], t[GY + i]
                    t[XX + i] += w * row[N2 + i] - bend * gx * gx
                    t[XY + i] += w * row[N3 + i] - bend * gx * gy
                    t[YY + i] += w * row[N4 + i] - bend * gy * gy
                    t[BX + i] += w * gx
                    t[BY + i] += w * gy
            add_cell(
                t, at(R, 9 * k), fx, fy, at(jacobian, N6 * cell), at(point, N9 * b),
                at(H, 21 * k), at(g, 6 * k),
            )
    return energy, behind


@inner(void(F8, F8, f8, f8, F4, F8, F8, F8))
def add_cell(t, R, fx, fy, w, point, H, g):
    """
    Write a cell's W = A^T C to w, and add its products to the normal equations.

    W W^T and b = A^T g are added to the landmarks' ``point``, V V^T (the lower triangle row by
    row) and -[b; d x b] to the camera's ``H`` and ``g``.
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
        w[i], w[N + i], w[N2 + i], w[N3 + i], w[N4 + i], w[N5 + i] = (
            s0, s1, s2, s3, s4, s5,
        )
        a0, a1, a2 = np.float64(s0), np.float64(s1), np.float64(s2)
        b0, b1, b2 = np.float64(s3), np.float64(s4), np.float64(s5)
        h0, h1, h2 = a0 * a0 + b0 * b0, a1 * a0 + b1 * b0, a1 * a1 + b1 * b1
        h3, h4, h5 = a2 * a0 + b2 * b0, a2 * a1 + b2 * b1, a2 * a2 + b2 * b2
        point[i] += h0
        point[N + i] += h1
        point[N2 + i] += h2
        point[N3 + i] += h3
        point[N4 + i] += h4
        point[N5 + i] += h5
        point[N6 + i] += g0
        point[N7 + i] += g1
        point[N8 + i] += g2
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
    H[0] += k0
    H[1] += k1
    H[2] += k2
    H[3] += k3
    H[4] += k4
    H[5] += k5
    H[6] += k6
    H[7] += k7
    H[8] += k8
    H[9] += k9
    H[10] += k10
    H[11] += k11
    H[12] += k12
    H[13] += k13
    H[14] += k14
    H[15] += k15
    H[16] += k16
    H[17] += k17
    H[18] += k18
    H[19] += k19
    H[20] += k20
    g[0] -= k21
    g[1] -= k22
    g[2] -= k23
    g[3] -= k24
    g[4] -= k25
    g[5] -= k26


@inner(f8(F8, i8, F8, F8, i8, I8, f8))
def steepest(point, blocks, H, g, K, free, energy):
    """Return the largest cosine between the whitened residual and a column of its Jacobian."""
    worst = 0.0
    for b in range(blocks):
        h = at(point, N9 * b)
        for i in range(LANES):
            worst = max(worst, h[N6 + i] ** 2 / max(h[i], 1e-300))
            worst = max(worst, h[N7 + i] ** 2 / max(h[N2 + i], 1e-300))
            worst = max(worst, h[N8 + i] ** 2 / max(h[N5 + i], 1e-300))
    for k in range(K):
        for j in range(6):
            if free[6 * k + j]:
                worst = max(worst, g[6 * k + j] ** 2 / max(H[21 * k + j * (j + 3) // 2], 1e-300))
    return math.sqrt(worst / energy) if energy > 0 else 0.0
