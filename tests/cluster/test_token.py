"""The token of a cluster is made for its owner alone, and taken from others where Ray has made it."""

from __future__ import annotations

import pytest

from raysweep.cluster.token import ELSEWHERE, keep_token_private


@pytest.fixture
def file(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", *ELSEWHERE):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / ".ray" / "auth_token"


def mode(file) -> int:
    return file.stat().st_mode & 0o777


def test_a_new_token_is_for_its_owner(file):
    keep_token_private()
    assert mode(file) == 0o600
    token = file.read_text()
    assert len(token) == 64
    keep_token_private()
    assert file.read_text() == token


def test_one_that_others_may_read_is_taken_from_them(file):
    file.parent.mkdir()
    file.write_text("secret")
    file.chmod(0o644)
    keep_token_private()
    assert (mode(file), file.read_text()) == (0o600, "secret")


@pytest.mark.parametrize("name", ["RAY_AUTH_MODE", *ELSEWHERE])
def test_who_has_another_one_or_wants_none_gets_none(file, monkeypatch, name):
    monkeypatch.setenv(name, "disabled")
    keep_token_private()
    assert not file.exists()
