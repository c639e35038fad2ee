"""
Of the solver in compiled.py, what is done with blocks of landmarks, ``LANES`` side by side.

``t`` is the scratch memory, ``p`` the places of a block's landmarks, ``row`` a layer of a cell.
"""

from __future__ import annotations

import math

from imatching_ros.bundle.compiled_poses import clear, copy, LANES, rotations
from imatching_ros.bundle.problem import BEHIND_PX, MIN_DEPTH
from imatching_ros.bundle.robust import KERNELS
from imatching_ros.jit import at, b1, F4, F8, f8, I8, i8, inner, void
from numba import types
import numpy as np

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
E = 34 * N
SCRATCH = 52 * N
# Multiples of N, for what is named by its number alone; numba multiplies nothing beforehand.
N2, N3, N4, N5, N6, N7, N8, N9, N12, N15, N18 = (
    k * N for k in (2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 18)
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
    """Compute g = information times residual, and s, of one layer of a projected cell."""
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


@inner(f8(F8, i8, f8, b1))
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


@inner(f8(F8, F8, F8, F8, F8, i8, i8, I8, I8, I8, F8, f8, f8, i8, f8))
def evaluate(
    t, R, q, c, p, K, blocks, cell_of_block, cell_pose, layer_of_cell, rows, fx, fy, kernel, scale
):  # fmt: skip
    """1/2 sum rho(s). R: (K, 9), room, as below."""
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
):  # fmt: skip
    """
    Compute the blocks of the normal equations at a state.

    Returns the weighted residuals' square, and how many rows have their point behind the camera.
    jacobian: (cells, 6 * LANES), W. point: (blocks, 9 * LANES), Hpp and gp. H: (K, 21), Hcc, lower
    triangles row by row. g: (K, 6), gc.
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
            )  # fmt: skip
    return energy, behind


@inner(void(F8, F8, f8, f8, F4, F8, F8, F8))
def add_cell(t, R, fx, fy, w, point, H, g):
    """
    Write a cell's W = A^T C to w, and add its products to the normal equations.

    W W^T and b = A^T g are added to the landmarks'; V V^T, the lower triangle row by row, and -[b;
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


@inner(void(F8, F8, f8))
def factor_points(t, h, damping):
    """Closed-form Cholesky of a block's damped Hpp; the diagonal is kept as its inverse."""
    lift = 1 + damping
    for i in range(LANES):
        h00, h10, h11, h20, h21, h22 = (
            h[i], h[N + i], h[N2 + i], h[N3 + i], h[N4 + i], h[N5 + i],
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


@inner(void(F8))
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


@inner(void(F8, F8, F8, i8, i8, I8, I8, I8, F4, F8, f8, I8, I8, F8, F8, b1, F4, F8, I8))
def eliminate(
    t, c, p, K, blocks, cell_of_block, cell_pose, chunks, jacobian, point, damping, held, envelope,
    reduced, rhs, exactly, e, wide, cells,
):  # fmt: skip
    """
    Eliminate the landmarks.

    E E^T goes into ``reduced`` (K, K, 6, 6), lower blocks, and E y into the lanes of ``rhs`` (K, 6
    * LANES), without the poses ``held``. e: (K, 18 * LANES), room for a block's E; where products
    are wanted in float64, ``exactly``, it is ``wide``. cells: (K,), room.
    """
    for k in range(K):
        clear(at(reduced, 36 * (K * k + envelope[k])), 36 * (k + 1 - envelope[k]))
    clear(rhs, 6 * N * K)
    for b in range(blocks):
        h, n = at(point, N9 * b), 0
        factor_points(t, h, damping)
        copy(at(h, N6), at(t, Q0), N3)
        solve_points(t)
        for cell in range(cell_of_block[b], cell_of_block[b + 1]):
            k = cell_pose[cell]
            if not held[k]:
                whiten(
                    t, at(p, N3 * b), at(c, 3 * k), at(jacobian, N6 * cell), at(rhs, N6 * k)
                )
                if exactly:
                    copy(at(t, E), at(wide, N18 * n), N18)
                else:
                    narrow(at(t, E), at(e, N18 * n), N18)
                cells[n] = cell
                n += 1
        for i in range(n):
            k, left = cell_pose[cells[i]], at(chunks, 2 * cells[i])
            for j in range(i + 1):
                # The lanes that both have.
                right = at(chunks, 2 * cells[j])
                begin = 3 * CHUNK * max(left[0], right[0])
                end = 3 * CHUNK * min(left[1], right[1])
                if begin < end:
                    x = at(reduced, 36 * (K * k + cell_pose[cells[j]]))
                    one, other = N18 * i + begin, N18 * j + begin
                    if exactly:
                        add_block(at(wide, one), at(wide, other), x, end - begin, i == j)
                    else:
                        add_block(at(e, one), at(e, other), x, end - begin, i == j)


@inner(void(F8, F4, i8))
def narrow(x, y, n):
    """Copy n numbers from x to y."""
    for i in range(n):
        y[i] = x[i]


@inner(*(void(kind, kind, F8, i8, b1) for kind in (F4, F8)))
def add_block(a, b, x, n, diagonal):
    """Add to a block x what two poses' E have in common; of a diagonal one the lower corners."""
    add_products(a, b, x, n)
    add_products(at(a, N9), b, at(x, 18), n)
    add_products(at(a, N9), at(b, N9), at(x, 21), n)
    if not diagonal:
        add_products(a, at(b, N9), at(x, 3), n)


@inner(void(F8, *[f8] * 6))
def put(e, x, y, z, e0, e1, e2):
    """Write a column of E: three numbers and, after them, x, y, z times these."""
    e[0], e[N3], e[N6] = e0, e1, e2
    e[N9], e[N12], e[N15] = y * e2 - z * e1, z * e0 - x * e2, x * e1 - y * e0


@inner(void(F8, F8, F8, F4, F8))
def whiten(t, p, c, w, rhs):
    """
    Write E = V (L^-1 W)^T of a cell to e (18 * LANES).

    Row by row, chunk by chunk, column by column. V W^T of Q is added to ``rhs``.
    """
    c0, c1, c2 = c[0], c[1], c[2]
    for i in range(N6):
        t[W0 + i] = w[i]
    for i in range(LANES):
        x, y, z = p[i] - c0, p[N + i] - c1, p[N2 + i] - c2
        a0, a1, a2, b0, b1, b2 = t[W0 + i], t[W1 + i], t[W2 + i], t[W3 + i], t[W4 + i], t[W5 + i]
        a, b = (
            a0 * t[Q0 + i] + a1 * t[Q1 + i] + a2 * t[Q2 + i],
            b0 * t[Q0 + i] + b1 * t[Q1 + i] + b2 * t[Q2 + i],
        )
        m0, m1, m2 = a0 * a + b0 * b, a1 * a + b1 * b, a2 * a + b2 * b
        rhs[i] += m0
        rhs[N + i] += m1
        rhs[N2 + i] += m2
        rhs[N3 + i] += y * m2 - z * m1
        rhs[N4 + i] += z * m0 - x * m2
        rhs[N5 + i] += x * m1 - y * m0
    for first in range(0, LANES, CHUNK):
        for i in range(first, first + CHUNK):
            o0 = 2 * first + i
            o1, o2 = o0 + CHUNK, o0 + 2 * CHUNK
            x, y, z = p[i] - c0, p[N + i] - c1, p[N2 + i] - c2
            a0, a1, a2, b0, b1, b2 = (
                t[W0 + i], t[W1 + i], t[W2 + i], t[W3 + i], t[W4 + i], t[W5 + i],
            )
            u0 = a0 * t[L00 + i]
            u1 = (a1 - t[L10 + i] * u0) * t[L11 + i]
            u2 = (a2 - t[L20 + i] * u0 - t[L21 + i] * u1) * t[L22 + i]
            v0 = b0 * t[L00 + i]
            v1 = (b1 - t[L10 + i] * v0) * t[L11 + i]
            v2 = (b2 - t[L20 + i] * v0 - t[L21 + i] * v1) * t[L22 + i]
            put(at(t, E + o0), x, y, z, a0 * u0 + b0 * v0, a1 * u0 + b1 * v0, a2 * u0 + b2 * v0)
            put(at(t, E + o1), x, y, z, a0 * u1 + b0 * v1, a1 * u1 + b1 * v1, a2 * u1 + b2 * v1)
            put(at(t, E + o2), x, y, z, a0 * u2 + b0 * v2, a1 * u2 + b1 * v2, a2 * u2 + b2 * v2)


@inner(*(void(kind, kind, F8, i8) for kind in (F4, F8)))
def add_products(a, b, x, n):
    """
    Add to a corner of a block x three rows of E times three, n numbers each: the innermost loop.

    So many at a time, so that what is read is used thrice.
    """
    s00 = s01 = s02 = s10 = s11 = s12 = s20 = s21 = s22 = np.float32(0)
    for i in range(n):
        a0, a1, a2 = a[i], a[N3 + i], a[N6 + i]
        b0, b1, b2 = b[i], b[N3 + i], b[N6 + i]
        s00 += a0 * b0
        s01 += a0 * b1
        s02 += a0 * b2
        s10 += a1 * b0
        s11 += a1 * b1
        s12 += a1 * b2
        s20 += a2 * b0
        s21 += a2 * b1
        s22 += a2 * b2
    x[0] += s00
    x[1] += s01
    x[2] += s02
    x[6] += s10
    x[7] += s11
    x[8] += s12
    x[12] += s20
    x[13] += s21
    x[14] += s22


@inner(types.UniTuple(f8, 2)(F8, F8, F8, i8, I8, I8, F4, F8, f8, F8, F8))
def step_points(t, c, p, blocks, cell_of_block, cell_pose, jacobian, point, damping, step, moved):
    """
    Write to ``moved`` the landmarks after the step that follows the cameras'.

    Returns its slope and its damped length.
    """
    slope, length = 0.0, 0.0
    for b in range(blocks):
        h, here, there = at(point, N9 * b), at(p, N3 * b), at(moved, N3 * b)
        for i in range(N3):
            t[Q0 + i] = -h[N6 + i]
        for cell in range(cell_of_block[b], cell_of_block[b + 1]):
            k = cell_pose[cell]
            recall(t, here, at(c, 3 * k), at(jacobian, N6 * cell), at(step, 6 * k))
        factor_points(t, h, damping)
        solve_points(t)
        for i in range(LANES):
            x, y, z = t[Q0 + i], t[Q1 + i], t[Q2 + i]
            slope += x * h[N6 + i] + y * h[N7 + i] + z * h[N8 + i]
            length += x * x * h[i] + y * y * h[N2 + i] + z * z * h[N5 + i]
        for i in range(N3):
            there[i] = here[i] + t[Q0 + i]
    return slope, length


@inner(void(F8, F8, F8, F4, F8))
def recall(t, p, c, w, step):
    """W V^T of a camera's step, added to Q: what the step does to a block's landmarks."""
    c0, c1, c2 = c[0], c[1], c[2]
    s0, s1, s2, s3, s4, s5 = step[0], step[1], step[2], step[3], step[4], step[5]
    for i in range(LANES):
        x, y, z = p[i] - c0, p[N + i] - c1, p[N2 + i] - c2
        v0, v1, v2 = s0 + s4 * z - s5 * y, s1 + s5 * x - s3 * z, s2 + s3 * y - s4 * x
        a0, a1, a2, b0, b1, b2 = (
            w[i], w[N + i], w[N2 + i], w[N3 + i], w[N4 + i], w[N5 + i],
        )
        a, b = a0 * v0 + a1 * v1 + a2 * v2, b0 * v0 + b1 * v1 + b2 * v2
        t[Q0 + i] += a0 * a + b0 * b
        t[Q1 + i] += a1 * a + b1 * b
        t[Q2 + i] += a2 * a + b2 * b


@inner(void(*[F8] * 8, i8, i8, I8, I8, I8, F8, F8))
def stay(
    t, R, R_new, q, c, p, q_new, c_new, K, blocks, cell_of_block, cell_pose, layer_of_cell, rows,
    p_new,
):  # fmt: skip
    """Put landmarks that passed a camera where system.py's ``stay`` does."""
    rotations(q, K, R)
    rotations(q_new, K, R_new)
    for b in range(blocks):
        here, there = at(p, N3 * b), at(p_new, N3 * b)
        for cell in range(cell_of_block[b], cell_of_block[b + 1]):
            k = cell_pose[cell]
            project(t, here, at(R, 9 * k), at(c, 3 * k))
            copy(at(t, FRONT), at(t, S), N)
            project(t, there, at(R_new, 9 * k), at(c_new, 3 * k))
            for layer in range(layer_of_cell[cell], layer_of_cell[cell + 1]):
                seen = at(rows, (5 * layer + 2) * N)
                for i in range(LANES):
                    if t[S + i] != t[FRONT + i] and seen[i] > 0:
                        for j in range(3):
                            there[j * N + i] = here[j * N + i] + c_new[3 * k + j] - c[3 * k + j]
