"""Runs one of the nodes for another program, and ends with the process of that program."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of Linux's sys/prctl.h


def main(parent: int, role: str, arguments: list[str]) -> None:
    """Run the node ``role`` as its executable does, until the process ``parent`` is no more."""
    with contextlib.suppress(OSError, AttributeError):  # another system than Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit('the process that started this node has ended')
    importlib.import_module(f'imatching_ros.nodes.{role}').main([role, *arguments])


if __name__ == '__main__':
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
