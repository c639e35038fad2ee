"""Build of type ament_python: colcon and pip both start here."""

from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

NAME = 'imatching_ros'
ROS = 'ros-kilted-'  # ROS from PyPI, where no ROS is sourced


def listed(file):
    """Return the requirements that a file lists."""
    lines = (Path(__file__).parent / file).read_text().splitlines()
    return [line for line in lines if not line.startswith('#')]


setup(
    name=NAME,
    version='0.1.0',
    description='Imperative learning of feature correspondence for ROS 2',
    license='Apache-2.0',
    maintainer='imatching_ros maintainers',
    maintainer_email='maintainers@example.org',
    packages=find_packages(include=[NAME, f'{NAME}.*']),
    data_files=[
        ('share/ament_index/resource_index/packages', [f'resource/{NAME}']),
        (f'share/{NAME}', ['package.xml']),
        (f'share/{NAME}/launch', glob('launch/*.launch.py')),
        (f'share/{NAME}/config', glob('config/*')),
        (f'share/{NAME}/models', glob('models/*.safetensors')),
    ],
    python_requires='>=3.10',
    install_requires=[*listed('requirements.txt'), 'opencv-python-headless'],
    extras_require={
        'onnx': ['onnx', 'onnxscript'],
        'test': listed('requirements-test.txt'),
        'ros': [
            f'{ROS}rclpy[fastrtps]',
            *(f'{ROS}{name}-msgs' for name in ('std', 'sensor', 'nav', 'geometry', 'diagnostic')),
            f'{ROS}std-srvs',
        ],
    },
    zip_safe=False,
    entry_points={
        'console_scripts': [
            f'imatching = {NAME}.cli:main',
            f'matcher_node = {NAME}.nodes.matcher:main',
            f'bundle_node = {NAME}.nodes.bundle:main',
            f'learner_node = {NAME}.nodes.learner:main',
            f'imatching_node = {NAME}.nodes.composed:main',
            f'player_node = {NAME}.nodes.player:main',
        ],
    },
)
