"""
Print the pins for a virtual environment that stands beside a ROS distribution.

The distribution's packages were built against its numpy and its OpenCV, and a Jetson's torch is
NVIDIA's own, so what is there already keeps its version. All else is pinned as constraints.txt
has it. `make ros-setup` runs this with the Python of the new environment.
"""

from importlib.util import find_spec
from pathlib import Path
import re

#: The module by which each of these is found; Debian's OpenCV has no other mark of its being there
KEPT = {'numpy': 'numpy', 'torch': 'torch', 'opencv-python-headless': 'cv2'}
OLDEST_NUMPY = '1.26.4'


def main() -> None:
    for line in (Path(__file__).parent / 'constraints.txt').read_text().splitlines():
        name = re.match(r'[\w.-]*', line)[0]
        if name not in KEPT or find_spec(KEPT[name]) is None:
            print(line)
    if find_spec('numpy'):
        import numpy

        here = tuple(map(int, numpy.__version__.split('.')[:2]))
        print(f'numpy=={numpy.__version__ if here >= (1, 26) else OLDEST_NUMPY}')


if __name__ == '__main__':
    main()
