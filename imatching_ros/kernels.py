"""The compiled kernels of matching and bundle adjustment, and whether they are ready."""

from __future__ import annotations

from collections.abc import Callable
import threading

_lock = threading.Lock()
_state = ''


def prepare(progress: Callable[[int, int, str], None]) -> None:
    """Compile what is not cached; ``progress(done, total, name)`` is called before each kernel."""
    global _state
    from .bundle import adjust
    from .matching import expectation

    loaders = {'matching': expectation.compiled, 'bundle': adjust.compiled}
    with _lock:
        for done, (name, load) in enumerate(loaders.items()):
            if not load.cache_info().currsize:
                _state = f'compiling for this processor, once: {done} of {len(loaders)}'
                progress(done, len(loaders), name)
                load()
        missing = not all(load() for load in loaders.values())
        _state = 'numba cannot be used, so all is ten times slower' if missing else ''


def state() -> str:
    """Return an empty text when the kernels are ready, else what to say of them."""
    return _state
