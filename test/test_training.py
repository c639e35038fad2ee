"""
The command that makes the shipped weights, on sources drawn here: a few steps of all it does.

Its modules are those of a folder of scripts, which is put on the path.
"""

import copy
import os
from pathlib import Path
import re
import subprocess
import sys

import cv2
from imatching_ros.data.synthetic import textures
from imatching_ros.matching import weights
import numpy as np
import pytest
import torch

TRAINING = Path(__file__).parents[1] / 'training'
sys.path.insert(0, str(TRAINING))

import judge  # noqa: E402,I100
from losses import cross_entropy  # noqa: E402
import pairs  # noqa: E402
import pretrain  # noqa: E402
import sources  # noqa: E402

# A run whose rests are short, and that a signal meets in the middle of a step
STRUCK = """
import os, pretrain
pretrain.KEEP_EVERY = 2
calls, losses = [], pretrain.losses
def struck(*arguments):
    calls.append(1)
    if len(calls) == {call}:
        os.kill(os.getpid(), {signal})
    return losses(*arguments)
pretrain.losses = struck
pretrain.main()
"""


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    """Return a folder of eight drawn pictures."""
    folder = tmp_path_factory.mktemp('photographs')
    rng = np.random.default_rng(0)
    kinds = (textures.shapes, textures.poster, textures.stains, textures.facade)
    for k in range(8):
        cv2.imwrite(str(folder / f'{k}.png'), kinds[k % 4](rng, 300, 400))
    return folder


@pytest.fixture(scope='module')
def video(tmp_path_factory):
    """Return a video of 20 frames that slides over a picture."""
    file = tmp_path_factory.mktemp('videos') / 'slide.avi'
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*'MJPG'), 10, (400, 300))
    picture = textures.shapes(np.random.default_rng(1), 300, 500)
    for k in range(20):
        writer.write(cv2.cvtColor(picture[:, 4 * k:4 * k + 400], cv2.COLOR_GRAY2BGR))
    writer.release()
    return file


@pytest.fixture(scope='module')
def pictures(photographs, tmp_path_factory):
    """Return the files that training draws from."""
    folder = tmp_path_factory.mktemp('pictures')
    sources.write_pictures([photographs], folder)
    return sorted((folder / 'train').iterdir())


@pytest.fixture(scope='module')
def scene(tmp_path_factory):
    """Return the folder of a rendered scene."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, 'SCENE_FRAMES', 6)
        return Path(sources.Scenes(tmp_path_factory.mktemp('scenes'), 1)[0])


@pytest.fixture
def short(monkeypatch):
    """Make a training's rests short, and what judges it small."""
    monkeypatch.setattr(pretrain, 'KEEP_EVERY', 8)
    monkeypatch.setattr(pretrain, 'JUDGED', 1)
    monkeypatch.setattr(pretrain, 'CALIBRATED', 2)
    monkeypatch.setattr(pretrain, 'SCENE_SIZE', (320, 240))


def command(out, *rest):
    small = ('--scenes', 0, '--threads', 1, '--batch', 2, '--workers', 0)
    return list(map(str, (*rest[:1], '--out', out, *small, *rest[1:])))


def bytes_of(tensors):
    return [tensor.numpy().tobytes() for tensor in tensors]


def offset(reference, target, queries, truth):
    """
    Return by how much (2,) px the truth is off on average, and what correlates there.

    The target's brightness at the truth is explained by gain and bias of the reference's and by a
    small displacement along its own gradient.
    """
    known = np.isfinite(truth[:, 0])
    first, second = (
        cv2.GaussianBlur(image.astype(np.float32), (0, 0), 1.5) for image in (reference, target)
    )
    slopes = [cv2.Sobel(second, cv2.CV_32F, *axis, ksize=3) / 8 for axis in ((1, 0), (0, 1))]
    at, there = (uv[known].astype(np.float32)[:, None] for uv in (queries, truth))
    seen, was, du, dv = (
        cv2.remap(image, uv, None, cv2.INTER_LINEAR)[:, 0]
        for image, uv in ((second, there), (first, at), (slopes[0], there), (slopes[1], there))
    )
    rows = np.stack((-du, -dv, was, np.ones_like(was)), 1)
    good = np.ones(len(rows), bool)
    for _ in range(3):  # edges of occlusion, where blur mixes two surfaces
        solution = np.linalg.lstsq(rows[good], seen[good], rcond=None)[0]
        residual = np.abs(rows @ solution - seen)
        good = residual <= np.quantile(residual, 0.8)
    return solution[:2], np.corrcoef(was[good], seen[good])[0, 1]


def test_training_truth_is_where_the_same_surface_is_seen(pictures, scene):
    """It is so in windows of scenes, in frames at half their size and in pictures, to 0.1 px."""
    loaded = sources.Scene.load(scene)
    small, whole = (320, 240), sources.SCENE_SIZE
    for draw in (
        lambda rng: pairs.rendered(rng, loaded, small, 0.5),
        lambda rng: pairs.rendered(rng, loaded, whole, 1.0),
        lambda rng: pairs.warped(rng, pictures, small, 0.5),
    ):
        drawn = [draw(np.random.default_rng(k)) for k in range(10)]
        found = [offset(*pair[:4]) for pair in drawn if pair is not None]
        assert len(found) >= 8
        assert np.median([correlation for _, correlation in found]) > 0.97
        assert np.abs(np.median([shift for shift, _ in found], 0)).max() < 0.1
        wrong = [offset(*pair[:3], pair.truth + (1, 0))[0] for pair in drawn if pair is not None]
        assert np.median(wrong, 0)[0] == pytest.approx(-1, abs=0.3), 'it tells a shift of a pixel'


@pytest.mark.filterwarnings('ignore:This DataLoader')  # fewer cores than workers
def test_training_pairs_do_not_depend_on_the_workers(pictures, scene):
    drawn = pairs.Pairs(pictures, [scene], (3, 0), 2)
    alone, apart = (list(pairs.loader(drawn, [1, 2, 5], workers)) for workers in (0, 2))
    assert [bytes_of(pair) for pair in alone] == [bytes_of(pair) for pair in apart]
    assert len({bytes_of(pair)[0] for pair in alone}) == 3


def test_training_pictures_of_photographs_and_videos(photographs, video, tmp_path):
    digest = sources.write_pictures([photographs, video], tmp_path)
    names = {
        part: sorted(file.stem for file in (tmp_path / part).iterdir())
        for part in ('train', 'held_out')
    }
    first, second = ([f'{number:04}_{k:06}_0400' for k in range(count)] for number, count in
                     ((0, 8), (1, 3)))
    assert names == {'train': first[:7] + second, 'held_out': first[7:]}
    assert sources.write_pictures([photographs, video], tmp_path) == digest
    assert sources.write_pictures([video, photographs], tmp_path) != digest
    large = np.zeros((1000, 2000), np.uint8)
    cv2.imwrite(str(tmp_path / 'large.png'), large)
    sources.write_pictures([tmp_path / 'large.png'], tmp_path / 'copies')
    copies = {np.load(file).shape for file in (tmp_path / 'copies' / 'train').iterdir()}
    assert copies == {(800, 1600), (450, 900), (260, 520)}


@pytest.mark.parametrize('case, says', [
    ('nothing', 'does not exist'), ('empty', 'holds no photographs'),
    ('text', 'cannot be read as a picture'), ('small', 'smaller than the views'),
    ('cut', 'frames; copy it again'), ('stub', 'cannot be read as a video'),
])
def test_training_sources_that_are_of_no_use(case, says, video, tmp_path, capfd):
    path = tmp_path / {'cut': 'cut.avi', 'stub': 'stub.mp4', 'small': 'small.png'}.get(case, case)
    if case == 'empty':
        path.mkdir()
    elif case == 'small':
        cv2.imwrite(str(path), np.zeros((100, 100), np.uint8))
    elif case == 'text':
        path.write_text('no picture')
    elif case in ('cut', 'stub'):
        path.write_bytes(video.read_bytes()[:{'cut': video.stat().st_size // 2, 'stub': 60}[case]])
    with pytest.raises(SystemExit) as stopped:
        pretrain.main(command(tmp_path / 'out.safetensors', path))
    said = capfd.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert said[-1].startswith('pretrain: ') and str(path) in said[-1] and says in said[-1]
    assert not any('Traceback' in line for line in said)


def test_training_learns_and_is_gone_on_from(photographs, short, tmp_path, capsys):
    out = tmp_path / 'out.safetensors'
    pretrain.main(command(out, photographs, '--steps', 24))
    said = capsys.readouterr().out
    coarse, fine = (
        [float(value) for value in re.findall(rf'{name} ([\d.]+)', said)]
        for name in ('coarse', 'fine')
    )
    assert len(coarse) == 3
    assert coarse[-1] < coarse[0] - 0.2 and fine[-1] < fine[0] - 0.05
    assert 'held out' in said and 'calibration error' in said
    assert os.listdir(tmp_path) == [out.name], 'nothing else is left'
    _, info = weights.load(out)
    assert (info.version, info.parent) == (0, 0)

    tuned = tmp_path / 'tuned.safetensors'
    pretrain.main(command(tuned, photographs, '--steps', 2, '--from', out))
    _, after = weights.load(tuned)
    assert (after.version, after.parent) == (1, 0)
    assert after.sha256 != info.sha256


def test_training_interrupted_and_killed_ends_with_the_same_bits(
    photographs, short, monkeypatch, tmp_path, capsys
):
    def struck(signal, call, workers):
        arguments = command(tmp_path / 'struck.safetensors', *run, '--workers', workers)
        path = os.pathsep.join((str(TRAINING), str(TRAINING.parent), os.getenv('PYTHONPATH', '')))
        return subprocess.run(
            [sys.executable, '-c', STRUCK.format(signal=signal, call=call), *arguments],
            env={**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1'},
            capture_output=True, text=True, timeout=120,
        )

    run = (photographs, '--steps', 6)
    ended = struck('2', 3, 1)  # Ctrl-C in the third step
    assert ended.returncode == 130
    assert ended.stderr.splitlines()[-1].startswith('interrupted')
    assert 'Traceback' not in ended.stderr
    with pytest.raises(SystemExit):
        pretrain.main(command(tmp_path / 'struck.safetensors', *run, '--seed', 1))
    assert 'other seed' in capsys.readouterr().err
    ended = struck('9', 3, 0)  # killed in the sixth
    assert ended.returncode == -9
    assert 'going on from step 3' in ended.stdout
    pretrain.main(command(tmp_path / 'struck.safetensors', *run))
    assert 'going on from step 4' in capsys.readouterr().out
    pretrain.main(command(tmp_path / 'whole.safetensors', *run))
    struck, whole = (tmp_path / f'{name}.safetensors' for name in ('struck', 'whole'))
    assert struck.read_bytes() == whole.read_bytes()


def test_training_fits_the_score_to_what_hits(shipped, pictures):
    matcher = copy.deepcopy(shipped[0])
    drawn = pairs.Pairs(pictures, [], (0, 0), 2)
    fitted, others = (list(pairs.loader(drawn, order, 0)) for order in (range(6), range(6, 12)))
    with torch.no_grad():
        matcher.log_odds.copy_(torch.tensor([0.0, 0.0, 0.0, 0.0, 3.0]))  # all are sure to hit
    assert judge.calibration_error(matcher, others) > 0.3
    judge.calibrate(matcher, fitted)
    assert judge.calibration_error(matcher, others) < 0.1
    assert 0.2 < judge.accuracy(matcher, others) < 0.9


def test_training_cross_entropy_shares_its_target_among_four_cells():
    similarity = torch.randn(1, 3, 4 * 5, generator=torch.Generator().manual_seed(0))
    log_p = similarity.log_softmax(-1).reshape(3, 4, 5)
    at = torch.tensor([[[2.0, 1.0], [1.25, 2.0], [9.0, -3.0]]])  # x, y; the last one outside
    loss = cross_entropy(similarity, at, 4, 5)[0]
    assert loss[0] == pytest.approx(-log_p[0, 1, 2].item())
    expected = -(0.75 * log_p[1, 2, 1] + 0.25 * log_p[1, 2, 2]).item()
    assert loss[1] == pytest.approx(expected)
    assert loss[2] == pytest.approx(-log_p[2, 0, 4].item())
