"""
Makes the shipped weights from nothing: photographs, random warps, exact correspondence.

    python training/pretrain.py PHOTOGRAPHS... --out models/expectation.safetensors

Each pair is one photograph seen through two random homographies, with patches of other photographs
moving on their own in front of it (so that occlusion edges are seen), each view with its own
exposure, blur and noise. The coarse similarities learn by cross entropy over all cells, the fine
expectation by its distance to the truth. Resumable: progress is kept beside the output and taken
up again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
import time

import cv2
from imatching_ros.matching import weights
from imatching_ros.matching.detector import detect
from imatching_ros.matching.expectation import COARSE, ExpectationMatcher
from imatching_ros.matching.warps import apply_homography, in_frame, photometric, random_homography
import numpy as np
import safetensors
import safetensors.torch
import torch

SIZE = (320, 240)  # W, H px of the training views
QUERIES = 256  # per pair
PATCHES = 3  # at most, moving in front
RATE = 2e-3


def read_photographs(paths: list[Path]) -> list[np.ndarray]:
    """Grey photographs, each at three scales, so that a view never samples one too coarsely."""
    files = [
        f
        for p in paths
        for f in (sorted(p.iterdir()) if p.is_dir() else [p])
        if f.suffix in ('.jpg', '.png')
    ]
    photographs = []
    for file in files:
        image = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)
        if image is None:
            raise SystemExit(f'{file}: not an image that can be read')
        for width in (1600, 900, 520):
            scale = width / image.shape[1]
            photographs.append(
                cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            )
    if not photographs:
        raise SystemExit('no photographs (.jpg, .png) were found in the given folders')
    return photographs


def crop(rng: np.random.Generator, photographs: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return a photograph, and the homography that takes a random window of it to a view."""
    image = photographs[rng.integers(len(photographs))]
    height, width = image.shape
    x = rng.uniform(0, max(width - SIZE[0], 1))
    y = rng.uniform(0, max(height - SIZE[1], 1))
    return image, np.array([[1, 0, -x], [0, 1, -y], [0, 0, 1.0]])


def draw_pair(rng: np.random.Generator, photographs: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    """
    Two views (H, W) uint8, queries (N, 2) and their truth (N, 2).

    Queries are in the first view, truth is in the second, both px.
    """
    layers = []
    for index in range(1 + (rng.integers(1, PATCHES + 1) if rng.random() < 0.6 else 0)):
        image, window = crop(rng, photographs)
        mask = np.full(image.shape, 255, np.uint8)
        if index:  # a patch: a random polygon of another photograph
            centre = rng.uniform(0.1, 0.9, 2) * SIZE
            angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 8)))
            radii = rng.uniform(20, 90, len(angles))
            polygon = centre + radii[:, None] * np.stack((np.cos(angles), np.sin(angles)), 1)
            mask[:] = 0
            cv2.fillPoly(
                mask, [np.rint(apply_homography(np.linalg.inv(window), polygon)).astype(np.int32)],
                255,
            )
        layers.append(
            (image, mask, window, random_homography(rng, SIZE, 0.3), random_homography(rng, SIZE))
        )
    views, labels = [], []
    for view in (3, 4):
        canvas = np.zeros(SIZE[::-1], np.uint8)
        label = np.zeros(SIZE[::-1], np.uint8)
        for index, layer in enumerate(layers, 1):
            H = layer[view] @ layer[2]
            border = cv2.BORDER_REFLECT_101 if index == 1 else cv2.BORDER_CONSTANT
            seen = cv2.warpPerspective(layer[1], H, SIZE, flags=cv2.INTER_LINEAR)
            warped = cv2.warpPerspective(
                layer[0], H, SIZE, flags=cv2.INTER_LINEAR, borderMode=border
            )
            if index == 1:
                canvas, label = warped, (seen > 127).astype(np.uint8)
            else:
                canvas = np.where(seen > 127, warped, canvas)
                label = np.where(seen > 127, index, label).astype(np.uint8)
        views.append(canvas)
        labels.append(label)
    corners = detect(views[0], QUERIES // 2)
    scattered = rng.uniform(8, np.array(SIZE) - 9, (QUERIES - len(corners), 2)).astype(np.float32)
    queries = np.concatenate((corners, scattered))
    owner = labels[0][np.rint(queries[:, 1]).astype(int), np.rint(queries[:, 0]).astype(int)]
    truth = np.full_like(queries, np.nan)
    for index, layer in enumerate(layers, 1):
        mine = owner == index
        if mine.any():
            moved = apply_homography(layer[4] @ np.linalg.inv(layer[3]), queries[mine])
            inside = in_frame(moved, SIZE)
            at = np.rint(np.where(inside[:, None], moved, 0)).astype(int)
            visible = inside & (labels[1][at[:, 1], at[:, 0]] == index)
            truth[mine] = np.where(visible[:, None], moved, np.nan)
    return photometric(rng, views[0]), photometric(rng, views[1]), queries, truth


def losses(matcher: ExpectationMatcher, images0, images1, queries, truth):
    """
    Coarse cross entropy, fine distance, calibration, and what is good.

    Calibration is of the covariance; what is good is the share of matches under 1 px.
    """
    known = truth.isfinite().all(-1)
    truth = torch.where(known[..., None], truth, queries)
    features = matcher.encode(torch.cat((images0, images1)))
    batch = len(images0)
    reference, target = features[:batch], features[batch:]
    log_p = matcher.coarse_similarity(reference, target, queries).log_softmax(-1)
    h, w = target.coarse.shape[-2:]
    cell = ((truth - (COARSE - 1) / 2) / COARSE).clamp(min=0)
    low, part = cell.floor().long(), cell - cell.floor()
    coarse = 0.0
    for dx in (0, 1):
        for dy in (0, 1):
            share = (part[..., 0] if dx else 1 - part[..., 0]) * (
                part[..., 1] if dy else 1 - part[..., 1]
            )
            index = (low[..., 1] + dy).clamp(max=h - 1) * w + (low[..., 0] + dx).clamp(max=w - 1)
            coarse = coarse - share * log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    jitter = (torch.rand_like(truth) - 0.5) * 12
    uv, spread = matcher.fine_expectation(reference, target, queries, truth + jitter)
    error = uv - truth
    distance = (error.square().sum(-1) + 0.01).sqrt() - 0.1
    cov = spread.detach() * matcher.log_cov[0].exp() + torch.eye(2) * matcher.log_cov[1].exp()
    # Student's t with 4 degrees of freedom instead of a Gaussian: a few gross errors must not set
    # the scale.
    e = error.detach().unsqueeze(-1)
    m2 = (e.mT @ torch.linalg.solve(cov, e)).flatten(-3)
    calibration = 0.5 * torch.logdet(cov) + 3.0 * torch.log1p(m2 / 4)
    matches = matcher.coarse_expectation(log_p.detach(), target)[0]
    coarse_hit = (matches - truth).norm(dim=-1) < 6
    return (
        coarse[known].mean(), distance[known].mean(), calibration[known].mean(),
        (error.norm(dim=-1) < 1)[known].float().mean(), coarse_hit[known].float().mean(),
    )  # fmt: skip


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('photographs', nargs='+', type=Path)
    parser.add_argument('--out', type=Path, default=Path('models/expectation.safetensors'))
    parser.add_argument('--steps', type=int, default=6000)
    parser.add_argument('--batch', type=int, default=4)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--threads', type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    photographs = read_photographs(options.photographs)
    matcher = ExpectationMatcher(batch_norm=True).to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(matcher.parameters(), lr=RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, options.steps, pct_start=0.1)
    progress = options.out.with_suffix('.progress')
    first = resume(progress, matcher, optimiser, schedule) if progress.exists() else 0
    figures, started = [], time.perf_counter()
    for step in range(first + 1, options.steps + 1):
        pairs = [
            draw_pair(np.random.default_rng((options.seed, step, i)), photographs)
            for i in range(options.batch)
        ]
        images0, images1, queries, truth = (
            np.stack(column) for column in zip(*pairs, strict=True)
        )
        images0, images1 = (
            torch.from_numpy(x).float().unsqueeze(1) / 255 for x in (images0, images1)
        )
        coarse, fine, calibration, hit, coarse_hit = losses(
            matcher, images0, images1, torch.from_numpy(queries), torch.from_numpy(truth).float()
        )
        optimiser.zero_grad()
        (coarse + fine + 0.1 * calibration).backward()
        torch.nn.utils.clip_grad_norm_(matcher.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        figures.append(torch.stack((coarse, fine, calibration, hit, coarse_hit)).detach())
        if step % 100 == 0 or step == options.steps:
            names = ('coarse', 'fine_px', 'nll', 'hit_1px', 'coarse_hit')
            means = torch.stack(figures).mean(0).tolist()
            seconds = (time.perf_counter() - started) / (step - first)
            values = '  '.join(
                f'{name} {value:.3f}' for name, value in zip(names, means, strict=True)
            )
            print(f'step {step}  {values}  {seconds:.3f} s/step', flush=True)
            figures.clear()
            keep(progress, step, matcher, optimiser)
    print(weights.save(options.out, matcher.folded(), version=0, parent=0))
    progress.unlink(missing_ok=True)


def keep(
    path: Path, step: int, matcher: ExpectationMatcher, optimiser: torch.optim.Optimizer
) -> None:
    """Write what a later run needs to go on from here."""
    tensors = {
        f'matcher.{name}': tensor.contiguous() for name, tensor in matcher.state_dict().items()
    }
    for index, state in optimiser.state_dict()['state'].items():
        tensors |= {
            f'optimiser.{index}.{name}': tensor.contiguous() for name, tensor in state.items()
        }
    weights.write(path, safetensors.torch.save(tensors, {'step': str(step)}))


def resume(
    path: Path, matcher: ExpectationMatcher, optimiser: torch.optim.Optimizer, schedule
) -> int:
    """Go on from what ``keep`` wrote; return the steps already done."""
    with safetensors.safe_open(path, 'pt') as file:
        step = int(file.metadata()['step'])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    matcher.load_state_dict(
        {name[8:]: tensor for name, tensor in tensors.items() if name.startswith('matcher.')}
    )
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith('optimiser.'):
            _, index, field = name.split('.')
            state.setdefault(int(index), {})[field] = tensor
    for _ in range(step):
        schedule.step()
    optimiser.load_state_dict({**optimiser.state_dict(), 'state': state})
    print(f'going on from step {step}')
    return step


if __name__ == '__main__':
    main()
