"""
What is compiled for this processor, once, before it is used: the kernels of matching and bundle.

``prepare`` compiles what is not on disk and says how far it is; who asks for a kernel before that
(``load``) waits until it is ready. Only where numba cannot be imported, plain torch does the same
work, some ten times slower. ``python -m imatching_ros.kernels`` does it where one expects to wait.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import importlib
import logging
import os
import threading
from types import ModuleType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

MODULES = (
    'imatching_ros.matching.compiled',
    'imatching_ros.bundle.compiled.images',
    'imatching_ros.bundle.compiled.tracks',
    'imatching_ros.bundle.solver.compiled.minimise',
)
COMPILING = 'compiling for this processor, once'

Report = Callable[[int, int, str], None]

_lock = threading.RLock()
_loaded: dict[str, ModuleType | None] = {}
_state = 'the kernels are not loaded yet'


def state() -> str:
    """
    Return what is to be said of the kernels in a sentence; '' where they are ready and kept.

    That they are being compiled and how far, that they cannot be kept and what to set, or that
    numba cannot be imported.
    """
    return _state


def prepare(progress: Report | None = None) -> None:
    """
    Make all kernels ready: what is on disk takes a moment, the rest is compiled and kept there.

    ``progress(done, total, name)`` hears of each kernel that must be compiled before it is, and,
    if there was one, of the end, where ``done == total``.
    """
    _load(MODULES, progress)


def load(name: str) -> ModuleType | None:
    """
    Return one of ``MODULES`` with its kernels ready, or None where numba cannot be imported.

    The first thread that asks for it loads it, the others wait.
    """
    if name not in _loaded:
        _load((name,), None)
    return _loaded[name]


def show() -> None:
    """Prepare with a progress line on the terminal, where there is something to compile."""
    text = TextColumn(COMPILING + ': {task.completed} of {task.total}')
    columns = text, BarColumn(), TimeElapsedColumn(), TextColumn('{task.description}')
    with contextlib.ExitStack() as stack:
        # begun with the first kernel: a bar without any still leaves an empty line
        bar = Progress(*columns, console=Console(stderr=True))

        def report(done: int, total: int, name: str) -> None:
            if not bar.tasks:
                stack.enter_context(bar)
                bar.add_task('')
            bar.update(bar.tasks[0].id, completed=done, total=total, description=name)

        prepare(report)


def _load(names: tuple[str, ...], progress: Report | None) -> None:
    with _lock:
        # of rules that do not apply, numba makes up an error each; its colours cost more than it
        os.environ.setdefault('NUMBA_DISABLE_ERROR_MESSAGE_HIGHLIGHTING', '1')
        try:
            modules = {name: importlib.import_module(name) for name in names}
            jit = importlib.import_module('imatching_ros.jit')
        except (ImportError, OSError) as error:
            _conclude(
                f'numba cannot be imported ({error}): matching and bundle adjustment run in plain '
                'torch, some ten times slower; install numba'
            )
            _loaded.update(dict.fromkeys(names))
            return
        kernels = [kernel for module in modules.values() for kernel in jit.entries(module)]
        if all(map(jit.is_kept, kernels)):
            _build(jit, kernels, progress)
        else:
            _say(COMPILING)
            with jit.alone():  # and another process may have compiled them meanwhile
                _build(jit, kernels, progress)
        _loaded.update(modules)
        folders = ', '.join(map(str, jit.folders()))
        _conclude('' if all(map(jit.is_kept, kernels)) else (
            'the compiled kernels cannot be kept, and are compiled anew in every process: no '
            f'folder can be written ({folders}); set NUMBA_CACHE_DIR to one that can'
        ))


def _build(jit: ModuleType, kernels: list, progress: Report | None) -> None:
    new = [kernel for kernel in kernels if not (kernel.overloads or jit.is_kept(kernel))]
    for kernel in kernels:
        if kernel in new:
            done, name = new.index(kernel), kernel.py_func.__name__.strip('_')
            _say(f'{COMPILING}: {done + 1} of {len(new)}')
            if progress:
                progress(done, len(new), name)
        jit.load(kernel)
    if new and progress:
        progress(len(new), len(new), '')


def _say(sentence: str) -> None:
    global _state
    _state = sentence


def _conclude(sentence: str) -> None:
    if sentence and sentence != _state:
        logging.getLogger(__name__).warning(sentence)
    _say(sentence)


if __name__ == '__main__':
    from imatching_ros import kernels  # the one that the rooms know, not this script

    kernels.show()
    print(kernels.state() or 'the kernels are compiled for this processor')
