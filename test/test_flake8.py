"""The package's files hold to ament_flake8's conventions."""

import pytest


@pytest.mark.flake8
@pytest.mark.linter
def test_flake8(monkeypatch, pytestconfig):
    lint = pytest.importorskip('ament_flake8.main', reason='ament_flake8 is not installed')
    monkeypatch.chdir(pytestconfig.rootpath)
    assert (
        lint.main(argv=['benchmarks', 'imatching_ros', 'launch', 'setup.py', 'test', 'training'])
        == 0
    )
