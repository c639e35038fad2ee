"""``python -m imatching_ros`` is ``imatching``."""

from .cli import main

main()
