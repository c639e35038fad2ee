"""
What a learner needs to go on, in safetensors and one JSON manifest, and never in a pickle.

A folder holds ``version_*.safetensors``, weights that were in use; ``state_*.safetensors``,
candidate, average and optimiser; and ``checkpoint_*.json``, manifests, each written last: what has
no manifest is not there. Every file is written beside and renamed, and a manifest names its files
with their sha256, so that whoever reads after a crash finds the last checkpoint whole, or the one
before it.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
import safetensors.torch

from .learner import Learner
from ..files import write
from ..matching import weights

FORMAT = 1


def save(folder: str | Path, learner: Learner, keep: int = 3, **notes: Any) -> Path:
    """
    Write a checkpoint, remove all but the newest ``keep``, and return the manifest's path.

    ``notes`` are the caller's own, for JSON. Raises OSError where the disk will not have it; what
    was there stays.
    """
    folder = Path(folder)
    tensors, facts = learner.state()
    number = max((_number(path) for path in folder.glob('checkpoint_*.json')), default=-1) + 1
    files = []
    for data, info in learner.history():
        path = folder / version_name(info.version)
        digest = hashlib.sha256(data).hexdigest()
        if not path.is_file() or _digest(path) != digest:
            write(path, data)
        files.append({'file': path.name, 'sha256': digest})
    state = folder / f'state_{number:08d}.safetensors'
    data = safetensors.torch.save(tensors)
    write(state, data)
    info = learner.history()[-1][1]
    manifest = {
        'format': FORMAT, 'version': info.version, 'parent': info.parent, 'family': info.family,
        'sha256': info.sha256, 'weights': files,
        'state': {'file': state.name, 'sha256': hashlib.sha256(data).hexdigest()},
        'learner': facts, 'notes': notes,
    }
    path = folder / f'checkpoint_{number:08d}.json'
    write(path, json.dumps(manifest, indent=1).encode())
    _sync(folder)
    _rotate(folder, keep)
    return path


def resume(folder: str | Path, learner: Learner) -> tuple[dict[str, Any] | None, list[str]]:
    """
    Bring a learner to the newest checkpoint that is whole.

    Returns the caller's notes in it, None where there is no such checkpoint, and one sentence for
    each newer one that was refused.
    """
    refused = []
    for path in manifests(Path(folder)):
        try:
            manifest, tensors, history = read(path)
            learner.restore(tensors, manifest['learner'], history)
        except ValueError as error:
            refused.append(f'checkpoint {path} is refused: {error}')
            continue
        return manifest['notes'], refused
    return None, refused


def read(
    path: Path,
) -> tuple[dict[str, Any], dict[str, Any], list[tuple[bytes, weights.WeightsInfo]]]:
    """
    Return a manifest, the tensors of its state, and the weights files of its history, all checked.

    Raises ValueError, one sentence, where one is damaged, missing, or of another program or
    network.
    """
    try:
        manifest = json.loads(path.read_bytes())
        if manifest['format'] != FORMAT:
            raise ValueError(f'its format is {manifest["format"]}, this package writes {FORMAT}')
        if manifest['family'] not in weights.FAMILIES:
            raise ValueError(f"its weights are of family '{manifest['family']}'")
        history = []
        for entry in manifest['weights']:
            data = _checked(path.parent, entry)
            history.append((data, weights.loads(data, entry['file'])[1]))
        tensors = safetensors.torch.load(_checked(path.parent, manifest['state']))
        if not history or history[-1][1].sha256 != manifest['sha256']:
            raise ValueError('its weights are not those that it names')
        manifest['learner'], manifest['notes']  # noqa: B018
    except (ValueError, KeyError, TypeError, AttributeError, OSError, SafetensorError) as error:
        lacks = isinstance(error, (KeyError, TypeError, AttributeError))
        reason = f"it is not a checkpoint's manifest ({error})" if lacks else str(error)
        raise ValueError(reason) from None
    return manifest, tensors, history


def version_name(version: int) -> str:
    """Return the file of a version's weights."""
    return f'version_{version:04d}.safetensors'


def _checked(folder: Path, entry: dict[str, str]) -> bytes:
    path = folder / Path(entry['file']).name
    if not path.is_file():
        raise ValueError(f'{path.name} is missing')
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != entry['sha256']:
        raise ValueError(
            f'{path.name} does not have the sha256 that the manifest names; it is damaged'
        )
    return data


def _rotate(folder: Path, keep: int) -> None:
    """Remove old manifests, then what only they named, and what crashes left."""
    old = manifests(folder)[keep:]
    named = _named(old)
    for path in old:
        path.unlink(missing_ok=True)
    used = _named(manifests(folder))
    states = {path.name for path in folder.glob('state_*.safetensors')}
    for name in (named | states) - used:
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob('.*.safetensors.*'):
        if not path.name.endswith(f'.{os.getpid()}'):
            path.unlink(missing_ok=True)


def _named(manifests: list[Path]) -> set[str]:
    """Return the files that these manifests name."""
    names = set()
    for path in manifests:
        try:
            manifest = json.loads(path.read_bytes())
            names |= {
                Path(entry['file']).name for entry in [*manifest['weights'], manifest['state']]
            }
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            continue  # a foreign file names nothing of ours
    return names


def manifests(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, newest first."""
    return sorted(folder.glob('checkpoint_*.json'), key=_number, reverse=True)


def _number(path: Path) -> int:
    text = path.stem.rpartition('_')[2]
    return int(text) if text.isdecimal() else -1


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sync(folder: Path) -> None:
    """Make the names in a folder survive a power cut too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
