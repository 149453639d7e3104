"""Tickets: whole, damaged, expired, or something else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck.protocol.errors import TicketError
from potluck.protocol.ticket import PREFIX, Ticket

pytestmark = pytest.mark.timeout(30)

TICKET = Ticket(url="potluck.example:7000", fingerprint="0f" * 32, run="gptjt-1", secret="s3cret", expires=2000)
TEXT = TICKET.encode()


def code_of(text: str, now: float = 1000) -> str:
    with pytest.raises(TicketError) as caught:
        Ticket.decode(text, now)
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    return caught.value.code


def test_a_ticket_comes_back() -> None:
    assert TEXT.startswith("potluck1-")
    assert len(TEXT) < 200
    assert Ticket.decode(TEXT, 1999) == TICKET
    assert Ticket.decode(f"  {TEXT[:50]}\n{TEXT[50:]}\r\n", 0) == TICKET


def test_each_way_to_be_wrong_is_told_apart() -> None:
    assert code_of("hello") == "not-a-ticket"
    assert code_of("") == "not-a-ticket"
    assert code_of(TEXT, 2000) == "expired"
    assert code_of(PREFIX) == "damaged"
    assert code_of(TEXT + "A" * 5000) == "damaged"


@pytest.mark.parametrize("cut", range(1, len(TEXT) - len(PREFIX), 7))
def test_a_truncated_ticket_is_damaged(cut: int) -> None:
    assert code_of(TEXT[:-cut]) == "damaged"


@settings(max_examples=1000, deadline=None)
@given(st.integers(len(PREFIX), len(TEXT) - 2), st.characters(exclude_categories=["Z", "C"]))
def test_one_wrong_character_is_damaged(position: int, character: str) -> None:
    if character != TEXT[position]:
        assert code_of(TEXT[:position] + character + TEXT[position + 1 :]) == "damaged"


@settings(max_examples=2000, deadline=None)
@given(st.one_of(st.text(), st.text("ABCabc019-_=+/").map(PREFIX.__add__)))
def test_any_text_gives_a_ticket_error(text: str) -> None:
    assert code_of(text) in {"not-a-ticket", "damaged"}


@pytest.mark.parametrize("url", ["nowhere", "two words:1", "host:123456", ":1"])
def test_a_ticket_to_nowhere_is_damaged(url: str) -> None:
    bad = Ticket(url=url, fingerprint="0f" * 32, run="r", secret="s", expires=2000)
    assert code_of(bad.encode()) == "damaged"
