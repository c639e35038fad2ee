"""
Small, frequent work on single images and tracks, compiled for the CPU.

In torch every operation on a few hundred numbers costs more than the arithmetic.
"""

from __future__ import annotations

from types import ModuleType

from ... import kernels


def ready(name: str, backend: str) -> ModuleType | None:
    """
    Return the module "images" or "tracks" with its kernels ready.

    None where ``AdjustOptions.backend`` does without, or numba is not to be had (kernels.py).
    """
    return None if backend == 'eager' else kernels.load(f'{__name__}.{name}')
