"""
The Schur complement: landmarks eliminated from the normal equations, block by block.

With the Cholesky factors L L^T of the damped Hpp, E = -Hcp L^-T = V (L^-1 W)^T and y = L^-1 gp the
reduced system is Hcc - E E^T with the gradient gc + E y. A cell's E is 6 x 3 numbers per lane; it
stands row by row, chunk by chunk, column by column, so that a product of two cells is three sums
over contiguous numbers for each of its elements.
"""

from __future__ import annotations

import math

import numpy as np

from .lanes import (
    CHUNK,
    L00,
    L10,
    L11,
    L20,
    L21,
    L22,
    LANES,
    N,
    N2,
    N3,
    N4,
    N5,
    N6,
    N9,
    N12,
    N15,
    N18,
    Q0,
    Q1,
    Q2,
    W0,
    W1,
    W2,
    W3,
    W4,
    W5,
)
from .poses import clear, copy
from ....jit import at, entry, F4, f4, F8, f8, I8, i8, inner, void

_ints, _numbers, _rows, _narrow = i8[::1], f8[::1], f8[:, ::1], f4[::1]


@inner(void(F8, F8, f8))
def factor_points(t, h, damping):
    """Factor a block's damped Hpp in closed form; L's diagonal is kept as its inverse."""
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
    """Solve (L L^T) x = Q of a block's landmarks, and write x over Q."""
    for i in range(LANES):
        l00, l10, l11, l20, l21, l22 = (
            t[L00 + i], t[L10 + i], t[L11 + i], t[L20 + i], t[L21 + i], t[L22 + i],
        )
        z0 = t[Q0 + i] * l00
        z1 = (t[Q1 + i] - l10 * z0) * l11
        z2 = (t[Q2 + i] - l20 * z0 - l21 * z1) * l22 * l22
        z1 = (z1 - l21 * z2) * l11
        t[Q0 + i], t[Q1 + i], t[Q2 + i] = (z0 - l10 * z1 - l20 * z2) * l00, z1, z2


@inner(*(
    void(F8, F8, F8, i8, i8, I8, I8, I8, F4, F8, f8, I8, I8, F8, F8, E, I8) for E in (F4, F8)
))
def eliminate(
    t, c, p, K, blocks, cell_of_block, cell_pose, chunks, jacobian, point, damping, held, envelope,
    reduced, rhs, e, cells,
):
    """
    Eliminate the landmarks from the equations of all poses that are not ``held`` (K,).

    E E^T goes into ``reduced`` (K, K, 6, 6), lower blocks, and E y into the lanes of ``rhs``
    (K, 6 * LANES). e: (K, 18 * LANES), float32 or float64, room for a block's E, and cells: (K,),
    room.
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
                    t, at(p, N3 * b), at(c, 3 * k), at(jacobian, N6 * cell),
                    at(e, N18 * n), at(rhs, N6 * k),
                )
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
                    a, b_ = at(e, N18 * i + begin), at(e, N18 * j + begin)
                    add_products(a, b_, x, end - begin)
                    add_products(at(a, N9), b_, at(x, 18), end - begin)
                    add_products(at(a, N9), at(b_, N9), at(x, 21), end - begin)
                    if i > j:
                        add_products(a, at(b_, N9), at(x, 3), end - begin)


@inner(*(void(E, *[f8] * 6) for E in (F4, F8)))
def put(e, x, y, z, e0, e1, e2):
    """Write a column of E: three numbers and, after them, the cross product d x these."""
    e[0], e[N3], e[N6] = e0, e1, e2
    e[N9], e[N12], e[N15] = y * e2 - z * e1, z * e0 - x * e2, x * e1 - y * e0


@inner(*(void(F8, F8, F8, F4, E, F8) for E in (F4, F8)))
def whiten(t, p, c, w, e, rhs):
    """
    Write E = V (L^-1 W)^T of a cell to e (18 * LANES), and add V W^T Q to ``rhs``.

    p: its block's landmarks, c: its camera's centre, w: its W.
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
            put(at(e, o0), x, y, z, a0 * u0 + b0 * v0, a1 * u0 + b1 * v0, a2 * u0 + b2 * v0)
            put(at(e, o1), x, y, z, a0 * u1 + b0 * v1, a1 * u1 + b1 * v1, a2 * u1 + b2 * v1)
            put(at(e, o2), x, y, z, a0 * u2 + b0 * v2, a1 * u2 + b1 * v2, a2 * u2 + b2 * v2)


@inner(*(void(E, E, F8, i8) for E in (F4, F8)))
def add_products(a, b, x, n):
    """
    Add three rows of E times three others, n numbers each, to a corner of a 6 x 6 block x.

    This is the innermost loop; with three by three at a time, all that is read is used thrice.
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


@entry(void(i8, _numbers, _rows, *[_numbers] * 2, *[_ints] * 4, _narrow, *[_numbers] * 3, _ints))
def eliminate_exactly(
    blocks, t, c, p, point, cell_of_block, cell_pose, chunks, envelope, jacobian, reduced, rhs, e,
    held,
):
    """Eliminate without damping, with products in float64. held: (2 K,), zeros and room."""
    K = len(c)
    eliminate(
        at(t, 0), at(c, 0), at(p, 0), K, blocks, at(cell_of_block, 0), at(cell_pose, 0),
        at(chunks, 0), at(jacobian, 0), at(point, 0), 0.0, at(held, 0), at(envelope, 0),
        at(reduced, 0), at(rhs, 0), at(e, 0), at(held, K),
    )
