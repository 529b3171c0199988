import yaml

from bitnet.export.card import loading_code, model_card

RECORD = {
    "method": "b1.58 latent",
    "model": "bitnet, 6.8M parameters",
    "nll": 3.68764,
    "nll_interval": [3.65, 3.72],
    "perplexity": 39.95,
    "gap": 0.0712,
    "gap_interval": [0.06, 0.08],
    "bits_per_weight": 1.6021,
    "bytes": 9864666,
    "kl": None,
    "tasks": {"arc_easy/acc": 0.41},
    "evaluation": {"text": "c4 validation", "window": 256, "predicted": 249896},
    "command": "train.py size=nano",
    "git_sha": "91af04b",
    "git_dirty": True,
    "data": {"name": "pydocs", "tokens": 120000},
    "train_tokens": 1000000,
    "steps": 400,
    "seed": 0,
    "versions": {"torch": "2.13.0"},
    "started": "2026-11-22T06:00:00+00:00",
}


def card(**options) -> str:
    return model_card("packed ternary weights", code=loading_code(), **options)


def test_the_header_is_yaml_that_the_hub_reads():
    text = card(tags=["1.58-bit"], record=RECORD)
    _, header, _ = text.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["bitnet", "1.58-bit"],
    }


def test_figures_stand_with_their_intervals_and_units():
    text = card(record=RECORD)
    assert "# bitnet, 6.8M parameters (b1.58 latent)" in text
    assert "| loss, nats a token | 3.6876 (95 %: 3.6500 to 3.7200) |" in text
    assert "| gap to full precision, nats a token | 0.0712 (95 %: 0.0600 to 0.0800) |" in text
    assert "| perplexity | 39.950 |" in text
    assert "| stored bits a weight of the quantized linears | 1.602 |" in text
    assert "9,864,666 |" in text
    assert "| arc_easy/acc | 0.4100 |" in text
    assert "text c4 validation, window 256, predicted 249896" in text


def test_provenance_is_enough_to_repeat_the_run():
    text = card(record=RECORD)
    for line in (
        "- command: `train.py size=nano`",
        "- commit: 91af04b with changes",
        '- data: `{"name": "pydocs", "tokens": 120000}`',
        "- tokens trained on: 1,000,000",
        "- seed: 0",
        "- versions: torch 2.13.0",
    ):
        assert line in text


def test_what_was_not_measured_is_not_printed():
    text = card(record=RECORD)
    assert "KL" not in text
    assert "None" not in text
    text = card()
    assert "Measured" not in text
    assert "Provenance" not in text
    assert "# Language model" in text
    assert "Contents: packed ternary weights." in text
    assert 'AutoModelForCausalLM.from_pretrained("this folder")' in text


def test_a_value_cannot_break_the_table_or_start_a_section():
    text = card(
        record={"model": "a\n# b", "method": "c|d", "nll": 1.0, "tasks": {"x|y\n---": 0.5}, "command": "a`b\n" * 300}
    )
    assert "# a # b (c/d)" in text
    assert "| x/y --- | 0.5000 |" in text
    (command,) = [line for line in text.splitlines() if line.startswith("- command")]
    assert len(command) < 430
    assert command.count("`") == 2


def test_limitations_are_a_list():
    assert "## Limitations\n\n- One.\n- Two." in card(notes=["One.", "Two."])
