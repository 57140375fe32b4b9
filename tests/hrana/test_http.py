"""The tables of Hrana over HTTP: every error of the tree has a status and a body a client can read."""

from __future__ import annotations

import json

import pytest

from walship import errors
from walship.hrana import http
from walship.hrana.baton import stream_expired


def _every_error() -> list[errors.WalshipError]:
    made: list[errors.WalshipError] = []
    for name in errors.__all__:
        kind: type[errors.WalshipError] = getattr(errors, name)
        if kind is errors.DatabaseRefused:
            made.append(errors.DatabaseRefused("/a", "b", "c"))
        elif kind is errors.NotLeader:
            made.append(errors.NotLeader("n1", "http://n1", 3))
        elif kind is errors.AuthFailed:
            made.append(errors.AuthFailed(403, "AUTH_READ_ONLY", "what happened"))
        elif kind in (errors.Refused, errors.StatementFailed):
            made.append(kind("one", "two"))
        else:
            made.append(kind("what happened"))
    return made


@pytest.mark.parametrize("error", _every_error(), ids=lambda error: type(error).__name__)
def test_every_error_becomes_a_failure_a_client_understands(error: errors.WalshipError) -> None:
    """hrana.md 1.4, 1.5: protocol errors are text; the others carry message, code and sqld's `error`."""
    failure = http.failure(error)
    assert 400 <= failure.status < 600
    if isinstance(error, errors.ProtocolViolation):
        assert failure.content_type == "text/plain"
        assert failure.body.decode() == str(error)
        return
    body = json.loads(failure.body)
    assert body["message"] == body["error"] == str(error)
    assert body["code"]


def test_a_write_on_a_follower_names_the_leader() -> None:
    """R23."""
    body = json.loads(http.failure(errors.NotLeader("n1", "http://n1:8080", 3)).body)
    assert (body["leader"], body["url"], body["term"]) == ("n1", "http://n1:8080", 3)


def test_a_message_with_lone_surrogates_can_still_be_sent() -> None:
    assert json.loads(http.failure(errors.UsageError("bad \ud800")).body)["message"] == "bad ?"


def test_an_expired_stream_says_so_as_sqld_does() -> None:
    failure = http.failure(stream_expired())
    assert failure.status == 400
    assert json.loads(failure.body)["code"] == "STREAM_EXPIRED"
