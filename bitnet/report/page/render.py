"""One self-contained HTML file of the runs below some folders: ``python -m bitnet.report RUNS -o report/``.

Charts are drawn by Vega-Lite, inlined from the package vl-convert-python (0.9 MB). Two defences keep what comes from a
run from being executed: text enters the page escaped or as json, and the page's own policy runs no script but the two
whose hashes it names. The same policy forbids it every connection.
"""

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from bitnet.errors import InputError
from bitnet.files import atomic_file
from bitnet.report.loggers import require
from bitnet.report.page.attachments import attachments
from bitnet.report.page.collect import Collected, Run, collect
from bitnet.report.page.groups import differences, groups_of, protocol_of, refuse_several
from bitnet.report.page.headline import Figure, Headline, figures, headline
from bitnet.report.page.published import PUBLISHED
from bitnet.report.page.rows import DENSE, PTQ, QAT, Row, rows_of

PAGE = "index.html"  # in the folder that -o names
SCRIPTS = ("charts.js", "details.js", "table.js", "page.js")
# A section without data says what would give it some.
MISSING = {
    "curves": "Training curves: no run here logged a training (fit=true does).",
    "layers": "Errors by layer: no run here has a layers.csv (ptq= writes one).",
    "codes": "Codes: no run here was exported in its codes (export=packed).",
    "samples": "Samples: no run here wrote a samples.md (callbacks.samples, on by default in training).",
    "intervals": "Intervals: no gap here has one (evaluation=text with evaluation.compare=true measures it).",
}


def write_page(
    places: Iterable[str | Path],
    output: str | Path,
    *,
    title: str | None = None,
    apart: bool = False,
    codes: bool = True,
) -> tuple[Path, list[str]]:
    """Write the page and return its path and the notes on what was left out; the file is whole or absent.

    Args:
        places: folders of runs, folders of sweeps, or single record files.
        output: a folder, in which the page is ``index.html``, or a name that ends in .html. A page there is replaced.
        title: of the page.
        apart: give runs of different tokens a part of the page each, rather than refuse them.
        codes: count the codes of packed exports, which reads the models.

    Raises:
        InputError: no record, records that cannot share an axis, vl-convert-python not installed, or an ``output``
            that cannot be written.
    """
    require("vl_convert", extra="report")
    output = Path(output)
    target = output if output.suffix == ".html" else output / PAGE
    if output.suffix != ".html" and output.is_file():
        raise InputError(f"{output} is a file: name a folder for the page, or a file that ends in .html")
    if target.is_dir():
        raise InputError(f"{target} is a folder: name a file that ends in .html, or a folder to put {PAGE} in")
    found = collect(places)
    groups = groups_of(found.runs)
    if not apart:
        refuse_several(groups)
    text = page(groups, found, title=title or "Quantization report", codes=codes)
    with atomic_file(target) as partial:
        partial.write_text(text, encoding="utf-8")
    return target, found.notes


def page(groups: Sequence[Sequence[Run]], found: Collected, *, title: str, codes: bool) -> str:
    """The whole HTML text."""
    parts, payload, today = [], [], datetime.now(UTC)
    for number, group in enumerate(groups):
        data, rows = _data(group, found.notes, codes=codes)
        payload.append(data)
        part = {
            "number": str(number),
            "heading": _heading(groups, number),
            "protocol": html.escape(protocol_of(group[0].record)),
            **_words(headline(rows), figures(rows), data),
        }
        parts.append(_template("group.html").substitute(part))
    script = "\n".join(_asset(name) for name in SCRIPTS)
    policy = (
        f"default-src 'none'; script-src {_hash(library())} {_hash(script)}; style-src 'unsafe-inline'; img-src data:"
    )
    return _template("page.html").substitute(
        title=html.escape(title),
        policy=html.escape(f"{policy}; base-uri 'none'; form-action 'none'"),
        style=_asset("page.css"),
        date=f"{today.day} {today:%B %Y}",
        counted=html.escape(_counted(groups, found.repeated)),
        notes=_notes(found),
        groups="\n".join(parts),
        data=script_json({"groups": payload, "published": _published()}),
        library=library(),
        script=script,
    )


def script_json(value: Any) -> str:
    """Strict json that ends no script element, whatever its strings hold."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@cache
def library() -> str:
    """Vega, Vega-Lite and vega-embed as one script, from the files that vl-convert-python carries."""
    import vl_convert

    text = vl_convert.javascript_bundle(snippet=None)  # pyright: ignore[reportArgumentType]
    if "</script" in text.lower():
        raise AssertionError("the charts' library would end its own script element")
    return text


def _data(group: Sequence[Run], notes: list[str], *, codes: bool) -> tuple[dict[str, Any], list[Row]]:
    rows = rows_of(group)
    notes += [f"Not in the charts: {row.label} has no loss" for row in rows if row.nll is None]
    return {"rows": [row.plain() for row in rows], **attachments(group, rows, notes, codes=codes)}, rows


def _words(said: Headline, key: Sequence[Figure], data: dict[str, Any]) -> dict[str, str]:
    """The static texts of a group, escaped."""
    lines = "".join(f"<p>{html.escape(each)}</p>" for each in said.support)
    tiles = "".join(
        f"<div><dt>{html.escape(each.name)}</dt><dd>{html.escape(each.value)}"
        f"<small>{html.escape(each.note)}</small></dd></div>"
        for each in key
    )
    absent = [words for name, words in MISSING.items() if name in data and not data[name]]
    if not any(row["gap_interval"] for row in data["rows"]):
        absent.append(MISSING["intervals"])
    return {
        "claim": html.escape(said.claim),
        "support": lines,
        "figures": tiles,
        "absent": "".join(f"<li>{html.escape(each)}</li>" for each in absent),
    }


def _heading(groups: Sequence[Sequence[Run]], number: int) -> str:
    """Empty where there is one group; else its number and what sets it apart."""
    if len(groups) < 2:
        return ""
    first, this = groups[0][0].record, groups[number][0].record
    apart = "; ".join(differences(first, this)) if number else "the first of them"
    words = html.escape(f"Part {number + 1} of {len(groups)}: {apart}.")
    return f'<p class="part">{words} Losses are not compared across parts.</p>'


def _counted(groups: Sequence[Sequence[Run]], repeated: int) -> str:
    kinds = [row.kind for group in groups for row in rows_of(group)]
    names = {QAT: "trained quantized", PTQ: "quantized after training", DENSE: "full precision"}
    counts = [f"{kinds.count(kind)} {name}" for kind, name in names.items() if kind in kinds]
    again = f" ({repeated} more records repeat them)" if repeated else ""
    return f"{len(kinds)} results{again}: {', '.join(counts)}"


def _notes(found: Collected) -> str:
    if not found.notes:
        return ""
    items = "".join(f"<li>{html.escape(line)}</li>" for line in found.notes)
    what = "1 thing is not shown here" if len(found.notes) == 1 else f"{len(found.notes)} things are not shown here"
    return f'<details class="notes"><summary>{what}</summary><ul>{items}</ul></details>'


def _published() -> list[dict[str, Any]]:
    return [
        {"label": each.label, "bits": each.bits, "gap": round(each.gap, 4), "text": each.text, "source": each.source}
        for each in PUBLISHED
    ]


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _template(name: str) -> Template:
    return Template(_asset(name))


def _asset(name: str) -> str:
    return (files("bitnet.report.page") / name).read_text(encoding="utf-8")
