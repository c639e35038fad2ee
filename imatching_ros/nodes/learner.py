"""The learner_node takes images, correspondences and solved windows, and gives better weights."""

from __future__ import annotations

from collections.abc import Callable
import ctypes
from functools import partial
import os
from pathlib import Path as FilePath
import time
from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus
from nav_msgs.msg import Path
from rclpy.parameter import Parameter
from sensor_msgs.msg import CompressedImage, Image, PointCloud2
from std_msgs.msg import UInt8MultiArray
from std_srvs.srv import SetBool
import torch

from . import parameters
from .clouds import correspondences_from_cloud, window_from_messages
from .condition import ACTIVE
from .core_node import CoreNode
from .diagnostics import OK, percentiles, Share, WARN
from .process import run
from .qos import latched
from .reporter import diagnostic_status
from .stamps import to_ns
from .weights import weights_to_message
from .. import files
from ..bundle.options import BundleOptions
from ..geometry.camera import Camera
from ..learning import checkpoints
from ..learning.learner import Learner, StepResult
from ..learning.options import LearnerOptions
from ..learning.verdict import Verdict
from ..matching import weights

NICE = 10  #: whoever drives the robot comes first on a busy machine
PARTS = {'keyframes': Path, 'landmarks': PointCloud2, 'prior': PointCloud2}  #: of a window
SAVE_S = 10.0  #: between two checkpoints; a promotion does not wait
UNJOINED = 10  #: windows of which not all three messages have come; older ones are forgotten


class LearnerNode(CoreNode):
    """Takes gradient steps whenever no message waits, and publishes what the gate promotes."""

    role, feed = 'learner', 'image'

    def forget(self) -> None:
        super().forget()
        self._start: tuple[torch.nn.Module, weights.WeightsInfo] | None = None
        self._parts: dict[int, dict[str, Any]] = {}
        self.version = -1
        self.steps = self.verdicts = 0
        self._stepped = True  # since the last window was taken
        self.last_loss, self.last_verdict = float('nan'), ''
        self._step_ms: list[float] = []
        self._share = Share()
        self._saved = 0.0  # when the last checkpoint was written

    def configure(self) -> None:
        matcher, info, _ = self.load()
        self._start = matcher, info
        self.version = self._told = info.version
        ends = self.endpoints
        self._weights = ends.advertise(UInt8MultiArray, 'weights', latched())
        self._learning = ends.advertise(DiagnosticStatus, 'learning', self.qos.results)
        ends.offer_service(SetBool, '~/enable', self._on_enable)
        ends.offer_trigger('~/save_checkpoint', self.save_checkpoint)
        ends.offer_trigger('~/rollback', self.rollback)

        def take(handle: Callable[[Any], None], fed: bool = False) -> Callable[[Any], None]:
            return lambda message: self.receive((handle, message), fed)

        self.subscribe_to_images(take(self._add_image, True))
        ends.subscribe(
            PointCloud2, 'correspondences', take(self._add_correspondences), self.qos.results
        )
        for name, kind in PARTS.items():
            ends.subscribe(kind, name, take(partial(self._add_part, name)), self.qos.windows)

    def begin(self) -> None:
        super().begin()
        os.nice(NICE)  # of this thread, on Linux

    def options(self) -> LearnerOptions:
        return parameters.options(LearnerOptions(), 'learner', self.role, self.value)

    def build(self, camera: Camera) -> Learner:
        bundle = parameters.options(BundleOptions(), 'bundle', self.role, self.value)
        learner = Learner(*self._start, camera, self.options(), bundle)
        learner.enabled = self.value('enabled')
        if self.value('weights_dir'):
            found, refused = checkpoints.resume(self._checkpoints(), learner)
            for sentence in refused:
                self.reporter.fault(sentence)
            if found is not None:
                self.get_logger().info(
                    f'goes on from step {learner.step_count}, version {learner.version}'
                )
        return learner

    def process(self, item: tuple[Callable[[Any], None], Any]) -> None:
        handle, message = item
        # from a checkpoint, or changed while nobody could be told
        if self.core.version != self._told:
            self._publish_weights(self.core.version)
        handle(message)
        self.health.processed += 1

    def idle(self) -> bool:
        """Take a gradient step, and the gate's verdict where one is due; rest as ``duty`` asks."""
        if self.core is None or self.core.rest() > 0:
            return False
        started = time.monotonic()
        result, self._stepped = self.core.step(), True
        if result is None:
            return False
        self._report_step(result)
        promoted = self._judge()
        if self.value('weights_dir') and (
            promoted or self.core.settled and started > self._saved + SAVE_S
        ):
            self._save()
        _trim()
        self._share.add(time.monotonic() - started)
        return True

    def reset(self) -> str:
        """Go back to the first weights."""
        super().reset()
        self._parts.clear()
        return self._republish()

    def restart(self) -> None:
        """Forget what is remembered of the images; what was learned stays."""
        self._parts.clear()
        self.timeline.forget()
        if self.core is not None:
            self.core.start_recording(self.camera)

    def rollback(self) -> str:
        """Go back to the version before the last promoted one."""
        self._learner().rollback()
        return self._republish()

    def save_checkpoint(self) -> str:
        """Write what a learner needs to go on into ``weights_dir``."""
        return str(checkpoints.save(self._checkpoints(), self._learner()))

    def values(self) -> dict[str, object]:
        return {
            'model_version': self.version,
            'enabled': self.value('enabled'),
            'steps': self.steps,
            'windows': self.core.windows if self.core else 0,
            'stale': self.core.stale if self.core else 0,
            'skipped': self.core.skipped if self.core else 0,
            'verdicts': self.verdicts,
            'promotions': self.core.promotions if self.core else 0,
            'rollbacks': self.core.rollbacks if self.core else 0,
            'last_loss': self.last_loss,
            'last_verdict': self.last_verdict,
            'learning_share': self._share.value(),
            'step_p50_ms': percentiles(self._step_ms)[0],
        }

    def _learner(self) -> Learner:
        if self.core is None:
            raise ValueError('the learner has not begun: no message has come yet')
        return self.core

    def _add_image(self, message: Image | CompressedImage) -> None:
        image = self.decode(message)
        self.core.add_image(to_ns(message.header.stamp), image)

    def _add_correspondences(self, message: PointCloud2) -> None:
        self.core.add_correspondences(correspondences_from_cloud(message))

    def _add_part(self, name: str, message: Path | PointCloud2) -> None:
        """Join keyframes, landmarks and prior of one solve, three messages of one stamp."""
        stamp = to_ns(message.header.stamp)
        parts = self._parts.setdefault(stamp, {})
        parts[name] = message
        if len(parts) == len(PARTS):
            del self._parts[stamp]
            window = window_from_messages(**parts)
            # A robot's windows come faster than steps use them: what time there is goes to steps
            if self._stepped or self.qos.keep_all or not self.core.ready:
                self._stepped = not self.core.add_window(window)
        while len(self._parts) > UNJOINED:
            del self._parts[next(iter(self._parts))]

    def _judge(self, now: bool = False) -> bool:
        """Let the gate judge, if it is due or ``now``; return whether it promoted."""
        verdict = self.core.verdict(now) if self.core is not None else None
        if verdict is None:
            return False
        self._report_verdict(verdict)
        if verdict.promoted:
            self._publish_weights(verdict.version)
        return verdict.promoted

    def _save(self) -> None:
        self._saved = time.monotonic()
        try:
            checkpoints.save(self._checkpoints(), self.core)
        except OSError as error:
            self.reporter.fault(f'the checkpoint could not be written: {error}')

    def _report_step(self, result: StepResult) -> None:
        self.steps += 1
        self.last_loss = result.loss
        self._step_ms.append(result.seconds * 1e3)
        del self._step_ms[:-1000]
        values = {
            'step': result.step, 'loss': result.loss, 'seconds': result.seconds,
            'rows': result.rows,
        }
        self._say(OK, 'step', f'step {result.step}: loss {result.loss:.4g}', values)

    def _report_verdict(self, verdict: Verdict) -> None:
        self.verdicts += 1
        self.last_verdict = f'{"promoted" if verdict.promoted else "kept back"}: {verdict.reason}'
        values = {
            'step': verdict.step, 'promoted': verdict.promoted, 'rolled_back': verdict.rolled_back,
            'version': verdict.version, 'reason': verdict.reason, **verdict.figures,
        }
        self._say(OK if verdict.promoted else WARN, 'verdict', self.last_verdict, values)

    def _say(self, level: int, kind: str, text: str, values: dict[str, object]) -> None:
        name = f'{self.get_fully_qualified_name()}: {kind}'
        self._learning.publish(diagnostic_status(level, name, text, values))

    def _republish(self) -> str:
        if self.core is not None:
            self._publish_weights(self.core.version)
        return f'version {self.version} holds the earlier weights'

    def _publish_weights(self, version: int) -> None:
        """
        Publish the weights in use as a version, after they are written to ``weights_dir``.

        So whoever hears of a version finds its file there; a full disk does not keep it back.
        """
        data = self.core.weights()
        self.version = version
        if self.value('weights_dir'):
            path = self._folder() / checkpoints.version_name(version)
            try:
                files.write(path, data)
            except OSError as error:
                self.reporter.fault(f'{path} could not be written: {error}')
        if self.state == ACTIVE:
            self._weights.publish(weights_to_message(data))
            self._told = version

    def _folder(self) -> FilePath:
        return FilePath(os.path.expanduser(self.value('weights_dir') or '.')).resolve()

    def _checkpoints(self) -> FilePath:
        return self._folder() / 'checkpoints'

    def on_change(self, changes: dict[str, parameters.Value]) -> None:
        super().on_change(changes)
        if 'enabled' in changes and self.core is not None:
            self.core.enabled = changes['enabled']

    def _on_enable(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        self.set_parameters([Parameter('enabled', value=request.data)])

        def judge() -> str:
            """Judge what was learned since the last verdict, after the step in hand."""
            if not request.data:
                self._judge(now=True)
            return 'learning' if request.data else 'watching only'

        response.success, response.message = self.endpoints.run('~/enable', judge)
        return response


def _trim() -> None:
    """
    Give what a step left free back to the system, where its allocator can.

    It is half a gigabyte, which would be kept in pieces too small for the next step.
    """
    if trim := getattr(ctypes.CDLL(None), 'malloc_trim', None):
        trim(0)


def main(arguments: list[str] | None = None) -> None:
    run(LearnerNode, arguments)


if __name__ == '__main__':
    main()
