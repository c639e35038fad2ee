"""What the documentation says is so: sentences, commands, arguments, parameters and links."""

import ast
from pathlib import Path
import re
import shlex

import cv2
from imatching_ros import cli
from imatching_ros.bundle.bundle import Bundle
from imatching_ros.data.images import decode_compressed, decode_image
from imatching_ros.data.recording import open_recording
from imatching_ros.geometry.camera import Camera
from imatching_ros.matching import weights
from imatching_ros.matching.tracker import Tracker
from imatching_ros.nodes import parameters
import launch_file
import numpy as np
import pytest
import safetensors.torch
from test_recording import noise, SIZE, START, writing

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').glob('*.md')])
TEXT = '\n'.join(page.read_text() for page in PAGES)
TABLE = (ROOT / 'docs' / 'troubleshooting.md').read_text().partition('## By what you see')[0]
SENTENCES = re.findall(r'^\| `([^`]+)` \|', TABLE, re.MULTILINE)


@pytest.fixture
def file(monkeypatch):
    """Return the launch file, run with stand-ins for what has no wheels."""
    return launch_file.LaunchFile(monkeypatch)


def is_said(sentence: str, text: str) -> bool:
    """Return whether the text has a sentence of the table, with … for what is put in."""
    pieces = [re.escape(piece.strip()) for piece in sentence.split('…') if piece.strip()]
    return re.search('.*'.join(pieces), text) is not None


def literals() -> str:
    """Return all texts of the code; those that are written in pieces as one, with … put in."""

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.JoinedStr):
            return ''.join(map(text, node.values))
        return str(node.value) if isinstance(node, ast.Constant) else '…'

    files = [launch_file.PATH, *(ROOT / 'imatching_ros').rglob('*.py')]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    return '\n'.join(text(n) for n in nodes if isinstance(n, ast.Constant | ast.JoinedStr))


def test_sentences_of_the_troubleshooting_table_are_in_the_code():
    """Those of nodes that run for long; the others are provoked below."""
    said = literals()
    assert len(SENTENCES) > 15
    for sentence in SENTENCES:
        assert is_said(sentence, said), sentence


def parameter(name: str) -> parameters.Parameter:
    return next(one for one in parameters.TABLE if one.name == name)


def weights_of(tensors: dict | None = None, **metadata: str) -> bytes:
    """Return the shipped weights with other tensors or other metadata."""
    path = weights.default_path()
    with safetensors.safe_open(path, 'pt') as file:
        own = file.metadata() | metadata
    return safetensors.torch.save(safetensors.torch.load_file(path) | (tensors or {}), own)


def jpeg() -> bytes:
    return cv2.imencode('.jpg', noise(0, 48, 64))[1].tobytes()


K = [50, 0, 32, 0, 50, 24, 0, 0, 1]
CAMERA = Camera(64, 48, 50.0, 50.0, 32.0, 24.0)
#: What is done wrong, and how the sentence of the table begins that is said of it
WRONG = {
    'the camera is not calibrated': lambda: Camera.from_intrinsics(64, 48, [0] * 9),
    '… cannot be': lambda: Camera.from_intrinsics(640, 480, [50, 0, 900, 0, 50, 24, 0, 0, 1]),
    'distortion model': lambda: Camera.from_intrinsics(64, 48, K, [0.1], 'telecentric'),
    'image encoding': lambda: decode_image('64FC2', 2, 2, 32, bytes(64)),
    'the compressed image': lambda: decode_compressed(jpeg()[:-300]),
    'the image is': lambda: Tracker(weights.load(weights.default_path())[0], 0, CAMERA).track(
        0, noise(0, 24, 32)
    ),
    'not a safetensors file': lambda: weights.loads(weights_of()[:-1000]),
    'the tensors do not have': lambda: weights.loads(weights_of(sha256='0' * 64)),
    'the weights are of family': lambda: weights.loads(weights_of(family='other')),
    "parameter '…' is": lambda: parameter('prune_px').refusal(-1.0),
    "parameter '…' takes": lambda: parameter('prune_px').refusal('much'),
}


@pytest.mark.parametrize('begins', WRONG)
def test_what_is_done_wrong_is_answered_with_the_sentence_of_the_table(begins):
    (sentence,) = [one for one in SENTENCES if one.startswith(begins)]
    try:
        said = WRONG[begins]()
    except ValueError as error:
        said = str(error)
    assert isinstance(said, str) and is_said(sentence, said), said


def test_what_is_wrong_with_recordings_is_answered_with_the_sentences_of_the_table(tmp_path):
    (tmp_path / 'one').mkdir()
    with writing(tmp_path / 'one') as pen:
        pen.info('/cam/camera_info', START)
        for k in range(4):
            size = 3 if k == 2 else SIZE[0] * SIZE[1]
            data = noise(k, size).tobytes()
            pen.image('/cam/image', START + k * 10**8, 'mono8', data, SIZE[1], header_stamp=7)
    recording = open_recording(pen.path)
    list(recording)
    text = ' '.join(recording.notes())
    for begins in ('… of … images … left out', 'the clock of the headers of'):
        (sentence,) = [one for one in SENTENCES if one.startswith(begins)]
        assert is_said(sentence, text), text
    for name in ('left.mcap', 'right.mcap'):
        (tmp_path / name).touch()
    (sentence,) = [one for one in SENTENCES if 'holds several bags' in one]
    with pytest.raises(ValueError) as caught:
        open_recording(tmp_path)
    assert is_said(sentence, str(caught.value)), caught.value


def test_a_standing_camera_is_told_the_sentence_of_the_table(shipped, day):
    camera, images = day
    tracker, bundle = Tracker(shipped[0], 0, camera), Bundle(camera)
    still = images[0][1]
    said = {bundle.add(tracker.track(START + k * 10**8, still)).reason for k in range(12)}
    (sentence,) = [one for one in SENTENCES if 'too few keyframes with parallax' in one]
    assert any(is_said(sentence, reason) for reason in said), said


def test_the_launch_file_says_the_sentence_of_the_table(file):
    (sentence,) = [one for one in SENTENCES if one.startswith('params_file:=')]
    with pytest.raises(FileNotFoundError) as caught:
        file.start(params_file='/missing.yaml')
    assert is_said(sentence, str(caught.value))


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_and_files_of_the_documentation_exist(page):
    text = page.read_text()
    named = re.findall(r'\]\(([\w./-]+)\)', text)
    named += re.findall(r'`((?:docs|config|models|launch|benchmarks|training)/[\w./-]*)`', text)
    for name in named:
        assert (page.parent / name).exists() or (ROOT / name).exists(), name


def commands(word: str) -> list[str]:
    """Return the command lines of all pages that begin with a word, without their comments."""
    text = TEXT.replace('\\\n', ' ')
    lines = [re.sub(r'^(\.venv/bin/)?', '', line.strip()) for line in text.splitlines()]
    inline = re.findall(rf'`((?:\.venv/bin/)?{word} [^`]+)`', text)
    return [re.split(r'\s+#', line)[0] for line in lines + inline if line.startswith(word)]


def test_commands_of_the_documentation_are_understood():
    lines = [line for line in commands('imatching') if re.match(r'imatching \w+ (BAG|DATA)', line)]
    assert len(lines) > 4
    for line in lines:
        words = shlex.split(re.sub(r'[\[\]…]', '', line))[1:]
        assert cli.parse(words).command == words[0]


def test_the_readme_matches_two_images(tmp_path, monkeypatch, capsys):
    code = re.search(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)[1]
    blots = np.random.default_rng(0).integers(0, 255, (60, 80), np.uint8)
    scene = cv2.resize(blots, (480, 360), interpolation=cv2.INTER_CUBIC)
    H_true = np.array([[0.97, -0.08, 21.0], [0.06, 1.02, -12.0], [1e-5, 2e-5, 1.0]])
    cv2.imwrite(str(tmp_path / 'a.png'), scene)
    cv2.imwrite(str(tmp_path / 'b.png'), cv2.warpPerspective(scene, H_true, (480, 360)))
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code, found)  # noqa: S102
    good, corners = map(int, re.match(r'(\d+) of (\d+) corners', capsys.readouterr().out).groups())
    assert corners > 200 and good > 0.5 * corners
    middle = np.array([[[240.0, 180.0], [100.0, 90.0]]])
    there, truly = (cv2.perspectiveTransform(middle, H) for H in (found['H'], H_true))
    assert np.abs(there - truly).max() < 0.5


def test_arguments_of_the_launch_file_that_the_documentation_names_exist(file):
    declared = set(file.arguments)
    named = {
        name
        for line in commands('ros2 launch imatching_ros')
        for name in re.findall(r'(\w+):=', line)
    }
    named |= set(re.findall(r'`(\w+):=[^`]*`', TEXT))
    assert len(declared) >= 14 and named <= declared, named - declared


def test_parameters_that_the_documentation_names_exist():
    declared = {parameter.name for parameter in parameters.TABLE} | {'use_sim_time'}
    set_ones = set(re.findall(r'ros2 param set /\w+ (\w+)', TEXT))
    set_ones |= set(re.findall(r'-p (\w+):=', TEXT))
    tuned = set(re.findall(r'`([a-z_]+)` [\d.]', (ROOT / 'docs' / 'tuning.md').read_text()))
    assert len(tuned) > 6 and set_ones | tuned <= declared, (set_ones | tuned) - declared
