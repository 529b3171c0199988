"""The model card (README.md) of an exported folder: what it holds, how to load it, what was measured, where it is from.

Figures come from the run's record and are printed only where it has them.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

CHARACTERS = 400  # of a command line that are printed; a sweep's can be a page


def model_card(
    contents: str,
    *,
    code: Sequence[str],
    notes: Sequence[str] = (),
    tags: Sequence[str] = (),
    library: str | None = "transformers",
    record: Mapping[str, Any] | None = None,
) -> str:
    """Markdown with a YAML header that the Hugging Face hub reads.

    Args:
        contents: what the folder holds, a phrase.
        code: lines of Python that load it.
        notes: what a user has to know before using it, a sentence each.
        tags: of the hub, beside "bitnet".
        library: what loads the folder, as the hub calls it; None where the hub does not know it.
        record: the run that made the model (`bitnet.report.RunRecord` as a dict).
    """
    record = record or {}
    parts = [
        _header(["bitnet", *tags], library),
        f"# {_title(record)}",
        f"Contents: {contents}.",
        "## Loading",
        "```python\n" + "\n".join(code) + "\n```",
    ]
    if notes:
        parts += ["## Limitations", "\n".join(f"- {note}" for note in notes)]
    if rows := _figures(record):
        parts += ["## Measured", _table(rows), *_protocol(record)]
    if rows := _provenance(record):
        parts += ["## Provenance", "\n".join(f"- {name}: {value}" for name, value in rows)]
    return "\n\n".join(parts) + "\n"


def loading_code(prelude: Sequence[str] = ()) -> list[str]:
    """Python that loads a folder with transformers."""
    return [
        *prelude,
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this folder")',
        'tokenizer = AutoTokenizer.from_pretrained("this folder")',
    ]


def _header(tags: list[str], library: str | None) -> str:
    named = [] if library is None else [f"library_name: {library}"]
    return "\n".join(["---", *named, "pipeline_tag: text-generation", f"tags: [{', '.join(tags)}]", "---"])


def _title(record: Mapping[str, Any]) -> str:
    model, method = record.get("model"), record.get("method")
    return " ".join(_line(part) for part in (model, f"({method})" if method else None) if part) or "Language model"


def _figures(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of what was measured."""
    rows = list[tuple[str, str]]()

    def add(name: str, key: str, form: str) -> None:
        if isinstance(value := record.get(key), int | float):
            rows.append((name, format(value, form) + _interval(record.get(f"{key}_interval"))))

    add("loss, nats a token", "nll", ".4f")
    add("perplexity", "perplexity", ".3f")
    add("bits a byte of text", "bits_per_byte", ".4f")
    add("gap to full precision, nats a token", "gap", ".4f")
    add("KL from full precision, nats a token", "kl", ".5f")
    add("same likeliest token as full precision", "top1_agreement", ".1%")
    add("stored bits a weight of the quantized linears", "bits_per_weight", ".3f")
    add("bytes of the model in its own packing", "bytes", ",")
    for name, value in sorted((record.get("tasks") or {}).items()):
        if isinstance(value, int | float):
            rows.append((_line(name), format(value, ".4f")))
    return rows


def _interval(bounds: Any) -> str:
    if not isinstance(bounds, Sequence) or len(bounds) != 2:
        return ""
    low, high = bounds
    return f" (95 %: {low:.4f} to {high:.4f})"


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| measure | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _protocol(record: Mapping[str, Any]) -> list[str]:
    """How the figures were measured, where the record says; they are those of the model before it was written."""
    said = record.get("evaluation") or {}
    plain = [f"{key} {value}" for key, value in said.items() if isinstance(value, str | int | float)]
    where = f" on {', '.join(map(_line, plain))}" if plain else ""
    return [f"Measured with this package{where}."]


def _provenance(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = list[tuple[str, str]]()
    if command := record.get("command"):
        command = _line(command)
        shown = command if len(command) <= CHARACTERS else command[:CHARACTERS] + " ..."
        rows.append(("command", f"`{shown.replace('`', '')}`"))
    if sha := record.get("git_sha"):
        rows.append(("commit", f"{_line(sha)}{' with changes' if record.get('git_dirty') else ''}"))
    if data := record.get("data"):
        rows.append(("data", f"`{_line(json.dumps(data, ensure_ascii=False))}`"))
    rows += [(name, f"{record[key]:,}") for name, key in TRAINING if isinstance(record.get(key), int) and record[key]]
    if isinstance(seed := record.get("seed"), int):
        rows.append(("seed", str(seed)))
    if versions := record.get("versions"):
        rows.append(("versions", ", ".join(f"{_line(name)} {_line(number)}" for name, number in versions.items())))
    if started := record.get("started"):
        rows.append(("started", _line(started)))
    return rows


TRAINING = (("tokens trained on", "train_tokens"), ("steps", "steps"))


def _line(value: Any) -> str:
    """On one line, so that no value can start a heading, a table or a header of its own."""
    return " ".join(str(value).split()).replace("|", "/")
