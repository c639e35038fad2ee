"""The package's files hold to their schemata."""

import shutil

import pytest


@pytest.mark.xmllint
@pytest.mark.linter
def test_xmllint(monkeypatch, pytestconfig):
    lint = pytest.importorskip('ament_xmllint.main', reason='ament_xmllint is not installed')
    if not shutil.which('xmllint'):
        pytest.skip('the program xmllint is not installed')
    monkeypatch.chdir(pytestconfig.rootpath)
    assert lint.main(argv=['package.xml']) == 0
