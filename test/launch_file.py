"""
The launch file, run without a ROS installation.

launch, launch_ros and ament_index_python have no wheels: stand-ins collect what they are given.
"""

from collections.abc import Callable
from pathlib import Path
import runpy
import sys
from types import ModuleType, SimpleNamespace

ROOT = Path(__file__).parents[1]
PATH = ROOT / 'launch' / 'imatching.launch.py'
COLLECTED = {
    'launch.actions': ('DeclareLaunchArgument', 'EmitEvent', 'OpaqueFunction'),
    'launch.events': ('matches_action',),
    'launch.events.process': ('ShutdownProcess',),
    'launch_ros.actions': ('Node',),
}


class Collected:
    """What a class or a function of launch was called with."""

    def __init__(self, *args, **kwargs):
        self.args, self.__dict__ = args, {**kwargs, 'args': args}


class LaunchConfiguration(Collected):

    def perform(self, context):
        return context[self.args[0]]


class LaunchFile:
    """The description that the launch file gives."""

    def __init__(self, monkeypatch) -> None:
        contents = {
            module: {name: type(name, (Collected,), {}) for name in names}
            for module, names in COLLECTED.items()
        }
        contents['launch'] = {'LaunchDescription': list}
        contents['launch.substitutions'] = {'LaunchConfiguration': LaunchConfiguration}
        share = {'get_package_share_directory': lambda package: str(ROOT)}
        contents['ament_index_python.packages'] = share
        with monkeypatch.context() as patch:
            for name in {*contents, 'ament_index_python', 'launch_ros'}:
                module = ModuleType(name)
                vars(module).update(contents.get(name, {}))
                patch.setitem(sys.modules, name, module)
            *declared, function = runpy.run_path(str(PATH))['generate_launch_description']()
        self.arguments = {one.args[0]: one.default_value for one in declared}
        self._start: Callable = function.function

    def start(self, **given: str) -> dict[str, Collected]:
        """Return the nodes that it starts with these arguments, by their executables' roles."""
        nodes = self._start({**self.arguments, **given})
        return {node.executable.removesuffix('_node'): node for node in nodes}


def is_ended(node: Collected, code: int) -> bool:
    """Return whether a node that ends with this code is ended for good, not started again."""
    if not getattr(node, 'respawn', False):
        return True
    done = node.on_exit(SimpleNamespace(returncode=code, action=node), None)
    kinds = [(type(one).__name__, type(one.event).__name__) for one in done or []]
    assert kinds in ([], [('EmitEvent', 'ShutdownProcess')]), kinds
    # of this node, not of another
    assert all(one.event.process_matcher.args == (node,) for one in done or [])
    return bool(kinds)
