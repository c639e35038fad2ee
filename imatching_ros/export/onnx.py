"""The network as two ONNX graphs, for TensorRT and ONNX Runtime: docs/onnx.md."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
import warnings

import torch
from torch import nn, Tensor

from .. import files
from ..matching.encoder import Features
from ..matching.families.expectation import ExpectationMatcher
from ..matching.weights import WeightsInfo

ENCODE, MATCH = 'encode.onnx', 'match.onnx'
OPSET = 18  # TensorRT 10 reads it
NEEDED = ('onnx', 'onnxscript')
FEATURES = ('coarse', 'fine', 'reliability')
_POINTS = 1000  # of the example that is traced; the graph takes any number


class _Encode(nn.Module):

    def __init__(self, matcher: ExpectationMatcher) -> None:
        super().__init__()
        self.matcher = matcher

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        features = self.matcher.encode(image, exact=True)
        return features.coarse, features.fine, features.reliability


class _Match(nn.Module):

    def __init__(self, matcher: ExpectationMatcher, size: tuple[int, int]) -> None:
        super().__init__()
        self.matcher, self.size = matcher, size

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        *features, queries = inputs
        matches = self.matcher.match(
            Features(*features[:3], self.size), Features(*features[3:], self.size), queries
        )
        return matches.uv, matches.score, matches.cov


def write_onnx(
    folder: Path, matcher: ExpectationMatcher, info: WeightsInfo, size: tuple[int, int]
) -> None:
    """
    Write ``encode.onnx`` and ``match.onnx`` for images of ``size`` (W, H) px to a folder.

    They compute in float32 what ``encode`` and ``match`` do, for any number of images and queries.
    What a graph does not need of its inputs is not among them. Raises ValueError where an edge is
    not positive, RuntimeError, one sentence, where the exporter's packages are missing.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(
            f'the export to ONNX needs {" and ".join(missing)}: pip install {" ".join(NEEDED)}'
        )
    width, height = size
    if min(size) < 1:
        raise ValueError(f'images have a positive width and height, not {width}x{height}')
    matcher = matcher.eval().cpu()
    # Two images: a traced batch of one would be taken for always one
    image = torch.zeros(2, 1, height, width)
    features = _Encode(matcher)(image)
    # each a tensor of its own: the exporter makes one input of what is the same object
    both = [tensor.detach().clone() for tensor in (*features, *features)]
    batch, points = torch.export.Dim('batch'), torch.export.Dim('points')
    ends = [f'{end}_{name}' for end in ('reference', 'target') for name in FEATURES]
    graphs = {
        ENCODE: _export(
            _Encode(matcher), (image,), ['image'], list(FEATURES), ({0: batch},)
        ),
        MATCH: _export(
            _Match(matcher, (height, width)),
            (*both, torch.zeros(2, _POINTS, 2)),
            [*ends, 'queries'],
            ['uv', 'score', 'cov'],
            ((*[{0: batch}] * len(both), {0: batch, 1: points}),),
        ),
    }
    said = {
        'family': info.family, 'version': str(info.version), 'sha256': info.sha256,
        'width': str(width), 'height': str(height),
    }
    for name, program in graphs.items():
        program.model.metadata_props.update(said)
        graph = program.model.graph
        graph.inputs[:] = [value for value in graph.inputs if value.uses()]
        files.write(folder / name, program.model_proto.SerializeToString())


def _export(
    module: nn.Module, example: tuple[Tensor, ...], inputs: list[str], outputs: list[str],
    dynamic: tuple,
) -> torch.onnx.ONNXProgram:
    log = logging.getLogger('torch.onnx')
    level = log.level
    log.setLevel(logging.ERROR)  # it speaks of torchvision, which is not needed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return torch.onnx.export(
                module.eval(), example, input_names=inputs, output_names=outputs,
                dynamic_shapes=dynamic, dynamo=True, verbose=False,
                opset_version=OPSET,
            )
    finally:
        log.setLevel(level)
