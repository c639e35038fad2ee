"""The package's files hold to ament_pep257's conventions."""

import pytest


@pytest.mark.pep257
@pytest.mark.linter
def test_pep257(monkeypatch, pytestconfig):
    lint = pytest.importorskip('ament_pep257.main', reason='ament_pep257 is not installed')
    monkeypatch.chdir(pytestconfig.rootpath)
    assert (
        lint.main(argv=['benchmarks', 'imatching_ros', 'launch', 'setup.py', 'test', 'training'])
        == 0
    )
