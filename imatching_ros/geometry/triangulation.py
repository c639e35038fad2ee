"""Points from many views at once: batched, masked, robust."""

from __future__ import annotations

import torch
from torch import Tensor

from imatching_ros.geometry import lie


def rays(T_world_camera: Tensor, xy: Tensor) -> Tensor:
    """Unit directions (..., 3), world axes, of image points (..., 2) on the plane z = 1."""
    direction = lie.rotate(T_world_camera[..., 3:], torch.cat((xy, torch.ones_like(xy[..., :1])), -1))
    return direction / direction.norm(dim=-1, keepdim=True)


def reproject(T_world_camera: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Points (..., 3) on the plane z = 1 of cameras (..., 7): coordinates (..., 2) and depth (...).

    Behind the camera (depth <= 0) the coordinates are not meaningful.
    """
    p = lie.act(lie.inverse(T_world_camera), points)
    return p[..., :2] / p[..., 2:], p[..., 2]


def triangulate(T_world_camera: Tensor, xy: Tensor, mask: Tensor, sweeps: int = 3) -> Tensor:
    """Points that many views see, by the angular error of their rays.

    T_world_camera: (..., V, 7). xy: (..., V, 2) on the plane z = 1. mask: (..., V) bool, views that count.
    Leading shapes broadcast. Returns (..., 3), NaN where fewer than two views count or all rays are parallel.
    Weighted midpoint: a ray's distance is divided by the point's distance of the sweep before.
    """
    direction = rays(T_world_camera, torch.where(mask[..., None], xy, torch.zeros_like(xy)))
    centre = T_world_camera[..., :3]
    # Projectors onto the planes orthogonal to the rays: the normal equations of the distances.
    eye = torch.eye(3, dtype=xy.dtype)
    projector = eye - direction[..., :, None] * direction[..., None, :]
    weight = mask.to(xy.dtype)
    origin = (centre * weight[..., None]).sum(-2) / weight.sum(-1, keepdim=True).clamp_min(1)
    offset = centre - origin[..., None, :]
    projected = (projector @ offset[..., None]).squeeze(-1)
    for _ in range(sweeps):
        H = (projector * weight[..., None, None]).sum(-3)
        b = (projected * weight[..., None]).sum(-2)
        point = solve3(H, b)
        distance2 = (point[..., None, :] - offset).square().sum(-1)
        weight = mask / distance2.clamp_min(1e-12)
    point = torch.where(mask.sum(-1, keepdim=True) >= 2, point, torch.nan)
    return point + origin


def solve3(H: Tensor, b: Tensor) -> Tensor:
    """Solve symmetric systems H x = b, (..., 3, 3) and (..., 3), in closed form; NaN where singular to rounding."""
    r0, r1, r2 = H.unbind(-2)
    c0, c1, c2 = torch.linalg.cross(r1, r2), torch.linalg.cross(r2, r0), torch.linalg.cross(r0, r1)
    determinant = (r0 * c0).sum(-1, keepdim=True)
    size = H.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None] / 3
    x = c0 * b[..., :1] + c1 * b[..., 1:2] + c2 * b[..., 2:]
    return torch.where(determinant > 1e-12 * size**3, x / determinant, torch.nan)


def parallax(T_world_camera: Tensor, xy: Tensor, mask: Tensor) -> Tensor:
    """The largest angle (...), radians, between any two rays of a point; arguments as in ``triangulate``."""
    direction = rays(T_world_camera, torch.where(mask[..., None], xy, torch.zeros_like(xy)))
    cosine = direction @ direction.mT
    both = mask[..., :, None] & mask[..., None, :]
    return torch.where(both, cosine, 1.0).flatten(-2).amin(-1).clamp(-1, 1).acos()


def inliers_of(points: Tensor, T_world_camera: Tensor, xy: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """Views (..., V) bool that count, see the point (..., 3) in front and reproject within ``threshold`` (z = 1)."""
    predicted, depth = reproject(T_world_camera, points[..., None, :])
    error = (predicted - xy).square().sum(-1)
    return mask & (depth > 0) & (error < threshold * threshold)


def triangulate_robust(
    T_world_camera: Tensor, xy: Tensor, mask: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    """Triangulation when some views are wrong (paper 3.1.2, RANSAC-based multi-view triangulation).

    T_world_camera: (V, 7). xy: (L, V, 2). mask: (L, V). threshold: reprojection error on the plane z = 1.
    Returns points (L, 3) (NaN where there is none) and the views that agree (L, V) bool.
    All views are tried together; where one of them disagrees, three sets of pairs besides: each view with the next,
    with the one a third and the one half of the track further (all pairs there are, up to six views). The hypothesis
    with most agreeing views is fitted again to them. Tried exhaustively, it needs no chance.
    """
    point = triangulate(T_world_camera, xy, mask)
    agree = inliers_of(point, T_world_camera, xy, mask, threshold)
    views = mask.sum(-1)
    torn = ((agree.sum(-1) < views) & (views > 2)).nonzero().squeeze(-1)
    if len(torn):
        best, most = _best_pair(T_world_camera, xy[torn], mask[torn], threshold)
        point, agree = _better(point, agree, torn, best, most)
        fitted = triangulate(T_world_camera, xy[torn], agree[torn])
        refitted = inliers_of(fitted, T_world_camera, xy[torn], mask[torn], threshold)
        point, agree = _better(point, agree, torn, fitted, refitted)
    return torch.where(agree.sum(-1, keepdim=True) >= 2, point, torch.nan), agree


def _best_pair(T_world_camera: Tensor, xy: Tensor, mask: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Of the points that pairs of views give, the one that most views agree with: (L, 3), (L, V)."""
    views = mask.sum(-1, keepdim=True)
    longest = int(views.max())
    seen = torch.argsort(~mask, dim=-1, stable=True)[:, :longest]  # the views that count, first
    rank = torch.arange(longest).expand(len(mask), longest)
    firsts, seconds = [], []
    for stride in (1, views // 3, views // 2):
        partner = (rank + torch.as_tensor(stride).clamp_min(1)) % views
        firsts.append(seen)
        seconds.append(torch.take_along_dim(seen, partner, 1))
    one = torch.eye(mask.shape[1], dtype=torch.bool)
    pairs = (one[torch.cat(firsts, 1)] | one[torch.cat(seconds, 1)]) & mask[:, None]
    points = triangulate(T_world_camera, xy[:, None], pairs)  # (L, H, 3)
    agree = inliers_of(points, T_world_camera, xy[:, None], mask[:, None], threshold)
    best = agree.sum(-1).argmax(-1)[:, None, None]
    return torch.take_along_dim(points, best, 1).squeeze(1), torch.take_along_dim(agree, best, 1).squeeze(1)


def _better(point: Tensor, agree: Tensor, where: Tensor, other: Tensor, other_agree: Tensor) -> tuple[Tensor, Tensor]:
    """``point`` and ``agree`` with those rows ``where`` the other ones agree with more views replaced."""
    more = other_agree.sum(-1) >= agree[where].sum(-1)
    point, agree = point.clone(), agree.clone()
    point[where[more]], agree[where[more]] = other[more], other_agree[more]
    return point, agree
