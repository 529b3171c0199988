"""Which runs may stand on one axis: those that predicted the same tokens, each from the same ones before it."""

from collections.abc import Sequence
from typing import Any

from bitnet.errors import InputError
from bitnet.report.page.collect import Run
from bitnet.report.record import RunRecord
from bitnet.report.tables import PACKED, SAME_BLOCKS, SAME_TEXT, same_tokens

SAID = {"name": "data", "corpus_hash": "corpus", "tokenizer_hash": "tokenizer", "text": "protocol"}
SHOWN = 4  # kinds of runs that a refusal lists


def groups_of(runs: Sequence[Run]) -> list[list[Run]]:
    """Put runs together that `same_tokens` holds for, in the order of the first of each."""
    groups: list[list[Run]] = []
    for run in runs:
        group = next((group for group in groups if same_tokens(group[0].record, run.record)), None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    return groups


def refuse_several(groups: Sequence[Sequence[Run]]) -> None:
    """Raise InputError where there is more than one group, with what sets each apart from the first."""
    if len(groups) < 2:
        return
    first = groups[0]
    kinds = [f"{_count(first)} like {first[0].path}"]
    kinds += [
        f"{_count(group)} like {group[0].path} ({'; '.join(differences(first[0].record, group[0].record))})"
        for group in groups[1:SHOWN]
    ]
    more = f" | and {len(groups) - SHOWN} more kinds" if len(groups) > SHOWN else ""
    raise InputError(
        "expected runs that were evaluated on the same tokens: losses of different ones cannot share an axis. Got "
        f"{' | '.join(kinds)}{more}. Name runs of one kind, or add --apart for a part of the page for each"
    )


def differences(one: RunRecord, other: RunRecord) -> list[str]:
    """In words, what of the evaluation differs: "tokenizer deb38fb7 against 19fd2ded", "window 256 against 512"."""
    ones, others = _protocol(one), _protocol(other)
    keys = [key for key in dict.fromkeys([*ones, *others]) if ones.get(key) != others.get(key)]
    return [f"{SAID.get(key, key)} {_short(ones.get(key))} against {_short(others.get(key))}" for key in keys]


def protocol_of(record: RunRecord) -> str:
    """In words, how a record was evaluated."""
    return ", ".join(f"{SAID.get(key, key)} {_short(value)}" for key, value in _protocol(record).items() if value)


def _protocol(record: RunRecord) -> dict[str, Any]:
    evaluation = record.evaluation or PACKED
    keys = SAME_TEXT + SAME_BLOCKS if evaluation.get("text") == PACKED["text"] else SAME_TEXT
    return {key: record.data.get(key) for key in keys} | evaluation


def _count(group: Sequence[Run]) -> str:
    return "1 record" if len(group) == 1 else f"{len(group)} records"


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text[:8] if len(text) >= 40 and text.isalnum() else text
