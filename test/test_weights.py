"""Weights files: what they say, and what is said of bad ones."""

import copy
import json
import os
import struct

from features import encoded
from hypothesis import given, settings
from hypothesis import strategies as st
from imatching_ros.matching import weights
from imatching_ros.matching.families.expectation import (
    ExpectationMatcher,
)
import pytest
import safetensors.torch
import torch


def same_weights(one, two):
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_weights_come_back_as_they_were_written(tmp_path, shipped, day):
    info = weights.save(tmp_path / 'new' / 'w.safetensors', shipped[0], 7, 6)
    assert (info.version, info.parent, info.family) == (7, 6, 'expectation')
    matcher, read = weights.load(tmp_path / 'new' / 'w.safetensors')
    assert read == info and same_weights(matcher, shipped[0])
    assert not matcher.training and all(p.requires_grad for p in matcher.parameters())
    assert info.sha256 == shipped[1].sha256  # of the tensors, whatever the version
    assert [p.name for p in (tmp_path / 'new').iterdir()] == ['w.safetensors']
    data, info = weights.dumps(matcher, 8, 7)
    assert weights.loads(data)[1] == info
    image = day[1][0][1]
    one, two = (encoded(m, image) for m in (matcher, shipped[0]))
    assert torch.equal(one.fine, two.fine)


def test_shipped_weights_say_what_they_are(shipped):
    assert shipped[1].version == 0 and shipped[1].family == 'expectation'
    assert weights.default_path().stat().st_size < 10e6
    # Without a configuration, as all files were once written: the family's defaults build it
    assert weights.dumps(*shipped[:1], 0, 0)[0] == weights.default_path().read_bytes()


def test_weights_say_how_their_family_builds_them():
    training = ExpectationMatcher(batch_norm=True).eval()
    data, info = weights.dumps(training, 1, 0)
    matcher, read = weights.loads(data)
    assert read == info and matcher.configuration == {'batch_norm': True}
    assert same_weights(matcher, training) and not same_weights(matcher, training.folded())
    assert training.folded().configuration == {}


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r'^.*none\.safetensors: there is no such weights file$'
    ):
        weights.load(tmp_path / 'none.safetensors')
    with pytest.raises(FileNotFoundError, match='models/roma.safetensors were not found'):
        weights.default_path('roma')


def rewritten(data, **changes):
    """Return a weights file with other metadata; None takes an entry away."""
    tensors = safetensors.torch.load(data)
    (length,) = struct.unpack('<Q', data[:8])
    metadata = {**json.loads(data[8:8 + length])['__metadata__'], **changes}
    return safetensors.torch.save(
        tensors, {name: value for name, value in metadata.items() if value is not None}
    )


def not_finite(matcher):
    broken = copy.deepcopy(matcher)
    with torch.no_grad():
        broken.log_cov[1] = torch.nan
    return weights.dumps(broken, 1, 0)[0]


def smaller(matcher):
    """Return a network of this family by name only."""
    stranger = torch.nn.Linear(3, 3)
    stranger.family, stranger.configuration = 'expectation', {}
    return weights.dumps(stranger, 1, 0)[0]


def flipped(data):
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]

BAD = {
    'empty': (lambda m, data: b'', 'not a safetensors file, or cut short'),
    'foreign': (
        lambda m, data: b'PK\x03\x04 a pickle of something' * 100,
        'not a safetensors file',
    ),
    'text': (lambda m, data: b'{}', 'not a safetensors file'),
    'truncated': (lambda m, data: data[:-1000], 'cut short'),
    'half a header': (lambda m, data: data[:100], 'cut short'),
    "another project's": (
        lambda m, data: safetensors.torch.save({'a': torch.zeros(3)}),
        "family 'None'",
    ),
    'another family': (
        lambda m, data: rewritten(data, family='roma'),
        "family 'roma', this package knows expectation",
    ),
    'no version': (
        lambda m, data: rewritten(data, version=None),
        'lack version, parent or sha256',
    ),
    'version in words': (
        lambda m, data: rewritten(data, version='two'),
        'lack version, parent or sha256',
    ),
    'no configuration': (
        lambda m, data: rewritten(data, configuration='{'),
        'configuration { is none of the expectation family',
    ),
    "another's configuration": (
        lambda m, data: rewritten(data, configuration='{"layers": 9}'),
        'configuration {"layers": 9} is none of the expectation family',
    ),
    "another network's configuration": (
        lambda m, data: rewritten(data, configuration='{"batch_norm": true}'),
        'do not fit the expectation network',
    ),
    'wrong sha': (lambda m, data: rewritten(data, sha256='0' * 64), 'do not have the sha256'),
    'one bit': (lambda m, data: flipped(data), 'do not have the sha256'),
    'not finite': (lambda m, data: not_finite(m), 'some weights are not finite'),
    'another network': (lambda m, data: smaller(m), 'do not fit the expectation network'),
}


@pytest.mark.parametrize('kind', BAD)
def test_bad_weights_are_one_sentence(tmp_path, shipped, kind):
    make, says = BAD[kind]
    path = tmp_path / 'w.safetensors'
    path.write_bytes(make(shipped[0], weights.dumps(shipped[0], 1, 0)[0]))
    with pytest.raises(ValueError, match=says) as error:
        weights.load(path)
    assert str(error.value).startswith(f'{path}: ') and '\n' not in str(error.value)


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_whatever_is_damaged_the_weights_are_whole_or_refused(shipped, data):
    whole, _ = weights.dumps(shipped[0], 1, 0)
    kind = data.draw(st.sampled_from(['cut', 'flip', 'grow']))
    at = data.draw(st.one_of(st.integers(0, 3000), st.integers(0, len(whole) - 1)))
    if kind == 'cut':
        damaged = whole[:at]
    elif kind == 'flip':
        damaged = (
            whole[:at] + bytes([whole[at] ^ (1 << data.draw(st.integers(0, 7)))]) + whole[at + 1:]
        )
    else:
        damaged = whole + b'\0'
    try:
        matcher, _ = weights.loads(damaged)
    except ValueError as error:
        assert '\n' not in str(error)
    else:  # a flip within the header's blanks, or in the version's digits
        assert same_weights(matcher, shipped[0])


def test_a_write_that_is_broken_off_leaves_the_old_file(tmp_path, shipped, monkeypatch):
    path = tmp_path / 'w.safetensors'
    weights.save(path, shipped[0], 1, 0)
    before = path.read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    for step in ('fsync', 'replace'):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, killed)
            with pytest.raises(KeyboardInterrupt):
                weights.save(path, shipped[0], 2, 1)
        assert path.read_bytes() == before and weights.load(path)[1].version == 1
        assert list(tmp_path.iterdir()) == [path]
