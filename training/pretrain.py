"""
Makes the shipped weights from nothing: pictures, rendered scenes, exact correspondence.

    python training/pretrain.py SOURCES... --out models/expectation.safetensors

Sources are photographs, videos and folders of both. An interrupted run is taken up by the same
command, to the same bits on a CPU. See README.md beside this file.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
import json
import math
import os
from pathlib import Path
import shutil
import signal
import sys
import time

from imatching_ros import files
from imatching_ros.matching import weights
from imatching_ros.matching.families.expectation import ExpectationMatcher
from judge import accuracy, calibrate, calibration_error
from losses import losses, WEIGHTS
from pairs import loader, Pair, Pairs
import safetensors
import safetensors.torch
from sources import HELD_OUT_SCENES, SCENE_SIZE, Scenes, write_pictures
import torch

RATE = 2e-3  # of learning, at most
FINE_TUNING = 0.1  # of it, where training begins from weights
WARM_UP = 300  # steps, at most a tenth of all
KEEP_EVERY, JUDGE_EVERY = 100, 500  # steps
JUDGED = 20  # batches of each kind
CALIBRATED = 80  # batches that the score is fitted to, and as many others that it is held to
TRAINING, JUDGING, CALIBRATION = range(3)  # what pairs are drawn for: their seeds differ


def train(options: argparse.Namespace) -> None:
    """Do what the command is asked to."""
    gpu = torch.cuda.is_available()
    if options.device == 'cuda' and not gpu:
        raise ValueError('torch sees no CUDA device here; choose --device cpu')
    device = torch.device('cuda' if gpu and options.device != 'cpu' else 'cpu')
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    matcher, version, parent = ExpectationMatcher(batch_norm=True), 0, 0
    if options.start:
        loaded, info = weights.load(options.start)
        matcher = ExpectationMatcher()
        matcher.load_state_dict(loaded.state_dict())
        version, parent = info.version + 1, info.version
    matcher = matcher.to(device, memory_format=torch.channels_last).train()

    progress, cache = (options.out.with_suffix(suffix) for suffix in ('.progress', '.cache'))
    job = {
        'pictures': write_pictures(options.sources, cache / 'pictures'),
        'from': options.start and info.sha256,
    } | {name: getattr(options, name) for name in ('steps', 'batch', 'seed', 'scenes')}
    optimiser = torch.optim.AdamW(matcher.parameters(), lr=RATE, weight_decay=1e-4)
    first = resume(progress, job, matcher, optimiser) if progress.exists() else 0
    scenes = render(cache / 'scenes', options.scenes, options.workers)
    held_out = scenes[max(len(scenes) - HELD_OUT_SCENES, 0):]
    parts = 'train', 'held_out'
    pictures = {part: sorted((cache / 'pictures' / part).iterdir()) for part in parts}
    if not pictures['held_out']:
        print('too few pictures to hold any out: the same ones judge, under other warps')
        pictures['held_out'] = pictures['train']

    def held(purpose: int, batches: Iterable[int], **kind) -> Iterator[Pair]:
        # As the matcher is used: whole images, at corners
        pairs = Pairs(
            pictures['held_out'], held_out, (options.seed, purpose), options.batch, SCENE_SIZE,
            corners=1.0, **kind,
        )
        return (to(batch, device) for batch in ahead(pairs, batches, options.workers))

    def judge(step: int) -> None:
        shown = {'pictures': held(JUDGING, range(JUDGED), rendered=0.0)}
        if held_out:
            shown['scenes'] = held(JUDGING, range(JUDGED), rendered=1.0)
        matcher.eval()
        shares = [f'{name} {accuracy(matcher, pairs):.3f}' for name, pairs in shown.items()]
        matcher.train()
        print(f'step {step}  held out, share within 1 px:  {"  ".join(shares)}', flush=True)

    batches = ahead(
        Pairs(
            pictures['train'], scenes[:len(scenes) - len(held_out)], (options.seed, TRAINING),
            options.batch,
        ),
        range(first + 1, options.steps + 1), options.workers,
    )
    with patience() as interrupted:
        figures, started = [], time.perf_counter()
        for step, batch in enumerate(batches, first + 1):
            for group in optimiser.param_groups:
                group['lr'] = rate(step, options)
            found = losses(matcher, to(batch, device))
            optimiser.zero_grad()
            sum(weight * found[name] for name, weight in WEIGHTS.items()).backward()
            torch.nn.utils.clip_grad_norm_(matcher.parameters(), 1.0)
            optimiser.step()
            figures.append(torch.stack([value.detach() for value in found.values()]))
            last = interrupted or step == options.steps
            if step % KEEP_EVERY == 0 or last:
                means = torch.stack(figures).mean(0).tolist()
                values = '  '.join(f'{n} {v:.3f}' for n, v in zip(found, means, strict=True))
                seconds = (time.perf_counter() - started) / (step - first)
                print(f'step {step}  {values}  {seconds:.3f} s/step', flush=True)
                figures.clear()
                keep(progress, job, step, matcher, optimiser)
            if interrupted:
                raise KeyboardInterrupt
            if step % JUDGE_EVERY == 0 and not last:
                judge(step)

    judge(options.steps)
    folded = matcher.cpu().folded().to(device, memory_format=torch.channels_last)
    calibrate(folded, held(CALIBRATION, range(CALIBRATED)))
    error = calibration_error(folded, held(CALIBRATION, range(CALIBRATED, 2 * CALIBRATED)))
    print(f'score: expected calibration error {error:.3f} on pairs that it was not fitted to')
    print(f'{options.out}: {weights.save(options.out, folded, version, parent)}')
    progress.unlink(missing_ok=True)
    shutil.rmtree(cache)


def rate(step: int, options: argparse.Namespace) -> float:
    """Return a step's rate of learning: a linear warm-up, then a cosine to almost zero."""
    warm_up = min(1.0, step / min(WARM_UP, options.steps / 10))
    cosine = 0.5 * (1 + math.cos(math.pi * step / options.steps)) + 0.005
    return RATE * (FINE_TUNING if options.start else 1.0) * warm_up * cosine


@contextmanager
def patience() -> Iterator[list[bool]]:
    """
    Let a step end before Ctrl-C ends the run; the list that is given is then filled.

    A second Ctrl-C does not wait.
    """
    asked: list[bool] = []

    def ask(*_) -> None:
        asked.append(True)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def render(folder: Path, count: int, workers: int) -> list[Path]:
    """Return the folders of the scenes, those that judge last; render what is lacking."""
    if not count:
        return []
    scenes = Scenes(folder, count + HELD_OUT_SCENES)
    lacking = [k for k, scene in enumerate(scenes.folders) if not scene.is_dir()]
    for done, _ in enumerate(ahead(scenes, lacking, workers), 1):
        if done % 10 == 0 or done == len(lacking):
            print(f'rendered {done} of {len(lacking)} scenes', flush=True)
    return scenes.folders


def ahead(dataset, order: Iterable[int], workers: int) -> Iterator:
    """Return ``loader``'s iterator, whose workers leave Ctrl-C to this process."""
    order = list(order)
    if not order:
        return iter(())
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # they inherit it
    try:
        return iter(loader(dataset, order, workers))
    finally:
        signal.signal(signal.SIGINT, before)


def to(batch: Pair, device: torch.device) -> Pair:
    """Return a batch on a device."""
    return Pair(*(tensor.to(device, non_blocking=True) for tensor in batch))


def keep(
    path: Path, job: dict, step: int, matcher: ExpectationMatcher, optimiser: torch.optim.AdamW
) -> None:
    """Write what a later run needs to go on from here: whole, or not at all."""
    tensors = {f'matcher.{name}': tensor for name, tensor in matcher.state_dict().items()}
    for name, parameter in matcher.named_parameters():
        tensors |= {
            f'{field}.{name}': value for field, value in optimiser.state[parameter].items()
        }
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {'step': str(step), 'job': json.dumps(job)}
    files.write(path, safetensors.torch.save(tensors, metadata))


def resume(
    path: Path, job: dict, matcher: ExpectationMatcher, optimiser: torch.optim.AdamW
) -> int:
    """
    Go on from what ``keep`` wrote; return the steps already done.

    Raises ValueError, one sentence, where it was written by another call.
    """
    try:
        with safetensors.safe_open(path, 'pt') as file:
            step, theirs = (json.loads(file.metadata()[name]) for name in ('step', 'job'))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError):
        raise ValueError(f'{path} is not the progress of a training; remove it') from None
    if theirs != job:
        other = ', '.join(name for name in job if theirs.get(name) != job[name])
        raise ValueError(
            f'{path} was left by a run with other {other}; finish that one, or remove it'
        )
    matcher.load_state_dict(
        {name[8:]: tensor for name, tensor in tensors.items() if name.startswith('matcher.')}
    )
    for name, parameter in matcher.named_parameters():
        for field in ('exp_avg', 'exp_avg_sq'):
            if f'{field}.{name}' in tensors:  # in the parameter's own order in memory
                optimiser.state[parameter][field] = torch.empty_like(parameter).copy_(
                    tensors[f'{field}.{name}']
                )
                optimiser.state[parameter]['step'] = tensors[f'step.{name}']
    print(f'going on from step {step}', flush=True)
    return step


def main(arguments: list[str] | None = None) -> None:
    """Run the command. Wrong input ends with one sentence and exit code 2."""
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('sources', nargs='+', type=Path, metavar='SOURCES')
    parser.add_argument('--out', type=Path, default=Path('models/expectation.safetensors'))
    parser.add_argument('--from', dest='start', type=Path, help='weights to fine-tune')
    parser.add_argument(
        '--steps', type=_natural, default=13_000, help='0: nothing but the fit of the score'
    )
    parser.add_argument('--batch', type=_count, default=4, help='pairs per step')
    parser.add_argument('--scenes', type=_natural, default=60, help='to render; 0 for none')
    parser.add_argument('--seed', type=_natural, default=0)
    parser.add_argument('--device', choices=('auto', 'cpu', 'cuda'), default='auto')
    parser.add_argument(
        '--workers', type=_natural, default=1, help='processes that draw pairs; 0: this one does'
    )
    parser.add_argument('--threads', type=_count, default=max(cores - 1, 1))
    options = parser.parse_args(arguments)
    try:
        train(options)
    except KeyboardInterrupt:
        print('\ninterrupted: the same command goes on from there', file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        # A worker's error is the last line of what it tells of it
        print(f'pretrain: {(str(error).splitlines() or [""])[-1]}', file=sys.stderr)
        sys.exit(2)


def _natural(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from {least}")
    return int(text)


def _count(text: str) -> int:
    return _natural(text, 1)


if __name__ == '__main__':
    main()
