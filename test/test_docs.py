"""What the documentation says is so: sentences, commands, arguments, parameters and links."""

import ast
from pathlib import Path
import re
import shlex

import cv2
from imatching_ros import cli
from imatching_ros.nodes import parameters
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').glob('*.md')])
LAUNCH = (ROOT / 'launch' / 'imatching.launch.py').read_text()


def literals() -> str:
    """
    Return all texts of the code.

    Those that are written in pieces are one, with … for what is put in.
    """

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.JoinedStr):
            return ''.join(map(text, node.values))
        return str(node.value) if isinstance(node, ast.Constant) else '…'

    trees = [ast.parse(file.read_text()) for file in (ROOT / 'imatching_ros').rglob('*.py')] + [
        ast.parse(LAUNCH)
    ]
    return '\n'.join(
        text(n)
        for tree in trees
        for n in ast.walk(tree)
        if isinstance(n, ast.Constant | ast.JoinedStr)
    )


def test_sentences_of_the_troubleshooting_table_are_those_that_the_code_says():
    page = (ROOT / 'docs' / 'troubleshooting.md').read_text().partition('## By what you see')[0]
    rows = re.findall(r'^\| `([^`]+)` \|', page, re.MULTILINE)
    said = literals()
    assert len(rows) > 15
    for sentence in rows:
        pieces = [re.escape(piece.strip()) for piece in sentence.split('…') if piece.strip()]
        assert re.search('.*'.join(pieces), said), sentence


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_and_files_of_the_documentation_exist(page):
    text = page.read_text()
    named = re.findall(r'\]\(([\w./-]+)\)', text)
    named += re.findall(r'`((?:docs|config|models|launch|benchmarks|training)/[\w./-]*)`', text)
    for name in named:
        assert (page.parent / name).exists() or (ROOT / name).exists(), name


def commands(word: str) -> list[str]:
    """
    Return the command lines of all pages that begin with some words, continued lines as one.

    Without their comments.
    """
    text = '\n'.join(page.read_text() for page in PAGES).replace('\\\n', ' ')
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


def test_arguments_of_the_launch_file_that_the_documentation_names_exist():
    assigned = [node for node in ast.parse(LAUNCH).body if isinstance(node, ast.Assign)]
    (table,) = (node.value for node in assigned if node.targets[0].id == 'ARGUMENTS')
    declared = {row.elts[0].value for row in table.elts}
    named = {
        name
        for line in commands('ros2 launch imatching_ros')
        for name in re.findall(r'(\w+):=', line)
    }
    text = '\n'.join(page.read_text() for page in PAGES)
    named |= set(re.findall(r'`(\w+):=[^`]*`', text))
    assert len(declared) >= 14 and named <= declared, named - declared


def test_parameters_that_the_documentation_names_exist():
    declared = {parameter.name for parameter in parameters.TABLE} | {'use_sim_time'}
    text = '\n'.join(page.read_text() for page in PAGES)
    set_ones = set(re.findall(r'ros2 param set /\w+ (\w+)', text)) | set(
        re.findall(r'-p (\w+):=', text)
    )
    tuned = set(re.findall(r'`([a-z_]+)` [\d.]', (ROOT / 'docs' / 'tuning.md').read_text()))
    assert len(tuned) > 6 and set_ones | tuned <= declared, (set_ones | tuned) - declared
