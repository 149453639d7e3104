"""RAFT (Alex et al., 2021): eleven real classification tasks with 50 labelled rows each.

The test labels are not public, so only the 50 labelled rows can be scored here, as HELM does: ``train_test_split``
of ``datasets`` with seed 42. Its first version kept 40 rows as examples and scored 10 (110 in all), its published
one keeps 10 and scores 40 (440 in all): this is the latter. With either, a task's score has an interval of 10 to 30
points: never rank models without it, and never compare with the leaderboard, which scores the hidden rows.

A local folder may hold other rows: ``raft/TASK/train.csv`` alone is split the same way; with a labelled ``test.csv``
beside it, that one is scored.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...protocol.errors import ConfigError, StateError, UnreachableError
from .prompts import Row, Task

DATASET, REVISION = "ought/raft", "refs/convert/parquet"
SPLIT_SEED, TEST_SHARE = 42, 0.8
_MOST_BYTES = 1 << 26


class Definition(NamedTuple):
    """``fields`` in the order HELM shows them; ``labels`` exactly as the dataset writes them."""

    instructions: str
    fields: tuple[str, ...]
    labels: tuple[str, ...]


_BANKING = (
    "Refund_not_showing_up activate_my_card age_limit apple_pay_or_google_pay atm_support automatic_top_up "
    "balance_not_updated_after_bank_transfer balance_not_updated_after_cheque_or_cash_deposit beneficiary_not_allowed "
    "cancel_transfer card_about_to_expire card_acceptance card_arrival card_delivery_estimate card_linking "
    "card_not_working card_payment_fee_charged card_payment_not_recognised card_payment_wrong_exchange_rate "
    "card_swallowed cash_withdrawal_charge cash_withdrawal_not_recognised change_pin compromised_card "
    "contactless_not_working country_support declined_card_payment declined_cash_withdrawal declined_transfer "
    "direct_debit_payment_not_recognised disposable_card_limits edit_personal_details exchange_charge exchange_rate "
    "exchange_via_app extra_charge_on_statement failed_transfer fiat_currency_support get_disposable_virtual_card "
    "get_physical_card getting_spare_card getting_virtual_card lost_or_stolen_card lost_or_stolen_phone "
    "order_physical_card passcode_forgotten pending_card_payment pending_cash_withdrawal pending_top_up "
    "pending_transfer pin_blocked receiving_money request_refund reverted_card_payment? "
    "supported_cards_and_currencies terminate_account top_up_by_bank_transfer_charge top_up_by_card_charge "
    "top_up_by_cash_or_cheque top_up_failed top_up_limits top_up_reverted topping_up_by_card "
    "transaction_charged_twice transfer_fee_charged transfer_into_account transfer_not_received_by_recipient "
    "transfer_timing unable_to_verify_identity verify_my_identity verify_source_of_funds verify_top_up "
    "virtual_card_not_working visa_or_mastercard why_verify_identity wrong_amount_of_cash_received "
    "wrong_exchange_rate_for_cash_withdrawal"
)

# The instructions say what HELM's say, in our words; fields and labels are the dataset's.
TASKS: dict[str, Definition] = {
    "ade_corpus_v2": Definition(
        "Decide whether the sentence is about an adverse drug effect (ADE): a sign, symptom, disease, disorder, "
        "deficiency, organ damage or death that came from taking a drug as a treatment.",
        ("Sentence",),
        ("ADE-related", "not ADE-related"),
    ),
    "banking_77": Definition(
        "A customer asks a bank's service the following. Decide which of the 77 categories the question belongs to.",
        ("Query",),
        tuple(_BANKING.split()),
    ),
    "neurips_impact_statement_risks": Definition(
        "Decide whether the paper's impact statement names a harmful use of its own research. Risks of the past that "
        "the research is meant to solve do not count.",
        ("Impact statement", "Paper title"),
        ("doesn't mention a harmful application", "mentions a harmful application"),
    ),
    "one_stop_english": Definition(
        "Teachers rewrote an article of The Guardian for adults who learn English, at three levels of difficulty. "
        "Decide which level this is.",
        ("Article",),
        ("advanced", "elementary", "intermediate"),
    ),
    "overruling": Definition(
        "In law, a sentence is overruling if it takes away an earlier decision's force as a precedent, by a statute or "
        "by the same or a higher court that sets another rule on the point. Decide whether the sentence is overruling.",
        ("Sentence",),
        ("not overruling", "overruling"),
    ),
    "semiconductor_org_types": Definition(
        "The organization has contributed a paper to a semiconductor conference. Decide whether it is a company, a "
        "research institute or a university.",
        ("Organization name", "Paper title"),
        ("company", "research institute", "university"),
    ),
    "systematic_review_inclusion": Definition(
        "A meta-review collects systematic reviews of ways to promote donations of money to charity, about any people "
        "in any setting, peer-reviewed and in English. New data, reviews that are not systematic, cause-related "
        "marketing and other kinds of helping are out. Decide whether the paper is included.",
        ("Title", "Abstract", "Journal"),
        ("included", "not included"),
    ),
    "tai_safety_research": Definition(
        "Transformative AI (TAI) would change the world at least as much as the agricultural or the industrial "
        "revolution. A paper is TAI safety research if it is motivated by and informs how TAI can go well, has real "
        "content on safety and not only on capabilities, is written for researchers and is of serious quality; it "
        "need not be peer-reviewed. Decide whether the paper is TAI safety research.",
        ("Title", "Abstract Note", "Publication Title", "Item Type", "Publication Year"),
        ("TAI safety research", "not TAI safety research"),
    ),
    "terms_of_service": Definition(
        "Decide whether the sentence from terms of service is potentially unfair to the consumer under directive "
        "93/13/EEC: not negotiated, and a significant imbalance against the consumer contrary to good faith. "
        "Potentially unfair are: courts or a law other than those of the consumer's home; broad limits of liability; "
        "changing the terms or ending the service one-sidedly; being bound by mere use; removing the user's "
        "content; arbitration that is not optional. Clearly unfair sentences count as potentially unfair.",
        ("Sentence",),
        ("not potentially unfair", "potentially unfair"),
    ),
    "tweet_eval_hate": Definition(
        "Decide whether the tweet is hate speech against immigrants or women: it disparages a person or group for "
        "a trait such as race, colour, ethnicity, gender, sexual orientation, nationality or religion.",
        ("Tweet",),
        ("hate speech", "not hate speech"),
    ),
    "twitter_complaints": Definition(
        "A complaint says that something falls short of what its writer expected. Decide whether the tweet is one.",
        ("Tweet text",),
        ("complaint", "no complaint"),
    ),
}


def build(folder: Path | None) -> tuple[list[Task], dict[str, str]]:
    """The tasks from ``folder``/raft, or from the network if it is None; and why others are left out, by name."""
    found, skipped = [], {}
    for name, definition in TASKS.items():
        if folder is None:
            found.append(_split(name, definition, _download(name)))
            continue
        here = folder / "raft" / name
        train = _file(here, "train")
        if train is None:
            skipped[name] = f"{here / 'train.csv'} (or .jsonl) is missing"
            continue
        test = _file(here, "test")
        rows = _rows(name, definition, _read(train), str(train), "train")
        scored = _rows(name, definition, _read(test), str(test), "test") if test else ()
        found.append(_task(name, definition, rows, scored) if scored else _split(name, definition, rows))
    if not found:
        raise StateError(
            f"{folder} holds no task of RAFT", hint="Put them at raft/TASK/train.csv there, or leave --data out."
        )
    return found, skipped


def _task(name: str, definition: Definition, train: Sequence[Row], test: Sequence[Row]) -> Task:
    return Task(name, definition.instructions, definition.labels, tuple(train), tuple(test))


def _split(name: str, definition: Definition, rows: Sequence[Row]) -> Task:
    """HELM's split: the order that ``datasets`` draws with seed 42, test rows first."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(rows))
    tests = int(np.ceil(len(rows) * TEST_SHARE))
    return _task(name, definition, [rows[i] for i in order[tests:]], [rows[i] for i in order[:tests]])


def _download(name: str) -> tuple[Row, ...]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ConfigError(
            "datasets is not installed", hint="pip install -e '.[eval]', in potluck's checkout"
        ) from error
    try:
        rows = datasets.load_dataset(DATASET, name, revision=REVISION, split="train")
    except Exception as error:  # its errors have no common class
        raise UnreachableError(
            f"{DATASET} ({name}) cannot be had: {type(error).__name__}",
            hint="Connect to the network, or name a folder with --data that holds raft/TASK/train.csv.",
        ) from error
    names = getattr(rows.features.get("Label"), "names", None)
    plain = [{**row, "Label": names[row["Label"]] if names else row["Label"]} for row in rows]
    return _rows(name, TASKS[name], plain, DATASET, "train")


def _rows(
    name: str, definition: Definition, found: Sequence[Mapping[str, Any]], where: str, part: str
) -> tuple[Row, ...]:
    """``found`` as rows. Raises StateError for a row that lacks a field or has a label that is none of the task's."""
    number = {label: i for i, label in enumerate(definition.labels)}
    rows = []
    for i, row in enumerate(found):
        lacking = [field for field in (*definition.fields, "Label") if row.get(field) is None]
        if lacking:
            raise StateError(f"{where}, row {i}: no {lacking[0]!r}", hint="Take RAFT's own files.")
        if str(row["Label"]) not in number:
            raise StateError(
                f"{where}, row {i}: label {str(row['Label'])[:60]!r} is not one of {name}'s",
                hint="Labels are names as in the dataset; a test file without labels cannot be scored.",
            )
        fields = tuple((field, " ".join(str(row[field]).split())) for field in definition.fields)
        rows.append(Row(f"{part}/{row.get('ID', i)}", fields, number[str(row["Label"])]))
    if len({row.id for row in rows}) != len(rows):
        raise StateError(f"{where}: two rows have one ID", hint="Take RAFT's own files.")
    return tuple(rows)


def _file(folder: Path, part: str) -> Path | None:
    return next((p for end in ("csv", "jsonl") if (p := folder / f"{part}.{end}").is_file()), None)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise StateError(f"{path} is too large", hint="Take RAFT's own files.")
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            return list(csv.DictReader(text.splitlines(keepends=True)))
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise StateError(f"{path} cannot be read: {error}", hint="Take RAFT's own files.") from error
    if not all(isinstance(row, dict) for row in rows):
        raise StateError(f"{path}: a line is no JSON object", hint="Take RAFT's own files.")
    return rows
