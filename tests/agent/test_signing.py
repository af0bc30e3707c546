"""Signatures of agents: what was signed, as what, with which key."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_agent.errors import SnapshotForged
from cache_agent.wire.signing import sign, verified

KEY = bytes(range(32))


@given(st.binary(max_size=200), st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_what_was_signed_comes_back(data, about):
    assert verified(KEY, about, sign(KEY, about, data)) == data


def test_the_format_stays():
    tag = "a59c5dcf7c77fc77c40e3e6732ac70ea3e004c25246b96e6f71f2efb6bc200b5"  # from Python's hmac, fed by hand
    assert sign(KEY, "piece 0 of chat/a", b"data").hex() == "475301" + tag + b"data".hex()


def test_every_changed_or_missing_byte_is_noticed():
    signed = sign(KEY, "it", b"some data")
    for at in range(len(signed)):
        changed = bytearray(signed)
        changed[at] ^= 1
        with pytest.raises(SnapshotForged):
            verified(KEY, "it", bytes(changed))
        with pytest.raises(SnapshotForged):
            verified(KEY, "it", signed[:at])


def test_another_key_another_thing_and_none():
    signed = sign(KEY, "piece 0 of chat/a", b"data")
    with pytest.raises(SnapshotForged, match="another cluster key"):
        verified(b"k" * 32, "piece 0 of chat/a", signed)
    with pytest.raises(SnapshotForged, match="belongs elsewhere"):
        verified(KEY, "piece 1 of chat/a", signed)
    with pytest.raises(SnapshotForged, match="is not signed"):
        verified(KEY, "piece 0 of chat/a", b"data" * 20)
    # The border between name and data is signed, too.
    with pytest.raises(SnapshotForged):
        verified(KEY, "ab", sign(KEY, "a", b"bc"))
