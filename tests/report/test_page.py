import base64
import dataclasses
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch

from bitnet.errors import InputError
from bitnet.report.__main__ import main
from bitnet.report.page import render, write_page
from bitnet.report.page.attachments import attachments, count_codes, curves, layers, samples
from bitnet.report.page.collect import Run, collect
from bitnet.report.page.groups import differences, groups_of
from bitnet.report.page.headline import difference_interval, figures, headline
from bitnet.report.page.rows import kind_of, labels, rows_of

EVALUATION = {"text": "joined", "text_hash": "ab" * 32, "window": 256, "stride": 256, "predicted_tokens": 59765}
GPTQ = {"ptq": {"_target_": "bitnet.ptq.GPTQ", "bits": 2}}
DENSE = {"method": "full precision", "nll": 3.8, "perplexity": math.exp(3.8), "bits_per_weight": 16.0}


@pytest.fixture(autouse=True)
def library(monkeypatch):
    """Charts have tests of their own: here their library (5 s to bundle) is a stub."""
    monkeypatch.setattr(render, "library", lambda: "// charts")


@pytest.fixture
def quantized(make_record):
    def make(method="gptq", bits=2.15, gap=0.1, half=0.01, config=GPTQ, **changes):
        interval = None if gap is None or half is None else [gap - half, gap + half]
        nll = 3.8 + (gap or 0.0)
        fields = {"nll": nll, "perplexity": math.exp(nll), "gap": gap, "gap_interval": interval}
        fields |= {"method": method, "bits_per_weight": bits, "config": config, "evaluation": EVALUATION}
        return make_record(**{**fields, **changes})

    return make


@pytest.fixture
def dense(make_record):
    return make_record(**DENSE, evaluation=EVALUATION)


def headline_of(records):
    return headline(rows_of([Run(record, path) for record, path in zip(records, paths(records), strict=True)]))


def paths(records):
    from pathlib import Path

    return [Path(f"runs/{index}/run.json") for index in range(len(records))]


def rows(records):
    return rows_of([Run(record, path) for record, path in zip(records, paths(records), strict=True)])


class Texts(HTMLParser):
    """What a reader sees, and the start tags."""

    def __init__(self, text):
        super().__init__()
        self.seen, self.tags = "", []
        self.feed(text)

    def handle_data(self, data):
        self.seen += data

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


# What is found


def test_a_sweep_is_searched_and_the_original_that_its_runs_share_stands_once(tmp_path, quantized, dense):
    for number, bits in enumerate((2.15, 4.15)):
        folder = tmp_path / str(number) / "run"
        dense.write(folder / "reference.json")
        quantized(bits=bits).write(folder / "run.json")
    found = collect([tmp_path])
    assert [run.record.bits_per_weight for run in found.runs] == [16.0, 2.15, 4.15]
    assert (found.repeated, found.notes) == (1, [])


def test_a_record_that_is_named_twice_and_a_repeated_run_stand_once(tmp_path, quantized):
    quantized().write(tmp_path / "a" / "run.json")
    again = quantized(started="2027-01-01T00:00:00+00:00", seconds=5.0, config={**GPTQ, "output_dir": "elsewhere"})
    again.write(tmp_path / "b" / "run.json")
    quantized(seed=8).write(tmp_path / "c" / "run.json")
    found = collect([tmp_path, tmp_path / "a", tmp_path / "a" / "run.json"])
    assert (len(found.runs), found.repeated) == (2, 1)


def test_links_to_runs_are_followed_and_a_link_to_where_it_stands_ends(tmp_path, quantized):
    quantized().write(tmp_path / "elsewhere" / "run" / "run.json")
    (tmp_path / "chosen").mkdir()
    (tmp_path / "chosen" / "run").symlink_to(tmp_path / "elsewhere" / "run")
    (tmp_path / "chosen" / "round").symlink_to(tmp_path / "chosen")
    assert len(collect([tmp_path / "chosen"]).runs) == 1


def test_a_place_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist"):
        collect([tmp_path / "nowhere"])


def test_no_run_at_all_is_refused_with_what_was_there(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"found none that can be shown \(Left out: .*run.json is no run record"):
        collect([tmp_path])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[:200], "is no run record"),
        (lambda text: text.replace('"format_version": 2', '"format_version": 99'), "has run record format 99"),
        (lambda text: re.sub(r'"perplexity": [\d.]+', '"perplexity": NaN', text), "finite numbers, got perplexity"),
        (lambda text: text.replace('"seed"', '"sead"'), r"missing \['seed'\]"),
        (lambda text: "[]", "expected a json object"),
        (
            lambda text: re.sub(r'"config": .*"versions"', '"config": 3, "versions"', text, flags=re.DOTALL),
            "config is int",
        ),
        (lambda text: text.replace('"method": "bad"', '"method": ["bad"]'), "method is list"),
        (
            lambda text: re.sub(r'"gap_interval": .*?]', '"gap_interval": [1]', text, flags=re.DOTALL),
            r"gap_interval is \[1\]",
        ),
    ],
)
def test_a_record_that_cannot_be_shown_is_named_and_the_others_are_shown(tmp_path, quantized, damage, reason):
    quantized().write(tmp_path / "a" / "run.json")
    bad = quantized(method="bad").write(tmp_path / "b" / "run.json")
    bad.write_text(damage(bad.read_text()))
    found = collect([tmp_path])
    assert [run.record.method for run in found.runs] == ["gptq"]
    assert re.search(reason, found.notes[0])
    assert str(bad) in found.notes[0]


def test_a_record_of_the_first_format_is_shown(tmp_path, quantized):
    plain = dataclasses.asdict(quantized(gap=None, half=None, nll=3.9, perplexity=50.0, evaluation=None))
    for name in [name for name, value in plain.items() if value is None and name not in ("nll", "perplexity")]:
        del plain[name]
    (tmp_path / "run.json").write_text(json.dumps(plain | {"format_version": 1}))
    assert collect([tmp_path]).runs[0].record.nll == 3.9


def test_runs_that_did_not_end_and_jobs_that_failed_are_told(tmp_path, quantized):
    quantized().write(tmp_path / "0" / "run" / "run.json")
    (tmp_path / "1" / "run").mkdir(parents=True)
    (tmp_path / "1" / "run" / "config.yaml").write_text("seed: 0")
    (tmp_path / "1" / "job.json").write_text(json.dumps({"overrides": ["ptq=gptq"], "error": "it rained"}))
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "job.json").write_text("{")
    notes = "\n".join(collect([tmp_path]).notes)
    assert "1 (ptq=gptq): it rained" in notes
    assert "1/run has no run.json: the run did not end" in notes
    assert "Not read: " in notes
    assert "2/job.json" in notes


def test_the_command_of_a_sweep_s_job_is_its_own(tmp_path, quantized):
    path = quantized(command="python train.py -m ptq=gptq,hqq").write(tmp_path / "0" / "run" / "run.json")
    assert Run(quantized(command="alone"), path).command == "alone"
    (tmp_path / "0" / "job.json").write_text(json.dumps({"overrides": ["ptq=gptq", "data.path=a b"], "error": None}))
    assert Run(quantized(), path).command == "python train.py ptq=gptq 'data.path=a b'"


# What may share an axis


def test_runs_of_other_text_tokenizer_or_window_are_refused_with_the_reason(tmp_path, quantized):
    quantized().write(tmp_path / "a" / "run.json")
    quantized(data={"name": "c4", "tokenizer_hash": "cd" * 32}).write(tmp_path / "b" / "run.json")
    quantized(evaluation={**EVALUATION, "window": 512}).write(tmp_path / "c" / "run.json")
    with pytest.raises(InputError, match="cannot share an axis") as refusal:
        write_page([tmp_path], tmp_path / "report")
    assert "tokenizer none against cdcdcdcd" in str(refusal.value)
    assert "window 256 against 512" in str(refusal.value)
    assert "--apart" in str(refusal.value)
    assert not (tmp_path / "report").exists()


def test_runs_apart_get_a_part_of_the_page_each(tmp_path, quantized):
    quantized().write(tmp_path / "a" / "run.json")
    quantized(evaluation={**EVALUATION, "window": 512}).write(tmp_path / "c" / "run.json")
    path, _ = write_page([tmp_path], tmp_path / "report", apart=True)
    text = Texts(path.read_text())
    assert "Part 2 of 2: window 256 against 512." in text.seen
    assert [attributes["data-group"] for tag, attributes in text.tags if tag == "article"] == ["0", "1"]


def test_groups_keep_their_order_and_differences_are_told(quantized):
    one, other = quantized(), quantized(evaluation={**EVALUATION, "stride": 128})
    runs = [Run(record, path) for record, path in zip([one, other, one], paths([1, 2, 3]), strict=True)]
    assert [len(group) for group in groups_of(runs)] == [2, 1]
    assert differences(one, other) == ["stride 256 against 128"]


# Names and kinds


def test_results_of_one_method_are_told_apart_by_their_settings(quantized):
    configs = [{"ptq": {"_target_": "bitnet.ptq.GPTQ", "bits": bits}, "optim": {"lr": 1e-3}} for bits in (2, 4)]
    assert labels([quantized(config=config) for config in configs]) == ["gptq bits=2", "gptq bits=4"]
    assert labels([quantized(), quantized()]) == ["gptq #1", "gptq #2"]
    assert labels([quantized(method="gptq #1"), quantized(), quantized()])[0] == "gptq #1"


def test_names_are_unique_whatever_the_settings(quantized):
    configs = [
        {"ptq": {"_target_": "x", "bits": a, "damping": b}, "seed": c} for a in (2, 3) for b in (1, 2) for c in (0, 1)
    ]
    names = labels([quantized(config=config) for config in configs] * 2)
    assert len(set(names)) == 16


def test_kinds_are_full_precision_trained_and_quantized_afterwards(quantized, dense):
    trained = quantized(method="bitnet158 frozen", config={"quantizer": {"_target_": "x"}, "ptq": {}})
    assert [kind_of(each) for each in (dense, quantized(), trained)] == ["dense", "PTQ", "QAT"]
    assert labels([trained]) == ["bitnet158"]


def test_a_family_keeps_its_colour_whatever_else_is_there(quantized):
    hqq = quantized(method="hqq", config={"ptq": {"_target_": "bitnet.ptq.HQQ"}})
    new = quantized(method="new", config={"ptq": {"_target_": "bitnet.ptq.New"}})
    assert rows([hqq])[0].look == rows([new, quantized(), hqq])[2].look
    assert len({row.look for row in rows([new, quantized(), hqq])}) == 3
    others = [quantized(method=f"m{number}", config={"ptq": {"_target_": f"M{number}"}}) for number in range(20)]
    assert len({row.look for row in rows([*others, hqq])}) == 21


def test_gaps_are_to_the_original_and_not_to_a_model_that_was_trained_on(quantized, dense, make_record):
    further = make_record(method="hf", nll=3.7, perplexity=math.exp(3.7), train_tokens=10**6, evaluation=EVALUATION)
    original = dataclasses.replace(dense, train_tokens=0)
    alone = trained(quantized, gap=None, nll=4.0, perplexity=math.exp(4.0))
    assert rows([further, original, alone])[2].gap == pytest.approx(0.2)
    # Measured gaps decide, whatever was trained.
    measured = quantized(gap=0.5, nll=4.2, perplexity=math.exp(4.2))
    assert rows([original, further, alone, measured])[2].gap == pytest.approx(0.3)


def test_gaps_are_to_the_best_model_that_saw_as_many_tokens(quantized, dense):
    def full(nll, tokens):
        return dataclasses.replace(dense, method="dense", nll=nll, train_tokens=tokens)

    alone = trained(quantized, gap=None, nll=4.0, perplexity=math.exp(4.0), train_tokens=1000)
    others = [
        full(4.5, 1000),
        full(3.9, 1000),
        full(5.0, 500),
        full(3.0, 9000),
    ]  # a bad rate, a good one, other budgets
    assert rows([*others, alone])[4].gap == pytest.approx(0.1)
    assert rows([*others[2:], alone])[2].gap == pytest.approx(1.0)


def test_gaps_are_to_the_twin_of_the_run_s_own_folder(tmp_path, quantized, dense):
    alone = trained(quantized, gap=None, nll=4.0, perplexity=math.exp(4.0))
    twin = dataclasses.replace(dense, nll=3.9)
    runs = [Run(dense, tmp_path / "x" / "run.json"), Run(twin, tmp_path / "y" / "dense" / "run.json")]
    assert rows_of([*runs, Run(alone, tmp_path / "y" / "run.json")])[2].gap == pytest.approx(0.1)


# The headline


def trained(quantized, **changes):
    return quantized(
        **{"method": "bitnet158 frozen", "config": {"quantizer": {"_target_": "x"}}, "bits": 1.62, **changes}
    )


def test_the_better_and_smaller_model_beats_the_other(quantized, dense):
    said = headline_of([dense, trained(quantized, gap=0.05), quantized(gap=0.2)])
    assert said.claim == "Training in 1.62 bits beats gptq in 2.15 bits by 0.150 nats a token"
    assert "Training is ahead by 0.150 nats: 0.130 to 0.170" in said.support[0]
    assert "No post-training result here takes as few bits" in said.support[0]


def test_a_better_model_that_takes_more_bits_beats_nothing(quantized, dense):
    said = headline_of([dense, trained(quantized, gap=0.3), quantized(gap=0.1)])
    assert said.claim == "Training in 1.62 bits loses 0.200 nats a token to gptq in 2.15 bits"
    assert "Training is behind by 0.200 nats: 0.180 to 0.220" in said.support[0]
    said = headline_of([dense, trained(quantized, gap=0.3), quantized(gap=0.1, bits=1.5)])
    assert said.claim == "gptq in 1.50 bits beats training in 1.62 bits by 0.200 nats a token"


def test_intervals_that_overlap_claim_nothing(quantized, dense):
    said = headline_of([dense, trained(quantized, gap=0.11), quantized(gap=0.1)])
    assert said.claim == "Training in 1.62 bits and gptq in 2.15 bits cannot be told apart"


def test_the_rival_is_the_best_within_half_a_bit_and_not_the_smallest(quantized, dense):
    small = quantized(method="absmax", gap=1.5, bits=1.7)
    said = headline_of(
        [dense, trained(quantized, gap=0.3), small, quantized(gap=0.1, bits=2.0), quantized(bits=4, gap=0)]
    )
    assert "gptq" in said.claim
    assert "in 2.00 bits" in said.claim


def test_the_headline_is_of_the_trained_model_that_is_furthest_ahead(quantized, dense):
    four = trained(quantized, method="qat4 frozen", gap=0.001, bits=4.125)
    after = [quantized(gap=0.2), quantized(method="kquant", gap=0.01, bits=4.5)]
    said = headline_of([dense, four, trained(quantized, gap=0.05), *after])
    assert said.claim.startswith("Training in 1.62 bits beats gptq in 2.15 bits by 0.150 nats")


def test_a_control_that_trained_on_is_named_beside_the_trained_model(quantized, dense):
    ours = trained(quantized, gap=0.05, train_tokens=1000)
    assert ours.nll is not None
    control = quantized(method="dense", bits=32.0, nll=ours.nll - 0.07, gap=None, perplexity=43.2, train_tokens=1000)
    said = headline_of([dense, control, ours, quantized(gap=0.2)])
    assert "a perplexity of 43.20: bitnet158 is 0.070 nats above that." in said.support[1]
    longer = dataclasses.replace(control, train_tokens=9000)
    assert not any("the same tokens" in each for each in headline_of([dense, longer, ours, quantized()]).support)


def test_a_difference_without_both_intervals_has_none(quantized, dense):
    one, other = rows([dense, trained(quantized, half=None), quantized()])[1:]
    assert difference_interval(one, other) is None
    assert (
        "no interval is known" in headline_of([dense, trained(quantized, half=None, gap=0.4), quantized()]).support[0]
    )
    # Gaps to two originals do not differ as the losses do.
    one, other = rows([trained(quantized), quantized(nll=5.0, perplexity=math.exp(5.0))])
    assert difference_interval(one, other) is None


def test_headlines_without_training_or_without_anything_quantized(quantized, dense):
    near = quantized(method="kquant", gap=0.004, bits=4.5)
    assert headline_of([dense, near, quantized()]).claim == (
        "kquant is within 0.01 nats a token of full precision in 4.50 bits"
    )
    assert headline_of([dense, quantized()]).claim.startswith("gptq comes closest to full precision: 0.100 nats above")
    assert headline_of([trained(quantized)]).claim.startswith("bitnet158 in 1.62 bits: 0.100 nats above")
    assert headline_of([dense]).claim == "Full precision only: full precision has a perplexity of 44.70"
    nothing = quantized(nll=None, perplexity=None, gap=None, half=None)
    assert headline_of([nothing]).claim == "No result has a loss yet"


def test_key_figures_are_the_best_of_each_size(quantized, dense):
    further = dataclasses.replace(dense, method="hf", nll=3.7, perplexity=40.0)  # gaps are not to this one
    found = figures(
        rows([dense, further, quantized(bits=2.0, gap=0.3), quantized(bits=1.9, gap=0.2), quantized(bits=2.1)])
    )
    assert [(each.name, each.value) for each in found] == [
        ("Full precision", "44.70"),
        ("Best in 2 bits or less", "+0.200 nats"),
        ("Best in 2 to 3 bits", "+0.100 nats"),
    ]


# What stands beside a record


def test_curves_are_over_tokens_and_bounded(tmp_path):
    lines = ["step,train/loss,train/tokens,val/loss"]
    lines += [f"{step},{5 - step / 1000},{step * 2048}.0," for step in range(1, 1001)] + ["1000,,,3.9"]
    (tmp_path / "version_0").mkdir()
    (tmp_path / "version_0" / "metrics.csv").write_text("\n".join(lines))
    found = curves(tmp_path)
    assert found["x"] == "tokens"
    assert len(found["train"]) <= 241
    assert found["train"][-1][0] == 2_048_000
    assert found["validation"] == [[2_048_000, 3.9]]


def test_layers_have_output_errors_or_those_of_the_weights(tmp_path):
    heading = "name,out_features,in_features,bits_per_weight,relative_error,weight_error,seconds\n"
    path = tmp_path / "layers.csv"
    path.write_text(heading + "model.layers.3.mlp.up_proj,8,8,4.25,0.001,0.01,0.1\n")
    assert layers(path) == {
        "measure": "output",
        "cells": [[3, "mlp.up_proj", 0.001, 4.25, "model.layers.3.mlp.up_proj"]],
    }
    path.write_text(heading + "model.layers.3.mlp.up_proj,8,8,4.25,,0.01,0.1\n")
    assert layers(path)["measure"] == "weight"


def test_samples_are_those_of_the_last_step(tmp_path):
    path = tmp_path / "samples.md"
    path.write_text("## Step 50\n\n>     old\n\n## Step 100\n\n>     one\n>       two\n\n>     </script>\n\n")
    assert samples(path) == {"step": 100, "texts": ["one\n  two", "</script>"]}


def test_what_cannot_be_read_beside_a_record_is_noted(tmp_path, quantized):
    heading = "name,out_features,in_features,bits_per_weight,relative_error,weight_error,seconds\n"
    (tmp_path / "layers.csv").write_text(heading + "model.layers.3.mlp.up_proj,8,8,4.25,nan,0.01,0.1\n")
    (tmp_path / "samples.md").write_bytes(b"## Step 1\n\n\xff\n")
    (tmp_path / "packed").mkdir()
    path = quantized().write(tmp_path / "run.json")
    notes: list[str] = []
    runs = [Run(quantized(), path)]
    found = attachments(runs, rows_of(runs), notes)
    assert found == {"curves": [], "layers": [], "samples": [], "codes": []}
    assert len(notes) == 3
    assert all(note.startswith("Not read: ") for note in notes)


def test_a_bound_counts_what_has_something_to_show_and_tells_what_it_left(tmp_path, quantized, monkeypatch):
    monkeypatch.setattr("bitnet.report.page.attachments.SAMPLED", 1)
    runs = []
    for number, text in enumerate(("", "## Step 5\n\n>     seen\n\n", "## Step 5\n\n>     too many\n\n")):
        folder = tmp_path / str(number)
        record = quantized(seed=number)
        runs.append(Run(record, record.write(folder / "run.json")))
        (folder / "samples.md").write_text(text)
    notes: list[str] = []
    found = attachments(runs, rows_of(runs), notes)
    assert [(entry["id"], entry["texts"]) for entry in found["samples"]] == [(1, ["seen"])]
    assert notes == ["Bounded: samples of 1 runs are shown, 1 were not read; name fewer for others"]


def test_codes_are_counted_over_all_layers_of_an_export(tmp_path):
    from bitnet.export import export
    from bitnet.models import Size, from_scratch
    from bitnet.nn import bit_linears, convert, freeze

    size = Size(
        hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    model = from_scratch(body="llama", hidden_act="silu", size=size, vocab_size=258)
    convert(model)
    weights = [
        layer.quantized_weight() if hasattr(layer, "quantized_weight") else layer.freeze().weight
        for _, layer in bit_linears(model)
    ]
    freeze(model)
    export(model, "packed", tmp_path / "packed")
    found = count_codes(tmp_path / "packed")
    codes = torch.cat([weight.qdata.flatten() for weight in weights])
    assert found["codes"] == [-1, 0, 1]
    assert found["weights"] == codes.numel()
    expected = [(codes == code).sum().item() / codes.numel() for code in (-1, 0, 1)]
    assert found["shares"] == pytest.approx(expected, abs=1e-6)


# The file


def test_nothing_that_comes_from_a_run_can_be_executed(tmp_path, quantized, dense):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    dense.write(tmp_path / "d" / "run.json")
    record = quantized(method=evil, command=evil, model=evil, data={"name": evil}, evaluation=EVALUATION)
    record.write(tmp_path / "a" / "run.json")
    (tmp_path / "a" / "samples.md").write_text(f"## Step 1\n\n>     {evil}\n\n")
    path, _ = write_page([tmp_path], tmp_path / "report", title=evil, apart=True)
    text = path.read_text()
    parsed = Texts(text)
    assert "onerror=alert(2)" in parsed.seen  # shown, as text
    assert [tag for tag, _ in parsed.tags if tag == "img"] == []
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", text, re.DOTALL)
    assert [attributes for attributes, _ in scripts] == [' type="application/json" id="data"', "", ""]
    data = json.loads(scripts[0][1])
    assert data["groups"][0]["rows"][0]["command"] == evil
    policy = next(attributes["content"] for tag, attributes in parsed.tags if attributes.get("http-equiv"))
    hashes = {
        f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'" for _, body in scripts[1:]
    }
    assert set(re.search(r"script-src ([^;]+)", policy)[1].split()) == hashes
    assert policy.startswith("default-src 'none'")


def test_the_page_goes_into_a_folder_or_a_file_and_replaces_an_older_one(tmp_path, quantized):
    quantized().write(tmp_path / "runs" / "a" / "run.json")
    for output, expected in (("report", "report/index.html"), ("x/page.html", "x/page.html")):
        for title in ("First", "Second"):
            path, _ = write_page([tmp_path / "runs"], tmp_path / output, title=title)
            assert path == tmp_path / expected
            assert f"<title>{title}</title>" in path.read_text()
            assert len(list(path.parent.iterdir())) == 1


def test_an_output_that_is_a_file_of_another_kind_is_refused(tmp_path, quantized):
    record = quantized().write(tmp_path / "run.json")
    before = record.read_bytes()
    with pytest.raises(InputError, match="is a file: name a folder"):
        write_page([tmp_path], record)
    assert record.read_bytes() == before


def test_the_library_of_the_charts_is_asked_for_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("bitnet.report.loggers.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "bitnet-qat\[report\]"'):
        write_page([tmp_path], tmp_path / "report")


def test_sections_without_data_say_what_would_give_them_some_and_unmeasured_rows_are_told(tmp_path, quantized):
    quantized(half=None).write(tmp_path / "a" / "run.json")
    quantized(method="b", nll=None, perplexity=None, gap=None, half=None).write(tmp_path / "b" / "run.json")
    path, notes = write_page([tmp_path], tmp_path / "report")
    seen = Texts(path.read_text()).seen
    for words in ("export=packed", "evaluation.compare=true", "ptq= writes one", "callbacks.samples"):
        assert words in seen
    assert notes == ["Not in the charts: b has no loss"]


def test_the_command_prints_notes_and_the_page_and_refuses_in_one_line(tmp_path, quantized, capsys):
    quantized().write(tmp_path / "runs" / "a" / "run.json")
    (tmp_path / "runs" / "b").mkdir()
    (tmp_path / "runs" / "b" / "run.json").write_text("{")
    main([str(tmp_path / "runs"), "-o", str(tmp_path / "report")])
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("Left out: ")
    assert out[-1].startswith(str(tmp_path / "report" / "index.html"))
    with pytest.raises(SystemExit, match=r"^error: expected the folder of a run"):
        main([str(tmp_path / "nowhere"), "-o", str(tmp_path / "report")])
