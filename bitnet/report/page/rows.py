"""One row a record: the figures of the page's charts and table, under a name of its own."""

import dataclasses
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet.report.page.collect import PLACES, Run
from bitnet.report.record import RunRecord
from bitnet.report.tables import gap_of, is_full_precision

FULL = "full precision"  # a family, too
DENSE, PTQ, QAT = "dense", "PTQ", "QAT"
NONE = "null"
WORDS = 4  # settings in a name; what they do not tell apart gets a number
IGNORED = (*PLACES, "method", "export", "logger", "callbacks", "evaluation", "calibration")
# Methods that keep their colour from one report to the next; the others get those that are left over.
PREFERRED = {"GPTQ": 0, "bitnet158": 1, "KQuant": 2, "BiLLM": 3, "HQQ": 4, "RoundToNearest": 5}
COLOURS = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What the page says of one record. Losses in nats a token; None is what was not measured."""

    id: int
    label: str
    kind: str
    family: str
    look: int  # colours and shapes go by it
    model: str
    data: str
    bits: float
    claimed: float | None
    perplexity: float | None
    nll: float | None
    interval: Sequence[float] | None  # of the loss
    gap: float | None
    gap_interval: Sequence[float] | None
    bytes: int
    kl: float | None
    top1: float | None
    bits_per_byte: float | None
    share: float | None
    quantize_seconds: float | None
    train_tokens: int
    steps: int
    seed: int
    git: str
    started: str
    seconds: float
    command: str
    folder: str

    def plain(self) -> dict[str, Any]:
        """For json."""
        return dataclasses.asdict(self)


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """Return a row for each run, in their order; gaps are to the full-precision models among ``runs``."""
    names = labels([run.record for run in runs])
    families = [family_of(run.record) for run in runs]
    looks = _looks(families)
    full = {tokens: _originals(runs, tokens) for tokens in {run.record.train_tokens for run in runs}}
    twins = {run.path: run.record for run in runs if is_full_precision(run.record)}
    return [
        _row(
            index,
            run,
            names[index],
            families[index],
            looks[families[index]],
            _own_twin(run, twins) + full[run.record.train_tokens],
        )
        for index, run in enumerate(runs)
    ]


def _originals(runs: Sequence[Run], tokens: int) -> list[RunRecord]:
    """The full-precision records, first those that a model trained on ``tokens`` has its gap to.

    These are the ones that measured gaps are to, so that all gaps of a page are to one model; then originals, which
    were not trained here; then what saw as many tokens. Of several the best: a learning rate that suits full precision
    badly flatters nobody.
    """
    measured = [run.record for run in runs if run.record.gap is not None and run.record.nll is not None]
    losses = {round(record.nll - record.gap, 9) for record in measured if record.nll and record.gap is not None}

    def order(record: RunRecord) -> tuple[bool, bool, bool, float]:
        if record.nll is None:
            return (True, True, True, math.inf)
        seen = record.train_tokens
        return (round(record.nll, 9) not in losses, seen != 0, seen != tokens, record.nll)

    return sorted((run.record for run in runs if is_full_precision(run.record)), key=order)


def _own_twin(run: Run, twins: Mapping[Path, RunRecord]) -> list[RunRecord]:
    twin = None if run.folder is None else twins.get(run.folder / "dense" / run.path.name)
    return [] if twin is None else [twin]


def kind_of(record: RunRecord) -> str:
    """Whether nothing is quantized ("dense"), or it was after the training ("PTQ") or in it ("QAT")."""
    if is_full_precision(record):
        return DENSE
    return PTQ if record.config.get("ptq") else QAT


def family_of(record: RunRecord) -> str:
    """The class of the post-training method, or the first word of the label: "bitnet158" of "bitnet158 frozen"."""
    if is_full_precision(record):
        return FULL
    ptq = record.config.get("ptq")
    if isinstance(ptq, dict) and "_target_" in ptq:
        return str(ptq["_target_"]).rpartition(".")[2]
    return re.split(r"[\s,:;]", record.method)[0]


def labels(records: Sequence[RunRecord]) -> list[str]:
    """A name for each record that no other one has: its method and, where that is not enough, what sets it apart."""
    bases = [record.method.removesuffix(" frozen") for record in records]
    alike: dict[str, list[int]] = defaultdict(list)
    for index, base in enumerate(bases):
        alike[base].append(index)
    names = list(bases)
    for base, members in alike.items():
        if len(members) > 1:
            for index, words in zip(members, _words([records[each] for each in members]), strict=True):
                names[index] = " ".join([base, *words])
    return _numbered(names)


def _numbered(names: Sequence[str]) -> list[str]:
    counts, used = Counter(names), Counter[str]()
    taken = set(names)
    result: list[str] = []
    for name in names:
        own = name
        while counts[name] > 1 and (own == name or own in taken):
            used[name] += 1
            own = f"{name} #{used[name]}"
        taken.add(own)
        result.append(own)
    return result


def _words(records: Sequence[RunRecord]) -> list[list[str]]:
    """Of each record the settings that set it apart from the others: as few as do, `WORDS` at most."""
    configs = [dict(_flat(_settings(record))) for record in records]
    telling: dict[tuple[str, ...], str] = {}  # values over all records -> the shortest key that has them
    for key in dict.fromkeys(key for config in configs for key in config):
        values = tuple(_short(config.get(key)) for config in configs)
        if len(set(values)) > 1 and (values not in telling or len(key) < len(telling[values])):
            telling[values] = key
    rest = sorted(telling.items(), key=lambda each: (each[1].count("."), len(each[1])))
    chosen: list[tuple[tuple[str, ...], str]] = []
    names: list[tuple[str, ...]] = [()] * len(records)
    while rest and len(chosen) < WORDS and len(set(names)) < len(names):
        best = max(rest, key=lambda each: len(set(zip(names, each[0], strict=True))))  # the first of the equally good
        if len(set(zip(names, best[0], strict=True))) == len(set(names)):
            break
        names = [(*name, value) for name, value in zip(names, best[0], strict=True)]
        rest.remove(best)
        chosen.append(best)
    return [
        [f"{key.rpartition('.')[2]}={values[index]}" for values, key in chosen if values[index] != NONE]
        for index in range(len(records))
    ]


def _settings(record: RunRecord) -> dict[str, Any]:
    chosen = {key: value for key, value in record.config.items() if key not in IGNORED}
    return {**chosen, "model": {"model": record.model, **_mapping(chosen.get("model"))}}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, each in value.items():
            if key == "_target_":  # said as distill=Distillation
                yield path, str(each).rpartition(".")[2]
            else:
                yield from _flat(each, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _short(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text.rstrip("/").rpartition("/")[2] or text


def _looks(families: Sequence[str]) -> dict[str, int]:
    """A number for each family that decides its colour (modulo `COLOURS`) and shape."""
    present = [family for family in dict.fromkeys(families) if family != FULL]  # which has a colour of its own
    looks = {family: PREFERRED[family] for family in present if family in PREFERRED}
    free = (number for number in range(len(present) + COLOURS) if number not in looks.values())
    return {FULL: 0} | looks | {family: next(free) for family in present if family not in looks}


def _row(index: int, run: Run, label: str, family: str, look: int, full: Sequence[RunRecord]) -> Row:
    record = run.record
    sha = "" if record.git_sha is None else record.git_sha[:10] + ("+" if record.git_dirty else "")
    return Row(
        id=index,
        label=label,
        kind=kind_of(record),
        family=family,
        look=look,
        model=record.model,
        data=str(record.data.get("name", "")),
        bits=round(record.bits_per_weight, 4),
        claimed=record.claimed_bits,
        perplexity=record.perplexity if record.perplexity is not None else _exp(record.nll),
        nll=record.nll,
        interval=record.nll_interval,
        gap=gap_of(record, full),
        gap_interval=record.gap_interval,
        bytes=record.bytes,
        kl=record.kl,
        top1=record.top1_agreement,
        bits_per_byte=record.bits_per_byte,
        share=record.quantized_share,
        quantize_seconds=record.quantize_seconds,
        train_tokens=record.train_tokens,
        steps=record.steps,
        seed=record.seed,
        git=sha,
        started=record.started,
        seconds=round(record.seconds, 1),
        command=run.command,
        folder=str(run.path.parent),
    )


def _exp(nll: float | None) -> float | None:
    return None if nll is None or nll > 700 else math.exp(nll)
