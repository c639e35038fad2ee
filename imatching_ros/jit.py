"""
How the kernels are compiled by numba, and where what was compiled is kept.

What numba takes to compile a function goes by the number of its statements, by how often it is
compiled and by the views of arrays in it. So every function has one signature and is compiled
once; those that are called by others take pointers, which have no reference counts, no shapes and
no negative indices; and only entries, which Python calls, are kept on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import fcntl
from functools import cached_property
import gc
import hashlib
import os
from pathlib import Path
import pickle
import platform
from types import CodeType, FunctionType, ModuleType
import uuid

import llvmlite
import numba
from numba import njit, types
from numba.core import config
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.dispatcher import Dispatcher
from numba.core.serialize import dumps
from numba.extending import intrinsic
import numpy as np

#: Not "nnan" or "ninf": comparisons with what is not finite must keep their meaning.
FAST = frozenset(('reassoc', 'contract', 'arcp', 'nsz'))

f4, f8, i8, b1, void = types.float32, types.float64, types.int64, types.boolean, types.void
F4, F8, I8 = (types.CPointer(kind) for kind in (f4, f8, i8))



@intrinsic
def at(context, base, index):
    """Return a pointer to an element of a contiguous array, or of what a pointer points to."""
    def build(context, builder, signature, arguments):
        start, offset = arguments
        if isinstance(base, types.Array):
            start = context.make_array(base)(context, builder, start).data
        return builder.gep(start, [offset])

    return types.CPointer(base.dtype)(base, types.intp), build


def inner(*signatures, fastmath: frozenset[str] = FAST) -> Callable:
    """Make a function one that entries call; it is compiled when one of them is."""
    return lambda function: _declared(function, signatures, fastmath, no_cpython_wrapper=True)


def entry(signature, fastmath: frozenset[str] = frozenset()) -> Callable:
    """Make a function one that Python calls, without the interpreter's lock, after ``load``."""
    def decorate(function: FunctionType) -> Dispatcher:
        kernel = _declared(function, [signature], fastmath, nogil=True)
        kernel._cache = Cache(kernel)
        return kernel

    return decorate


def _declared(function: FunctionType, signatures, fastmath, **options) -> Dispatcher:
    function.declared = tuple(signatures), sorted(fastmath)
    return njit(fastmath=set(fastmath), error_model='numpy', no_cfunc_wrapper=True, **options)(
        function
    )


def entries(module: ModuleType) -> list[Dispatcher]:
    """Return the entries that a module calls or defines."""
    return [
        each for each in vars(module).values()
        if isinstance(each, Dispatcher) and isinstance(each._cache, Cache)
    ]


def load(kernel: Dispatcher) -> None:
    """
    Make an entry ready: from disk, or else compile it and keep it there.

    One from disk was compiled from the same code, constants and callees, by the same versions and
    for this processor.
    """
    collects = gc.isenabled()
    gc.disable()  # millions of objects that live would be searched for garbage again and again
    try:
        _compile(kernel)
    finally:
        if collects:
            gc.enable()


def _compile(kernel: Dispatcher) -> None:
    if not kernel.overloads:
        for signature in kernel.py_func.declared[0]:
            kernel.compile(signature)
        kernel.disable_compile()


def is_kept(kernel: Dispatcher) -> bool:
    """Whether an entry, of just this code for just this processor, is on disk."""
    return kernel._cache.path() is not None


class Cache(NullCache):
    """Keeps an entry in a file whose name says all that it was compiled from."""

    def __init__(self, kernel: Dispatcher) -> None:
        self.kernel = kernel

    @cached_property
    def parts(self) -> tuple[list[Dispatcher], str]:
        """What the entry calls, callees first, and the name of its file."""
        called, digest = _parts(self.kernel.py_func)
        machine = self.kernel.targetctx.codegen().magic_tuple(), _VERSIONS
        digest.update(repr(machine).encode())
        return called, f'{self.kernel.py_func.__name__}-{digest.hexdigest()[:24]}.kernel'

    def path(self) -> Path | None:
        paths = (folder / self.parts[1] for folder in folders())
        return next((path for path in paths if path.is_file()), None)

    def load_overload(self, signature, context) -> CompileResult | None:
        """Return what was kept; where nothing was, compile what the entry calls."""
        context.refresh()
        if path := self.path():
            try:
                return CompileResult._rebuild(context, *pickle.loads(path.read_bytes()))
            except Exception:  # it is not whole: compiled anew
                with contextlib.suppress(OSError):
                    path.unlink()
        for kernel in self.parts[0]:
            _compile(kernel)
        return None

    def save_overload(self, signature, result: CompileResult) -> None:
        data = dumps(result._reduce())
        for folder in folders():
            part = folder / f'{self.parts[1]}.{uuid.uuid4().hex}'
            try:
                folder.mkdir(parents=True, exist_ok=True)
                part.write_bytes(data)
                os.replace(part, folder / self.parts[1])
                return
            except OSError:
                with contextlib.suppress(OSError):
                    part.unlink()


def folders() -> Iterator[Path]:
    """Where what is compiled may be kept: the first that can be written is taken."""
    if config.CACHE_DIR:
        yield Path(config.CACHE_DIR)
    yield Path(__file__).parent / '__pycache__'
    home = Path(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'))
    if home.is_absolute():
        yield home / 'imatching_ros'


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Wait for another process that compiles what would be kept in the same folder."""
    with contextlib.ExitStack() as stack:
        for folder in folders():
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(open(folder / 'imatching_ros.lock', 'w'))
                fcntl.flock(lock, fcntl.LOCK_EX)
                break
        yield


_VERSIONS = platform.python_version(), numba.__version__, llvmlite.__version__, np.__version__


def _parts(function: FunctionType) -> tuple[list[Dispatcher], hashlib._Hash]:
    """Return what a function calls, callees first, and a digest of all code and constants."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    called: list[Dispatcher] = []
    seen = set()

    def visit(function: FunctionType) -> None:
        seen.add(function)
        digest.update(repr(getattr(function, 'declared', '')).encode())
        for name, constant in _code(function.__code__):
            digest.update(repr(constant).encode() if constant != function.__doc__ else b'')
            value = function.__globals__.get(name)
            if isinstance(value, int | float | str | tuple | np.generic):
                digest.update(f'{name}={value!r}'.encode())
            # numba's own functions, and what it puts into the code by itself
            callee = getattr(value, 'py_func', None) or getattr(value, '_defn', None)
            if callee is not None and callee not in seen:
                visit(callee)
                called.extend([value] if isinstance(value, Dispatcher) else [])

    visit(function)
    return called, digest


def _code(code: CodeType) -> Iterator[tuple[str | None, object]]:
    """Yield the names that code uses, and what else it consists of."""
    yield None, code.co_code
    yield from ((name, name) for name in code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        else:
            yield None, constant
