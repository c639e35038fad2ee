"""The commands, on rendered recordings and on all that can be wrong with what they are given."""

import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys

from imatching_ros import cli
from imatching_ros.data.recording import open_recording
from imatching_ros.evaluation.matching import evaluate_matching, evaluation_pairs
from imatching_ros.evaluation.measure import GAP
from imatching_ros.matching import weights
import numpy as np
import pytest
from rosbags.highlevel import AnyReader
from test_recording import good, noise, ROS2, SIZE, START, writing

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ['demo', 'replay', 'tune', 'evaluate', 'export']


def imatching(*arguments, folder):
    """Return the command in a process of its own, in ``folder``."""
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'COLUMNS': '120', 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-m', 'imatching_ros.cli', *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )


def one_sentence(text):
    """Return what stderr says without the program's name; fails where that is not one line."""
    lines = text.splitlines()
    assert len(lines) == 1 and lines[0].startswith('imatching: ') and 'Traceback' not in text, text
    return lines[0].removeprefix('imatching: ')


def refused(capsys, *arguments, code=2):
    """Return the sentence with which the command refuses, or (1) says that it has nothing."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    assert stop.value.code == code
    return one_sentence(capsys.readouterr().err)


@pytest.mark.parametrize(
    ('words', 'camera', 'bag'),
    [
        ('BAG --camera 1 2 3 4', '1 2 3 4', 'BAG'),
        ('--camera 1 2 3 4 BAG', '1 2 3 4', 'BAG'),
        ('--camera 1 2 3 4 radtan -.1 .2 0 1e-3 BAG', '1 2 3 4 radtan -.1 .2 0 1e-3', 'BAG'),
        ('--camera 1 2 3 4 -.1 .2 BAG', '1 2 3 4 -.1 .2', 'BAG'),
        ('--camera 1 2 3 4 --first 0.5 BAG', '1 2 3 4', 'BAG'),
        ('--camera cam.yaml BAG', 'cam.yaml', 'BAG'),
        ('BAG --camera cam.yaml --first 0.5', 'cam.yaml', 'BAG'),
        ('--camera=cam.yaml BAG', 'cam.yaml', 'BAG'),
        ('BAG', None, 'BAG'),
    ],
)
def test_a_camera_does_not_swallow_the_recording(words, camera, bag):
    options = cli.parse(['evaluate', *words.split()])
    assert (options.camera, str(options.data)) == (camera, bag)


@pytest.mark.parametrize(
    ('command', 'more'),
    [
        ('replay', []), ('evaluate', []), ('export', ['--map', 'map']),
        ('tune', ['--out', 'w.safetensors']),
    ],
)
def test_every_command_takes_a_camera(tmp_path, capsys, monkeypatch, command, more):
    """Each says what is wrong with the one that is given, and without one how to give it."""
    monkeypatch.chdir(tmp_path)
    bag = without_camera_info(tmp_path)
    assert 'give --camera fx fy cx cy [model]' in refused(capsys, command, bag, *more)
    for given in ('30 30 160 12', '1 0 16 12'):
        text = refused(capsys, command, bag, *more, '--camera', *given.split())
        assert 'the camera given for' in text
    with pytest.raises(SystemExit) as stop:
        cli.main([command, str(bag), *more, '--camera'])
    assert stop.value.code == 2


# Bad input ---------------------------------------------------------------------------------------


def missing(folder):
    return folder / 'nowhere'


def empty_folder(folder):
    (folder / 'empty').mkdir()
    return folder / 'empty'


def not_a_bag(folder):
    (folder / 'notes.txt').write_text('hello')
    return folder / 'notes.txt'


def without_images(folder):
    with writing(folder) as pen:
        pen.info('/cam/camera_info', START)
    return pen.path


def two_cameras(folder):
    with writing(folder) as pen:
        for side in ('left', 'right'):
            pen.info(f'/{side}/camera_info', START)
            pen.image(f'/{side}/image_raw', START, 'mono8', noise(0, *SIZE).tobytes(), SIZE[1])
    return pen.path


def without_camera_info(folder):
    with writing(folder) as pen:
        pen.image('/cam/image_raw', START, 'mono8', noise(0, *SIZE).tobytes(), SIZE[1])
    return pen.path


def uncalibrated(folder):
    with writing(folder) as pen:
        pen.info('/cam/camera_info', START, fx=0.0)
        pen.image('/cam/image_raw', START, 'mono8', noise(0, *SIZE).tobytes(), SIZE[1])
    return pen.path


def truncated(folder, kind='mcap'):
    path = good(folder, kind, count=40)
    file = path if path.is_file() else next(path.glob('*.mcap'))
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 50])  # before the first image
    return file


def truncated_rosbag1(folder):
    return truncated(folder, 'rosbag1')


def of_another_size(folder):
    with writing(folder) as pen:
        for k in range(3):
            pen.info('/cam/camera_info', START + k, size=(30, 40))
            pen.image('/cam/image_raw', START + k, 'mono8', noise(k, *SIZE).tobytes(), SIZE[1])
    return pen.path


def of_unknown_encoding(folder):
    with writing(folder) as pen:
        pen.info('/cam/camera_info', START)
        pen.image(
            '/cam/image_raw', START, '64FC2', noise(0, SIZE[0], 2 * SIZE[1]).tobytes(), 2 * SIZE[1]
        )
    return pen.path


BAD_BAGS = [
    (missing, 'nowhere does not exist'),
    (empty_folder, 'holds no recording'),
    (not_a_bag, 'is not a recording'),
    (without_images, 'has no images'),
    (
        two_cameras,
        'has 2 image topics; choose one with --image-topic: /left/image_raw, /right/image_raw',
    ),
    (without_camera_info, 'has no camera_info'),
    (uncalibrated, 'fx is 0, it must be a positive number of pixels'),
    (truncated, 'is damaged or truncated'),
    (truncated_rosbag1, 'is damaged or truncated'),
]
#: These show only when the images are read.
BAD_IMAGES = [
    (of_another_size, 'is 32x24, but .* is for 40x30'),
    (of_unknown_encoding, "encoding '64FC2'"),
]


@pytest.mark.parametrize('make, says', BAD_BAGS, ids=lambda value: getattr(value, '__name__', ''))
def test_a_bad_bag_is_one_sentence_in_every_command(tmp_path, monkeypatch, capsys, make, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'bags').mkdir()
    bag = make(tmp_path / 'bags')
    tune = ['tune', bag, '--out', 'w.safetensors']
    for arguments in (
        ['replay', bag],
        tune,
        ['evaluate', bag],
        ['export', bag, '--colmap', 'c', '--map', 'm'],
    ):
        assert says in refused(capsys, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ['bags']  # nothing is begun


@pytest.mark.parametrize(
    'make, says', BAD_IMAGES, ids=lambda value: getattr(value, '__name__', '')
)
def test_a_bad_image_is_one_sentence(tmp_path, monkeypatch, capsys, make, says):
    monkeypatch.chdir(tmp_path)
    bag = make(tmp_path)
    (bag / 'groundtruth.txt').write_text('12.0 0 0 0 0 0 0 1\n')  # so that it comes to the images
    for arguments in (
        ['tune', bag, '--out', 'w.safetensors', '--train-fraction', '1'],
        ['evaluate', bag],
    ):
        assert re.search(says, refused(capsys, *arguments))
    assert not (tmp_path / 'w.safetensors').exists()


def foreign(path):
    path.write_bytes(b"PK\x03\x04 somebody else's pickle" * 50)


def cut_short(path):
    path.write_bytes(weights.default_path().read_bytes()[:-1000])


@pytest.mark.parametrize(
    'make, says',
    [
        (foreign, 'not a safetensors file'), (cut_short, 'cut short'),
        (lambda path: None, 'there is no such weights'),
    ],
    ids=['foreign', 'cut short', 'missing'],
)
def test_bad_weights_are_one_sentence(tmp_path, monkeypatch, capsys, daylight, make, says):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'w.safetensors'
    make(path)
    before = path.read_bytes() if path.exists() else None
    for arguments in (
        ['tune', daylight, '--out', tmp_path / 'new.safetensors', '--weights', path],
        ['evaluate', daylight, '--weights', path],
        ['export', daylight, '--map', tmp_path / 'map', '--weights', path],
    ):
        sentence = refused(capsys, *arguments)
        assert says in sentence and str(path) in sentence
    if before:
        # what is there is not written over
        assert says in refused(capsys, 'tune', daylight, '--out', path)
        assert path.read_bytes() == before


def test_a_recording_too_short_to_learn_from_is_one_sentence(
    tmp_path, monkeypatch, capsys, daylight
):
    monkeypatch.chdir(tmp_path)
    sentence = refused(
        capsys, 'tune', daylight, '--out', 'w.safetensors', '--train-fraction', '0.2', code=1
    )
    assert 'too few to learn from' in sentence and not (tmp_path / 'w.safetensors').exists()


def test_what_nothing_can_be_had_from_ends_with_code_1_and_says_why(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    bag = good(tmp_path, 'mcap', count=6)
    sentence = refused(capsys, 'evaluate', bag, code=1)
    assert f'{bag} has no ground truth' in sentence and 'groundtruth.txt' in sentence
    (bag / 'groundtruth.txt').write_text('12.0 0 0 0 0 0 0 1\n13.0 1 0 0 0 0 0 1\n')
    sentence = refused(capsys, 'evaluate', bag, code=1)
    assert 'have a true pose within a millisecond' in sentence
    written = tmp_path / 'map', tmp_path / 'colmap'
    sentence = refused(capsys, 'export', bag, '--map', written[0], '--colmap', written[1], code=1)
    assert 'none of the 6 images' in sentence and 'got a pose' in sentence
    assert not written[0].exists()  # images and matches are there for COLMAP, a map is not
    assert (written[1] / 'database.db').is_file()


def test_paths_are_printed_as_they_are(tmp_path, monkeypatch, capsys, daylight):
    odd = tmp_path / 'Küche [bold] a:b [/] :smile:'
    shutil.copytree(daylight, odd / 'bag [left]')
    monkeypatch.chdir(odd)
    cli.main(['export', str(odd / 'bag [left]'), '--map', str(odd / 'map [red]')])
    assert f'landmarks in {odd / "map [red]"}' in capsys.readouterr().out
    cli.main(['evaluate', str(odd / 'bag [left]'), '--pairs', '1'])
    out = re.sub(r'\s+', ' ', capsys.readouterr().out)
    assert 'bag [left], images' in out


@pytest.mark.parametrize(
    'arguments',
    [
        [], ['fly'], ['evaluate'], ['tune', 'bag'],
        ['tune', 'bag', '--out', 'w', '--train-fraction', '1.5'],
        ['tune', 'bag', '--out', 'w', '--steps', 'many'],
        ['replay', 'bag', '--train-fraction', 'nan'],
    ],
    ids=' '.join,
)
def test_wrong_arguments_end_with_code_2_and_the_usage(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith('usage: imatching') and 'Traceback' not in error


def test_a_traceback_is_had_where_it_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv('IMATCHING_TRACEBACK', '1')
    with pytest.raises(ValueError, match='does not exist'):
        cli.main(['evaluate', str(tmp_path / 'nowhere')])


def test_refusals_of_the_real_process(tmp_path):
    (tmp_path / 'foreign.safetensors').write_text('not weights')
    ended = [
        imatching('evaluate', 'nowhere', folder=tmp_path),
        imatching('tune', 'nowhere', '--out', 'foreign.safetensors', folder=tmp_path),
    ]
    assert [process.returncode for process in ended] == [2, 2]
    assert 'recording nowhere does not exist' in one_sentence(ended[0].stderr)
    assert 'not a safetensors file' in one_sentence(ended[1].stderr)
    assert ended[0].stdout == ended[1].stdout == ''


# Good input --------------------------------------------------------------------------------------


@pytest.mark.parametrize('command', COMMANDS)
def test_help_says_what_a_command_does(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, '--help'])
    assert stop.value.code == 0
    text = ' '.join(capsys.readouterr().out.split())
    assert text.startswith(f'usage: imatching {command}') and cli.COMMANDS[command][1] in text


def test_help_and_version_of_the_program(tmp_path):
    process = imatching('--help', folder=tmp_path)
    assert process.returncode == 0 and all(command in process.stdout for command in COMMANDS)
    assert imatching('--version', folder=tmp_path).stdout.strip() == cli.__version__
    whole = [sys.executable, '-m', 'imatching_ros', '--version']
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    said = subprocess.run(whole, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (said.returncode, said.stdout.strip()) == (0, cli.__version__)


def test_the_command_line_is_understood_before_anything_heavy_is_imported(tmp_path):
    code = (
        'import sys; from imatching_ros import cli; cli.parse(["export", "bag", "--map", "m"]); '
        'print([m for m in ("torch", "numpy", "cv2", "rclpy", "numba") if m in sys.modules])'
    )
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    said = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert said.stdout.strip() == '[]', said


REPORT = {
    'input': {'frames', 'frames_matched', 'keyframes', 'dropped'},
    'trajectory': {'ate_m', 'path_m', 'ate_percent'},
    'learning': {'steps', 'windows', 'promotions', 'rollbacks', 'seconds', 'model_version'},
    'latency_ms': {'matcher_p50', 'matcher_p95', 'bundle_p50', 'bundle_p95', 'learner_step_p50'},
}
ACCURACY = {'mma_1px', 'mma_2px', 'mma_5px', 'auc_5', 'auc_10', 'auc_20'}
STEPS = 12


@pytest.fixture(scope='module')
def tuned(tmp_path_factory, dusk, worn):
    """Return the folder where `imatching tune` went on from weights, and its process."""
    folder = tmp_path_factory.mktemp('tuned')
    weights.save(folder / 'w.safetensors', worn[0], 0, 0)
    process = imatching(
        'tune', dusk, '--out', 'w.safetensors', '--run-dir', 'run', '--steps', STEPS, '--seed', 1,
        folder=folder,
    )
    assert process.returncode == 0, process.stderr
    return folder, process


def test_tune_writes_weights_and_a_report(tuned, dusk):
    folder, process = tuned
    assert process.stderr == '' and sorted(path.name for path in folder.iterdir()) == [
        'run',
        'w.safetensors',
    ]
    matcher, info = weights.load(folder / 'w.safetensors')
    assert 'starting from w.safetensors, version 0' in process.stdout
    assert f'weights, version {info.version}: w.safetensors' in process.stdout
    report = json.loads((folder / 'run' / 'report.json').read_text())
    for key, names in REPORT.items():
        assert names <= report[key].keys()
    assert all(ACCURACY <= report['matching'][when].keys() for when in ('before', 'after'))
    assert {'throughput_hz', 'peak_memory_mb'} <= report.keys()
    assert report['input']['frames'] == 80 and report['input']['frames_matched'] == 56
    learning = report['learning']
    assert learning['steps'] == STEPS and learning['windows'] >= 4
    assert learning['model_version'] == info.version == learning['promotions']
    # not had, not invented
    assert report['trajectory']['ate_m'] is None and report['throughput_hz'] is None
    html = (folder / 'run' / 'report.html').read_text()
    assert html.count('<img') + html.count('<svg') >= 2 and 'http://' not in html.replace(
        'http://www.w3.org', ''
    )
    assert str(folder / 'run' / 'report.html') in process.stdout.replace('\n', '')


def test_what_tune_says_of_before_and_after_is_true(tuned, dusk, worn):
    # Also where --out was gone on from: `before` is of the weights that were there.
    folder, _ = tuned
    matching = json.loads((folder / 'run' / 'report.json').read_text())['matching']
    recording = open_recording(dusk)
    pairs = evaluation_pairs(recording, 56 + GAP, len(recording) - 1)
    matcher, info = weights.load(folder / 'w.safetensors')
    for when, one in (('before', worn[0]), ('after', matcher)):
        accuracy = evaluate_matching(one, recording, pairs)
        assert matching[when]['mma_1px'] == pytest.approx(accuracy.mma_1px, abs=0.5)
    assert info.version > 0 and matching['after']['mma_1px'] > matching['before']['mma_1px']


def test_evaluate_shows_weights_side_by_side(tuned, daylight, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '120')
    paths = [weights.default_path(), tuned[0] / 'w.safetensors']
    cli.main(
        [
            'evaluate', str(daylight), '--weights', *map(str, paths), '--first', '0.25', '--pairs',
            '2',
        ]
    )
    captured = capsys.readouterr()
    assert captured.err == ''
    text = captured.out
    assert (
        'expectation' in text
        and 'version 0' in text
        and 'images 10 to 39, 6 pairs' in text.replace('\n', ' ')
    )
    rows = [line.replace('│', ' ').split() for line in text.splitlines() if '│' in line]
    numbers = [[word for word in row if word.replace('.', '').isdigit()] for row in rows]
    table = [list(map(float, row[-2:])) for row in numbers if len(row) >= 2 and '.' in row[-1]]
    # mma and auc thrice each, and the trajectory
    assert len(table) == 7 and np.isfinite(table).all()
    assert all(table[0][k] <= table[1][k] <= table[2][k] <= 100 for k in (0, 1))
    assert max(table[6]) < 5  # percent of the path


def test_evaluate_without_ground_truth_invents_nothing(tmp_path, capsys):
    bag = two_cameras(tmp_path)
    sentence = refused(capsys, 'evaluate', bag, '--image-topic', '/left/image_raw', code=1)
    assert 'has no ground truth' in sentence and '–' not in capsys.readouterr().out


# Images that cannot be used ----------------------------------------------------------------------


@pytest.fixture(scope='module')
def spoilt(tmp_path_factory, daylight):
    """Return the daylight recording with image 17 cut short and a nought for the stamp of 30."""
    folder, number = tmp_path_factory.mktemp('spoilt') / 'daylight', 0
    shutil.copytree(daylight, folder, ignore=shutil.ignore_patterns('bag'))
    with AnyReader([daylight / 'bag'], default_typestore=ROS2) as reader, writing(folder) as pen:
        for connection, stamp, raw in reader.messages():
            message = reader.deserialize(raw, connection.msgtype)
            if connection.msgtype == 'sensor_msgs/msg/Image':
                if number == 17:
                    message.data = message.data[:9000]
                if number == 30:
                    message.header.stamp.sec = message.header.stamp.nanosec = 0
                number += 1
            pen.write(connection.topic, stamp, message)
    pen.path.rename(folder / 'bag')
    return folder


def said_of(spoilt, text):
    """Fail unless what was left out is said, once."""
    text = ' '.join(text.split())
    assert text.count('2 of 40 images were left out: ') == 1, text
    assert '1 that cannot be read (the image has 9000 bytes, ' in text
    assert '1 with a stamp that goes back' in text


def test_pairs_are_of_images_that_can_be_used(spoilt, daylight):
    recording, whole = open_recording(spoilt), open_recording(daylight)
    stamps = [stamp for stamp, _ in whole]
    missing = {stamps[17], stamps[30]}
    pairs = evaluation_pairs(recording, 0, 39, steps=(1,), per_step=40)
    assert {stamp for p in pairs for stamp in (p.reference, p.target)} <= set(stamps) - missing
    pairs = evaluation_pairs(recording, 10, 39)
    assert min(pair.reference for pair in pairs) >= stamps[10]
    accuracy = evaluate_matching(weights.load(weights.default_path())[0], recording, pairs)
    assert accuracy.pairs == len(pairs) > 0 and accuracy.mma_5px > 90


def test_export_and_evaluate_leave_out_what_cannot_be_used(spoilt, tmp_path, capsys):
    cli.main(['export', str(spoilt), '--map', str(tmp_path / 'map')])
    said_of(spoilt, capsys.readouterr().out)
    lines = (tmp_path / 'map' / 'trajectory.txt').read_text().splitlines()
    stamps = [float(line.split()[0]) for line in lines if line[0] != '#']
    assert len(stamps) > 5 and stamps == sorted(stamps)
    cli.main(['evaluate', str(spoilt), '--pairs', '2'])
    said_of(spoilt, capsys.readouterr().out)


def test_tune_leaves_out_what_cannot_be_used(spoilt, tmp_path, capsys):
    cli.main([
        'tune', str(spoilt), '--out', str(tmp_path / 'w.safetensors'), '--steps', '0',
        '--run-dir', str(tmp_path / 'run'), '--train-fraction', '1',
    ])
    said_of(spoilt, capsys.readouterr().out)
    figures = json.loads((tmp_path / 'run' / 'report.json').read_text())['input']
    assert (figures['frames'], figures['frames_matched']) == (40, 38)


def test_replay_plays_on_and_writes_its_report(spoilt, tmp_path, capsys):
    cli.main(['replay', str(spoilt), '--no-learn', '--out', str(tmp_path / 'run')])
    said_of(spoilt, capsys.readouterr().out)
    report = json.loads((tmp_path / 'run' / 'report.json').read_text())
    # the player leaves out the stamp, the matcher the image
    assert (report['input']['frames'], report['input']['frames_matched']) == (39, 38)
    assert report['matching']['before']['mma_5px'] > 90
