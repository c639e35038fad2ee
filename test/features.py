"""What the tests of matching share: features, corners and matches of images."""

from imatching_ros.matching.detector import detect
import numpy as np
import torch


def encoded(matcher, *images, exact=False):
    with torch.no_grad():
        return matcher.encode(torch.tensor(np.stack(images))[:, None].float() / 255, exact)


def corners(image, count=300):
    return torch.from_numpy(detect(image, count))


def found(matcher, reference, target, queries):
    """Return uv (N, 2) of queries (N, 2)."""
    with torch.no_grad():
        return matcher.match(
            encoded(matcher, reference), encoded(matcher, target), queries[None]
        ).uv[0]
