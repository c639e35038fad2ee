"""Where points lie that many views see: many at once, and though some views are wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from . import lie

_AT_ONCE = 256  #: tracks whose pairs of views are tried at once


def rays(T_world_camera: Tensor, xy: Tensor) -> Tensor:
    """Return unit directions (..., 3), world axes, of image points (..., 2) on the plane z = 1."""
    direction = lie.rotate(
        T_world_camera[..., 3:], torch.cat((xy, torch.ones_like(xy[..., :1])), -1)
    )
    return direction / direction.norm(dim=-1, keepdim=True)


def reproject(T_world_camera: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """
    Return where cameras (..., 7) see points (..., 3): (..., 2) on the plane z = 1, depth (...).

    Behind the camera (depth <= 0) the coordinates are not meaningful.
    """
    X, Y, Z = _in_camera(T_world_camera, points)
    return torch.stack((X / Z, Y / Z), -1), Z


def _in_camera(T_world_camera: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    Return R^T (p - c), the points in the cameras' frames, as three coordinates (...).

    This is several times faster than tensors whose last dimension is 3.
    """
    R, c = lie.rotation(T_world_camera[..., 3:]), T_world_camera[..., :3]
    x, y, z = (points[..., i] - c[..., i] for i in range(3))
    return tuple(R[..., 0, i] * x + R[..., 1, i] * y + R[..., 2, i] * z for i in range(3))


def triangulate(T_world_camera: Tensor, xy: Tensor, mask: Tensor, sweeps: int = 3) -> Tensor:
    """
    Return the points (..., 3) that many views see, by the angular error of their rays.

    T_world_camera: (..., V, 7). xy: (..., V, 2) on the plane z = 1. mask: (..., V) bool, views
    that count. Leading shapes broadcast. A point is NaN where fewer than two views count or all
    rays are parallel. It is a weighted midpoint: a ray's distance is divided by the point's
    distance of the sweep before.
    """
    direction = rays(T_world_camera, torch.where(mask[..., None], xy, torch.zeros_like(xy)))
    return intersect(T_world_camera[..., :3], direction, mask, sweeps)


def intersect(centre: Tensor, direction: Tensor, mask: Tensor, sweeps: int = 3) -> Tensor:
    """
    Return what :func:`triangulate` does, from the rays themselves.

    They have centres (..., V, 3) and unit directions (..., V, 3), in the world's axes.
    """
    weight = mask.to(direction.dtype)
    origin = (centre * weight[..., None]).sum(-2) / weight.sum(-1, keepdim=True).clamp_min(1)
    x, y, z = (centre - origin[..., None, :]).unbind(-1)
    a, b, c = direction.unbind(-1)
    # I - d d^T, the projector onto the plane orthogonal to a ray, and what it makes of the centre.
    # (..., 6, V)
    projector = torch.stack((1 - a * a, -a * b, -a * c, 1 - b * b, -b * c, 1 - c * c), -2)
    along = a * x + b * y + c * z
    projected = torch.stack((x - a * along, y - b * along, z - c * along), -2)
    rows = torch.cat((projector, projected), -2)  # (..., 9, V)
    for _ in range(sweeps):
        point = _solve3(*(rows @ weight[..., None]).squeeze(-1).unbind(-1))
        distance2 = sum(
            (p[..., None] - q).square() for p, q in zip(point.unbind(-1), (x, y, z), strict=True)
        )
        weight = mask / distance2.clamp_min(1e-12)
    point = torch.where(mask.sum(-1, keepdim=True) >= 2, point, torch.nan)
    return point + origin


def _solve3(
    xx: Tensor, xy: Tensor, xz: Tensor, yy: Tensor, yz: Tensor, zz: Tensor, *b: Tensor
) -> Tensor:
    """
    Solve symmetric 3x3 systems with these elements (...) for b, three of (...), by cofactors.

    The solution is (..., 3), NaN where a system is singular to rounding.
    """
    u, v, w = yy * zz - yz * yz, xz * yz - xy * zz, xy * yz - xz * yy
    determinant = xx * u + xy * v + xz * w
    size = (xx + yy + zz) / 3
    inverse = torch.where(determinant > 1e-12 * size**3, 1 / determinant, torch.nan)
    q, r, s = xx * zz - xz * xz, xy * xz - xx * yz, xx * yy - xy * xy
    x, y, z = (
        u * b[0] + v * b[1] + w * b[2], v * b[0] + q * b[1] + r * b[2],
        w * b[0] + r * b[1] + s * b[2],
    )
    return torch.stack((x * inverse, y * inverse, z * inverse), -1)


def parallax(T_world_camera: Tensor, xy: Tensor, mask: Tensor) -> Tensor:
    """
    Return the largest angle (...), radians, between any two rays of a point.

    The arguments are those of :func:`triangulate`.
    """
    direction = rays(T_world_camera, torch.where(mask[..., None], xy, torch.zeros_like(xy)))
    cosine = direction @ direction.mT
    both = mask[..., :, None] & mask[..., None, :]
    return torch.where(both, cosine, 1.0).flatten(-2).amin(-1).clamp(-1, 1).acos()


def inliers_of(
    points: Tensor, T_world_camera: Tensor, xy: Tensor, mask: Tensor, threshold: float
) -> Tensor:
    """
    Return the views (..., V) bool that count, see the point in front, and agree with it.

    They do where the point (..., 3) reprojects within ``threshold`` on the plane z = 1.
    """
    X, Y, Z = _in_camera(T_world_camera, points[..., None, :])
    # Not divided by the depth: |X - x Z|^2 < (threshold Z)^2
    error = (X - xy[..., 0] * Z).square() + (Y - xy[..., 1] * Z).square()
    return mask & (Z > 0) & (error < (threshold * Z).square())


def triangulate_robust(
    T_world_camera: Tensor, xy: Tensor, mask: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    """
    Triangulate though some views are wrong (paper 3.1.2, RANSAC-based multi-view triangulation).

    T_world_camera: (V, 7). xy: (L, V, 2). mask: (L, V). threshold: reprojection error on the plane
    z = 1. Returns points (L, 3), NaN where there is none, and the views that agree (L, V) bool.
    All views are tried together; where one of them disagrees, three sets of pairs besides: each
    view with the next, with the one a third and the one half of the track further (all pairs there
    are, up to six views). The hypothesis with most agreeing views is fitted again to them. Tried
    exhaustively, it needs no chance.
    """
    point = triangulate(T_world_camera, xy, mask)
    agree = inliers_of(point, T_world_camera, xy, mask, threshold)
    views = mask.sum(-1)
    torn = ((agree.sum(-1) < views) & (views > 2)).nonzero().squeeze(-1)
    if len(torn):
        best, most = torch.full_like(point[torn], torch.nan), torch.zeros_like(mask[torn])
        # Those with as many views together: over a whole recording, most tracks are short.
        for some in torch.argsort(views[torn], stable=True).split(_AT_ONCE):
            best[some], most[some] = _best_pair(
                T_world_camera, xy[torn[some]], mask[torn[some]], threshold
            )
        point, agree = _better(point, agree, torn, best, most)
        fitted = triangulate(T_world_camera, xy[torn], agree[torn])
        refitted = inliers_of(fitted, T_world_camera, xy[torn], mask[torn], threshold)
        point, agree = _better(point, agree, torn, fitted, refitted)
    return torch.where(agree.sum(-1, keepdim=True) >= 2, point, torch.nan), agree


def _best_pair(
    T_world_camera: Tensor, xy: Tensor, mask: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    """
    Return, of the points that pairs of views give, the one that most views agree with.

    Returned are points (L, 3) and the views that agree (L, V).
    """
    views = mask.sum(-1, keepdim=True)
    longest = int(views.max())
    seen = torch.argsort(~mask, dim=-1, stable=True)[:, :longest]  # the views that count, first
    rank = torch.arange(longest).expand(len(mask), longest)
    firsts, seconds = [], []
    for stride in (1, views // 3, views // 2):
        partner = (rank + torch.as_tensor(stride).clamp_min(1)) % views
        firsts.append(seen)
        seconds.append(torch.take_along_dim(seen, partner, 1))
    pair = torch.stack((torch.cat(firsts, 1), torch.cat(seconds, 1)), -1)  # (L, H, 2)
    centre = T_world_camera[:, :3]
    direction = rays(T_world_camera, torch.where(mask[..., None], xy, 0.0))
    row = torch.arange(len(mask))[:, None, None]
    both = mask[row, pair] & (pair[..., :1] != pair[..., 1:])
    points = intersect(centre[pair], direction[row, pair], both)  # (L, H, 3)
    mine = row[..., 0]
    cameras = (
        T_world_camera[seen][:, None], xy[mine, seen][:, None], mask[mine, seen][:, None]
    )
    agree = inliers_of(points, *cameras, threshold)  # (L, H, longest)
    best = agree.sum(-1).argmax(-1)[:, None, None]
    chosen = torch.zeros_like(mask).scatter_(
        1, seen, torch.take_along_dim(agree, best, 1).squeeze(1)
    )
    return torch.take_along_dim(points, best, 1).squeeze(1), chosen


def _better(
    point: Tensor, agree: Tensor, where: Tensor, other: Tensor, other_agree: Tensor
) -> tuple[Tensor, Tensor]:
    """
    Return ``point`` and ``agree`` with those rows replaced that others are better than.

    The others stand for the rows ``where``, and are better where at least as many views agree with
    them.
    """
    more = other_agree.sum(-1) >= agree[where].sum(-1)
    point, agree = point.clone(), agree.clone()
    point[where[more]], agree[where[more]] = other[more], other_agree[more]
    return point, agree
