"""
RTAB-Map's detector and matcher in Python: give this file to PyDetector/Path and PyMatcher/Path.

RTAB-Map shows images to its detector, and key points with descriptors, but no images, to its
matcher. So the features of the last images are kept here, and found again by their descriptors.
Pairs of images that are no longer kept, such as loop closures, are matched by the descriptors
themselves. It imports this file by its name, as a module of its own.
"""

from collections import deque
from dataclasses import dataclass

from imatching_ros.matching import weights
from imatching_ros.matching.detector import detect as corners
from imatching_ros.matching.encoder import COARSE, Features
from imatching_ros.matching.families.expectation import ExpectationMatcher
from imatching_ros.matching.tracker import round_trip, TrackerOptions
import numpy as np
import torch

POINTS = 1000  #: of an image at most; RTAB-Map keeps Vis/MaxFeatures of them
KEPT = 50  #: images
PAIR_PX = 3.0  #: a key point this close to where its partner is found is the same point


@dataclass
class _Image:
    pixels: torch.Tensor  # (1, 1, H, W) in [0, 1]
    features: Features
    rows: set[bytes]  # its descriptors


_matcher: ExpectationMatcher | None = None
_images: deque[_Image] = deque(maxlen=KEPT)


def init(*given) -> None:
    """
    Load the matcher, as PyDetector, or PyMatcher, of RTAB-Map asks for it.

    PyDetector gives (cuda), PyMatcher (dimension, threshold, iterations, cuda, model), where model
    may be the path of a weights file.
    """
    global _matcher
    cuda, model = (given[0], '') if len(given) == 1 else given[3:]
    if _matcher is None or model.endswith('.safetensors'):
        _matcher, _ = weights.load(
            model if model.endswith('.safetensors') else weights.default_path()
        )
        _matcher.eval().to('cuda' if cuda and torch.cuda.is_available() else 'cpu')
        for image in _images:
            image.features = _encode(image.pixels)


@torch.no_grad()
def detect(image) -> tuple[np.ndarray, np.ndarray]:
    """
    Return key points and descriptors (N, 64) float32 of an image (H, W) uint8.

    Key points are (N, 3) float32, x y response.
    """
    image = np.array(image)  # RTAB-Map's own memory ends with this call
    uv = corners(image, POINTS)
    pixels = torch.from_numpy(image).float()[None, None] / 255
    features = _encode(pixels)
    u, v = (uv // COARSE).astype(int).T
    rows = np.ascontiguousarray(features.coarse[0].cpu().numpy()[:, v, u].T, np.float32)
    _images.append(_Image(pixels, features, {row.tobytes() for row in rows}))
    strength = np.linspace(1, 0, len(uv), endpoint=False)  # the detector gives the strongest first
    return np.column_stack((uv, strength)).astype(np.float32), rows


@torch.no_grad()
def match(
    kpts_from, kpts_to, scores_from, scores_to, descriptors_from, descriptors_to, width, height
) -> np.ndarray:
    """
    Return the pairs (M, 2) int64 of key points, indices, that are the same point in both images.

    Key points are (N, 2) and (K, 2), px, descriptors (N, 64) and (K, 64); scores are not used.
    """
    one, two = _find(descriptors_from), _find(descriptors_to)
    if one is None or two is None:
        closeness = torch.from_numpy(np.array(descriptors_from) @ np.array(descriptors_to).T)
    else:
        queries, targets = (
            torch.from_numpy(np.array(points, np.float32)) for points in (kpts_from, kpts_to)
        )
        queries = queries[None].to(one.features.coarse.device)
        found, distance = round_trip(_matcher, one.features, two.features, queries)
        closeness = -torch.cdist(found.uv[0].cpu(), targets)
        apart = (distance[0].cpu() > TrackerOptions.round_trip_px)[:, None] | (
            closeness < -PAIR_PX
        )
        closeness = closeness.masked_fill(apart, -torch.inf)
    if not closeness.numel():
        return np.empty((0, 2), np.int64)
    forward, backward = closeness.argmax(1), closeness.argmax(0)
    index = torch.arange(len(forward))
    mutual = (backward[forward] == index) & closeness[index, forward].isfinite()
    return np.column_stack((index[mutual], forward[mutual])).astype(np.int64)


def _encode(pixels: torch.Tensor) -> Features:
    return _matcher.encode(pixels.to(next(_matcher.parameters()).device))


def _find(descriptors) -> _Image | None:
    """Return the image that these descriptors, or more, are of."""
    rows = {row.tobytes() for row in np.array(descriptors, np.float32)}
    return next((image for image in reversed(_images) if rows <= image.rows), None)
