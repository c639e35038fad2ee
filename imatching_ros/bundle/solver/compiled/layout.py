"""
Where every observation stands: blocks, cells and layers.

Observed landmarks are sorted by the keyframes they span and stand in blocks of ``LANES``. A block
holds a *cell* for every pose that any of its landmarks is seen by, a cell one *layer* per row that
observes it; what is missing has no information.
"""

from __future__ import annotations

from numba import types

from .lanes import CHUNK, LANES, N
from ....jit import at, b1, entry, F8, I8, i8, inner, void

_ints = i8[::1]


@entry(types.UniTuple(i8, 3)(_ints, _ints, i8, i8, *[_ints] * 10))
def layout(
    pose, landmark, poses, landmarks, order, cell_of_block, cell_pose, layer_of_cell, chunks,
    slot, lane, envelope, room, count,
):
    """
    Say where every observation goes, and return how many blocks, cells and layers there are.

    It fills order: (blocks * LANES,), the landmark in each lane, -1 in a lane that is left over.
    cell_of_block: (blocks + 1,), each block's first cell. cell_pose: (cells,). layer_of_cell:
    (cells + 1,), each cell's first layer. chunks: (2 * cells,), the first chunk of lanes with
    something in a cell, and the one after the last. slot and lane: (O,), an observation's layer
    and lane. envelope: (K,), the first pose that shares a landmark with each. The arrays may be
    longer. room: (4 L + K^2 + K + 2,). count: (K * LANES,) zeros.
    """
    observations, pose, landmark = len(pose), at(pose, 0), at(landmark, 0)
    low, high, place = at(room, 0), at(room, landmarks), at(room, 2 * landmarks)
    first_row = at(room, 3 * landmarks)
    start, base = at(first_row, landmarks + 1), at(first_row, landmarks + 2 + poses * poses)
    order, cell_of_block, cell_pose = at(order, 0), at(cell_of_block, 0), at(cell_pose, 0)
    layer_of_cell, chunks, count = at(layer_of_cell, 0), at(chunks, 0), at(count, 0)
    slot, lane, envelope = at(slot, 0), at(lane, 0), at(envelope, 0)
    cell_of_block[0] = layer_of_cell[0] = 0
    for m in range(landmarks):
        low[m], high[m], place[m], first_row[m + 1] = poses, -1, -1, 0
    for o in range(observations):
        m, k = landmark[o], pose[o]
        low[m], high[m] = min(low[m], k), max(high[m], k)
        first_row[m + 1] += 1
    first_row[0] = 0
    for m in range(landmarks):
        first_row[m + 1] += first_row[m]
    # Counting sort of the observed landmarks by first pose, two at a time, and last, these up and
    # down: neighbours see much the same.
    for n in range(poses * poses + 1):
        start[n] = 0
    for m in range(landmarks):
        if high[m] >= 0:
            pair = low[m] // 2
            place[m] = pair * poses + (high[m] if pair % 2 else poses - 1 - high[m])
            start[place[m] + 1] += 1
    for n in range(poses * poses):
        start[n + 1] += start[n]
    blocks = (start[poses * poses] + LANES - 1) // LANES
    for n in range(blocks * LANES):
        order[n] = -1
    for m in range(landmarks):
        if place[m] >= 0:
            order[start[place[m]]] = m
            start[place[m]] += 1
    for k in range(poses):
        envelope[k] = k
    cells, layers = 0, 0
    for b in range(blocks):
        begin, end, block = poses, -1, at(order, b * LANES)
        for i in range(LANES):
            m = block[i]
            if m < 0:
                continue
            begin, end = min(begin, low[m]), max(end, high[m])
            for o in range(first_row[m], first_row[m + 1]):
                k = pose[o]
                slot[o], lane[o] = count[k * LANES + i], i
                count[k * LANES + i] += 1
                envelope[k] = min(envelope[k], low[m])
        for k in range(begin, end + 1):
            deepest, left, right, seen = 0, LANES, 0, at(count, k * LANES)
            for i in range(LANES):
                if seen[i] > 0:
                    left, right = min(left, i), i
                    deepest = max(deepest, seen[i])
                    seen[i] = 0
            if deepest:
                base[k] = layers
                cell_pose[cells] = k
                chunks[2 * cells], chunks[2 * cells + 1] = left // CHUNK, right // CHUNK + 1
                layers += deepest
                cells += 1
                layer_of_cell[cells] = layers
        cell_of_block[b + 1] = cells
        for i in range(LANES):
            m = block[i]
            if m >= 0:
                for o in range(first_row[m], first_row[m + 1]):
                    slot[o] += base[pose[o]]
    return blocks, cells, layers


@inner(void(i8, I8, I8, F8, F8, F8))
def place_observations(observations, slot, lane, xy, cov, rows):
    """Write x, y and the information's uu, uv, vv to rows (layers, 5 * LANES) of zeros."""
    for o in range(observations):
        row, mean, v = at(rows, 5 * N * slot[o] + lane[o]), at(xy, 2 * o), at(cov, 3 * o)
        determinant = v[0] * v[2] - v[1] * v[1]
        row[0], row[N] = mean[0], mean[1]
        row[2 * N], row[3 * N] = v[2] / determinant, -v[1] / determinant
        row[4 * N] = v[0] / determinant


@inner(void(i8, I8, F8, F8, F8, b1))
def place_points(slots, order, points, origin, p, back):
    """Write points (L, 3), about the origin, to p (blocks, 3 * LANES), or ``back`` from there."""
    for n in range(slots):
        if order[n] >= 0:
            there, here = at(p, 3 * N * (n // N) + n % N), at(points, 3 * order[n])
            for j in range(3):
                if back:
                    here[j] = there[N * j] + origin[j]
                else:
                    there[N * j] = here[j] - origin[j]
