"""Build of type ament_python: colcon and pip both start here."""

from glob import glob

from setuptools import find_packages, setup

NAME = 'imatching_ros'
ROS = 'ros-kilted-'  # ROS from PyPI, where no ROS is sourced

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
    install_requires=[
        'setuptools',
        'numpy',
        'numba',
        'opencv-python-headless',
        'pillow',
        'torch',
        'pypose',
        'poselib',
        'safetensors',
        'rosbags',
        'ruamel.yaml',
        'evo',
        'matplotlib',
        'rich',
    ],
    extras_require={
        'onnx': ['onnx', 'onnxscript'],
        # pycolmap has no wheel for ARM on Linux; its tests and peers are skipped there
        'test': [
            'pytest',
            'pytest-timeout',
            'hypothesis',
            'ruff',
            'onnx',
            'onnxscript',
            'onnxruntime',
            *(f"{name}; platform_machine == 'x86_64'" for name in ('pyceres', 'pycolmap')),
        ],  # fmt: skip
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
