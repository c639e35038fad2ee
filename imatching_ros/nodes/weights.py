"""Matchers and their weights as nodes pass them on: from a file, onto a device, as a message."""

from __future__ import annotations

import array
from pathlib import Path

from std_msgs.msg import UInt8MultiArray
import torch

from ..matching import weights


def load_weights(path: Path, device: str) -> tuple[torch.nn.Module, weights.WeightsInfo]:
    """
    Return the matcher of a weights file on a device, and what the file says of it.

    Raises FileNotFoundError or ValueError, with one sentence each.
    """
    matcher, info = weights.load(path)
    return to_device(matcher, device), info


def to_device(matcher: torch.nn.Module, device: str) -> torch.nn.Module:
    """Return the matcher on a device; ValueError where torch has no such device."""
    try:
        return matcher.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"parameter 'device' is '{device}', which torch cannot use: {reason}"
        ) from None


def weights_to_message(data: bytes) -> UInt8MultiArray:
    """Return the bytes of a weights file as a message."""
    return UInt8MultiArray(data=array.array('B', data))


def weights_from_message(message: UInt8MultiArray) -> bytes:
    """Return the bytes of a weights file."""
    return bytes(message.data)
