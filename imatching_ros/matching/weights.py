"""
Weights are one safetensors file whose metadata say what they are, and never a pickle.

The metadata name version, parent, family and sha256, and, where the matcher is not built by its
family's defaults, its ``configuration`` in JSON.
"""

from __future__ import annotations

from dataclasses import dataclass
import hashlib
import json
import os
from pathlib import Path
import struct
import sys
import sysconfig

from safetensors import SafetensorError
import safetensors.torch
import torch
from torch import nn

from .families import FAMILIES
from .families.expectation import ExpectationMatcher
from .. import files


@dataclass(frozen=True)
class WeightsInfo:
    """What a weights file says of itself."""

    version: int  #: grows by one with each update of a model; 0 is the shipped one
    parent: int  #: the version that it was trained from; its own for the first
    family: str
    sha256: str  #: of the tensors


def default_path(family: str = ExpectationMatcher.family) -> Path:
    """
    Return the shipped weights: in the source tree, or in the share folder of an installation.

    Raises FileNotFoundError where there are none.
    """
    prefixes = [
        *os.environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep), sys.prefix,
        sysconfig.get_path('data'),
    ]
    folders = [
        Path(__file__).parents[2],
        *(Path(p) / 'share/imatching_ros' for p in prefixes if p),
    ]
    for folder in folders:
        path = folder / 'models' / f'{family}.safetensors'
        if path.is_file():
            return path
    raise FileNotFoundError(
        f'the shipped weights models/{family}.safetensors were not found; install the package '
        'again, or name a weights file'
    )


def dumps(matcher: nn.Module, version: int, parent: int) -> tuple[bytes, WeightsInfo]:
    """Return the bytes of a weights file, and what they say of themselves."""
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in matcher.state_dict().items()
    }
    info = WeightsInfo(version, parent, matcher.family, _digest(tensors))
    metadata = {
        'version': str(version), 'parent': str(parent), 'family': info.family,
        'sha256': info.sha256,
    }
    if matcher.configuration:
        metadata['configuration'] = json.dumps(matcher.configuration, sort_keys=True)
    data = safetensors.torch.save(tensors, metadata)
    # The library shuffles the metadata: in order, the same weights are the same bytes.
    (length,) = struct.unpack('<Q', data[:8])
    header = json.dumps(json.loads(data[8:8 + length]), sort_keys=True).encode()
    header += b' ' * (-len(header) % 8)
    return struct.pack('<Q', len(header)) + header + data[8 + length:], info


def loads(data: bytes, source: str = 'the weights') -> tuple[nn.Module, WeightsInfo]:
    """
    Return the matcher of a weights file's bytes, in evaluation mode on the CPU.

    Raises ValueError, one sentence that names ``source``, where the bytes are not weights of a
    known family, are damaged, or hold a number that is not finite.
    """
    try:
        tensors = safetensors.torch.load(data)
        (length,) = struct.unpack('<Q', data[:8])
        metadata = json.loads(data[8:8 + length]).get('__metadata__') or {}
    except (SafetensorError, struct.error, ValueError) as error:
        raise ValueError(
            f'{source}: not a safetensors file, or cut short ({error}); copy it again'
        ) from None
    family = metadata.get('family')
    if family not in FAMILIES:
        known = ', '.join(FAMILIES)
        raise ValueError(
            f"{source}: the weights are of family '{family}', this package knows {known}"
        )
    try:
        info = WeightsInfo(
            int(metadata['version']), int(metadata['parent']), family, metadata['sha256']
        )
    except (KeyError, ValueError):
        raise ValueError(
            f'{source}: the metadata lack version, parent or sha256; it was not written here'
        ) from None
    if not (0 <= info.version < 2**32 and 0 <= info.parent < 2**32):
        raise ValueError(
            f'{source}: version and parent must be counts below 2^32, as correspondences '
            'carry them'
        )
    if _digest(tensors) != info.sha256:
        raise ValueError(
            f'{source}: the tensors do not have the sha256 that the file names; it is damaged'
        )
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise ValueError(f'{source}: some weights are not finite; go back to an earlier version')
    try:
        matcher = FAMILIES[family](**json.loads(metadata.get('configuration', '{}')))
    except (ValueError, TypeError):
        raise ValueError(
            f"{source}: the configuration {metadata['configuration']} is none of the {family} "
            'family of this version'
        ) from None
    own = matcher.state_dict()
    if any(tensor.dtype != own[name].dtype for name, tensor in tensors.items() if name in own):
        raise ValueError(
            f"{source}: some tensors are not of the network's types; it was not written here"
        )
    try:
        matcher.load_state_dict(tensors)
    except RuntimeError:
        raise ValueError(
            f'{source}: the tensors do not fit the {family} network of this version'
        ) from None
    return matcher.eval().to(memory_format=torch.channels_last), info


def load(path: str | Path) -> tuple[nn.Module, WeightsInfo]:
    """
    Return the matcher in a weights file, and what the file says of itself.

    Raises FileNotFoundError or ValueError, one sentence each.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path}: there is no such weights file')
    return loads(path.read_bytes(), str(path))


def save(path: str | Path, matcher: nn.Module, version: int, parent: int) -> WeightsInfo:
    """Write a weights file atomically."""
    data, info = dumps(matcher, version, parent)
    files.write(path, data)
    return info


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
