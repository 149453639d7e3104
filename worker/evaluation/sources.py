"""The assets' texts as candidates for tasks: an id, a group that is never split, its kind, and raw text."""

from __future__ import annotations

import email
import email.errors
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from .assets import members
from .prompts import key

CLIP = 400  # characters of a text that a task shows


class Candidate(NamedTuple):
    """``group``: what must not be in both training and test rows (a document, a play, a thread's subject)."""

    id: str
    group: str
    kind: str
    raw: str


def clip(text: str, size: int = CLIP) -> str:
    """``text`` on one line, cut at a word within ``size`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= size else line[:size].rsplit(" ", 1)[0]


def brown(folder: Path) -> Iterator[Candidate]:
    """Passages of the Brown corpus, of 70 words, at most 4 a document; ``kind`` is the genre's letter, a to r."""
    for name, content in members("brown", folder):
        if not re.fullmatch(r"[a-r]\d\d", name):
            continue
        words = [pair.rpartition("/")[0] for pair in content.decode("ascii", "replace").split()]
        for i, start in enumerate(range(0, min(len(words) - 70, 4 * 500), 500)):
            yield Candidate(f"c{name}#{i}", name, name[0], _joined(words[start : start + 70]))


def _joined(words: list[str]) -> str:
    text = " ".join(words).replace("``", '"').replace("''", '"')
    text = re.sub(r"([.,;:?!])( \1)+", r"\1", text)
    return re.sub(r" ([.,;:?!)])", r"\1", text).replace("( ", "(")


def mails(folder: Path) -> Iterator[Candidate]:
    """SpamAssassin's public mails; ``kind`` is easy-ham, hard-ham or spam."""
    for name, content in members("spam", folder):
        if not name.endswith(".json"):
            continue
        try:
            row = json.loads(content)
            kind, text = str(row["group"]).rsplit("-", 1)[0], str(row["text"])
        except (ValueError, KeyError, TypeError):
            continue
        subject = re.search(r"^Subject:(.*)$", text, re.MULTILINE)
        thread = re.sub(r"(?i)\b(re|fwd?):|\W", "", subject[1]) if subject else name
        yield Candidate(name.removesuffix(".json"), thread.lower() or name, kind, text)


def mail_fields(raw: str) -> tuple[tuple[str, str], ...] | None:
    """Subject and the beginning of the text, without markup; None for a mail without either."""
    try:
        message = email.message_from_string(raw.removeprefix("\n"))
        subject = clip(str(message.get("Subject", "")), 120)
        part = next((p for p in message.walk() if p.get_content_maintype() == "text"), None)
        payload = part.get_payload(decode=True) if part else None
    except (email.errors.MessageError, ValueError, LookupError):
        return None
    if not isinstance(payload, bytes):
        return None
    text = re.sub(r"(?is)<(style|script).*?</\1>|<[^>]*>|&\w+;", " ", payload.decode("utf-8", "replace"))
    text = clip(text)
    return (("Subject", subject), ("Text", text)) if subject and len(text) > 40 else None


def chats(folder: Path) -> Iterator[Candidate]:
    """Questions with their first answer, "question\\nanswer"; ``kind`` is the topic."""
    for name, content in members("chatterbot", folder):
        try:
            found = yaml.safe_load(content)["conversations"]
        except (yaml.YAMLError, KeyError, TypeError):
            continue
        topic = name.removesuffix(".yml")
        for i, talk in enumerate(found):
            if isinstance(talk, list) and len(talk) > 1 and all(isinstance(turn, str) for turn in talk[:2]):
                question, answer = clip(talk[0], 200), clip(talk[1], 200)
                if question and answer:
                    yield Candidate(f"{topic}#{i}", question.lower(), topic, f"{question}\n{answer}")


def pairs(folder: Path) -> Iterator[Candidate]:
    """The same, half of them with the answer to another question; ``kind`` is answer or other."""
    rows = sorted(chats(folder), key=lambda row: key("pairs", row.id))
    for i, row in enumerate(rows):
        question, answer = row.raw.split("\n")
        other = rows[(i + 1) % len(rows)].raw.split("\n")[1]
        if i % 2 and other != answer:
            yield row._replace(kind="other", raw=f"{question}\n{other}")
        else:
            yield row._replace(kind="answer")


_PLAYS = {
    "comedy": "alls_well_that_ends_well as_you_like_it comedy_of_errors loves_labours_lost measure_for_measure "
    "merchant_of_venice merry_wives_of_windsor midsummer_nights_dream much_ado_about_nothing taming_of_the_shrew "
    "tempest twelfth_night two_gentlemen_of_verona winters_tale",
    "history": "henry_iv_part_1 henry_iv_part_2 henry_v henry_vi_part_1 henry_vi_part_2 henry_vi_part_3 henry_viii "
    "john richard_ii richard_iii",
    "tragedy": "antony_and_cleopatra coriolanus hamlet julius_caesar lear macbeth othello romeo_and_juliet "
    "timon_of_athens titus_andronicus",
}


def plays(folder: Path) -> Iterator[Candidate]:
    """Passages of Shakespeare's plays in modern spelling; ``kind`` is comedy, history or tragedy, by play."""
    kinds = {play: kind for kind, names in _PLAYS.items() for play in names.split()}
    for name, content in members("shakespeare", folder):
        play = name.removesuffix("_gut.txt")
        if name.endswith("_gut.txt") and play in kinds:
            yield from _passages(play, play, kinds[play], content)


def spellings(folder: Path) -> Iterator[Candidate]:
    """Passages of both editions of the plays; ``kind`` is modern or original. A play's editions stay together."""
    known = {play for names in _PLAYS.values() for play in names.split()}
    for name, content in members("shakespeare", folder):
        play = re.sub(r"_gut(_f)?\.txt$", "", name)
        if play in known:
            kind = "original" if name.endswith("_f.txt") else "modern"
            yield from _passages(f"{play}/{kind}", play, kind, content)


def _passages(name: str, group: str, kind: str, content: bytes) -> Iterator[Candidate]:
    """24 passages from the middle four fifths: title pages and licences stand at the ends."""
    text = content.decode("utf-8", "replace")
    step = len(text) * 4 // 5 // 24
    for i in range(24):
        start = len(text) // 10 + i * step
        yield Candidate(f"{name}#{i}", group, kind, text[start : start + CLIP + 80].partition(" ")[2])
