"""imatching export --onnx: what ONNX Runtime computes is what the network computes."""

import sys

from imatching_ros import cli
from imatching_ros.matching import weights
from imatching_ros.matching.detector import detect
import numpy as np
import pytest
import torch

for needed in ('onnx', 'onnxscript', 'onnxruntime'):
    pytest.importorskip(needed, reason=f'{needed} is not installed (the extra `test` brings it)')


@pytest.fixture(scope='module', params=['320x240', '376x198'])
def graphs(request, tmp_path_factory):
    """Return a size, and the exported graphs' sessions: one size needs padding, one does not."""
    import onnxruntime

    folder = tmp_path_factory.mktemp('onnx')
    cli.main(['export', '--onnx', str(folder), '--size', request.param])
    assert {path.name for path in folder.iterdir()} == {'encode.onnx', 'match.onnx'}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    encode, match = (
        onnxruntime.InferenceSession(folder / f'{name}.onnx', options)
        for name in ('encode', 'match')
    )
    return tuple(map(int, request.param.split('x'))), encode, match


def pictures(size, count):
    """Return views (count, 1, H, W) float32 of one textured plane, a few pixels apart."""
    rng = np.random.default_rng(0)
    width, height = size
    plane = torch.from_numpy(rng.random((1, 1, 60, 80), np.float32))
    plane = torch.nn.functional.interpolate(plane, (height + 64, width + 64), mode='bicubic')
    views = [plane[..., k:k + height, 2 * k:2 * k + width] for k in range(0, 8 * count, 8)]
    return torch.cat(views).clamp(0, 1)


def feed(match, names, reference, target, queries):
    """Return what the graph asks for."""
    given = {'queries': queries.numpy()}
    for end, features in (('reference', reference), ('target', target)):
        given |= {f'{end}_{k}': v for k, v in zip(names, features, strict=True)}
    return {value.name: given[value.name] for value in match.get_inputs()}


def test_onnx_runtime_computes_what_the_network_does_in_float32(graphs):
    size, encode, match = graphs
    matcher, _ = weights.load(weights.default_path())
    names = [value.name for value in encode.get_outputs()]
    views = pictures(size, 2)
    images = [view[None] for view in views]
    features = [encode.run(None, {'image': image.numpy()}) for image in images]
    expected = [matcher.encode(image, exact=True) for image in images]
    for found, own in zip(features, expected, strict=True):
        for name, array in zip(names, found, strict=True):
            np.testing.assert_allclose(array, getattr(own, name).detach(), atol=1e-4, rtol=1e-4)
    grey = np.rint(255 * views[0, 0].numpy()).astype(np.uint8)
    queries = torch.from_numpy(detect(grey, 150))[None]
    assert queries.shape[1] > 80
    uv, score, cov = match.run(None, feed(match, names, *features, queries))
    own = matcher.match(*expected, queries)
    apart = np.linalg.norm(uv - own.uv.detach().numpy(), axis=-1)
    assert (apart < 1e-2).mean() >= 0.99
    same = apart < 1e-2
    np.testing.assert_allclose(score[same], own.score.detach().numpy()[same], atol=1e-3)
    np.testing.assert_allclose(cov[same], own.cov.detach().numpy()[same], atol=1e-2)
    # And it is a match: the second view lies 16 px right and 8 px down of the first
    assert (np.linalg.norm(uv - queries.numpy() + (16, 8), axis=-1) < 1).mean() > 0.7


def test_any_number_of_images_and_queries(graphs):
    size, encode, match = graphs
    names = [value.name for value in encode.get_outputs()]
    batch = pictures(size, 3)
    together = encode.run(None, {'image': batch.numpy()})
    alone = [encode.run(None, {'image': image[None].numpy()}) for image in batch]
    for k, arrays in enumerate(zip(*alone, strict=True)):
        np.testing.assert_allclose(together[k], np.concatenate(arrays), atol=1e-4, rtol=1e-4)
    queries = 32 + 100 * torch.rand(2, 7, 2, generator=torch.manual_seed(0))
    reference, target = ([array[k:k + 2] for array in together] for k in (0, 1))
    uv, score, cov = match.run(None, feed(match, names, reference, target, queries))
    assert (uv.shape, score.shape, cov.shape) == ((2, 7, 2), (2, 7), (2, 7, 2, 2))
    for k in range(2):
        one = feed(match, names, alone[k], alone[k + 1], queries[k:k + 1])
        np.testing.assert_allclose(uv[k], match.run(None, one)[0][0], atol=1e-2)


def test_the_graphs_say_which_weights_they_are_of(graphs):
    size, *sessions = graphs
    _, info = weights.load(weights.default_path())
    for session in sessions:
        assert session.get_modelmeta().custom_metadata_map == {
            'family': info.family, 'version': str(info.version), 'sha256': info.sha256,
            'width': str(size[0]), 'height': str(size[1]),
        }


@pytest.mark.parametrize(
    ('arguments', 'sentence'),
    [
        (['--onnx', 'there'], 'for images of one size: --size WxH, or a BAG'),
        (['--colmap', 'there'], 'of a recording: imatching export BAG'),
        ([], 'say what to write'),
        (['--onnx', 'there', '--size', '640'], '640 is not a size like 640x480'),
        (['--onnx', 'there', '--size', '64x48', '--weights', 'none'], 'no such weights file'),
    ],
)
def test_wrong_arguments_get_a_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(['export', *arguments])
    assert ended.value.code == 2 and sentence in capsys.readouterr().err
    assert not (tmp_path / 'there').exists()


def test_without_the_exporters_packages_a_sentence_names_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)  # as if it were not installed
    with pytest.raises(SystemExit) as ended:
        cli.main(['export', '--onnx', str(tmp_path / 'there'), '--size', '64x48'])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and 'pip install onnx onnxscript' in said and len(said) < 200
    assert not (tmp_path / 'there').exists()
