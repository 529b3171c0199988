import json

import numpy as np
import pytest
from made_records import record

from bitnet.errors import InputError
from bitnet.experiment.ladder import fit_power_law, main, rungs, weights_of, write_ladder
from bitnet.models import Size, from_scratch

SIZES = [1e5, 3e5, 1e6, 3e6, 1e7]


def model(method: str, nll: float, hidden: int, rate: float = 1e-3, tokens: int = 1000, **changes):
    size = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = {"size": size, "optim": {"lr": rate}}
    return record(method, nll, model=f"bitnet-{hidden}", config=config, train_tokens=tokens, **changes)


def ladder(hidden=(64, 128, 256, 512), exponent=0.5):
    """Two rates for each model; the second dense one and the first quantized one are the better."""
    records = []
    for each in hidden:
        gap = 0.2 * (each / 64) ** (-2 * exponent)
        records += [model("dense", 4.1, each, 1e-3), model("dense", 4.0, each, 2e-3)]
        records += [model("b1.58 frozen", 4.0 + gap, each, 1e-3), model("b1.58 frozen", 4.3, each, 2e-3)]
    return records


def test_an_exact_power_law_is_found_without_an_error():
    law = fit_power_law(SIZES, [3.0 * size**-0.25 for size in SIZES])
    assert law.exponent == pytest.approx(0.25, abs=1e-6)
    assert law.gap(5e8) == pytest.approx(3.0 * 5e8**-0.25, rel=1e-5)
    assert law.exponent_interval == pytest.approx((0.25, 0.25), abs=1e-5)


def test_the_fit_and_its_intervals_are_those_of_a_search_over_all_curves():
    sizes = np.array(SIZES)
    gaps = 0.1 * (sizes / 1e6) ** -0.4 + np.array([0.004, -0.006, 0.005, -0.003, 0.002])
    law = fit_power_law(SIZES, gaps.tolist())
    heights, exponents = np.linspace(0.05, 0.2, 1501)[:, None], np.linspace(0.0, 1.0, 1001)[None]
    squares = sum(
        (gap - heights * (size / law.pivot) ** -exponents) ** 2 for size, gap in zip(sizes, gaps, strict=True)
    )
    inside = squares <= squares.min() * (1 + 3.182**2 / 3)
    assert law.exponent == pytest.approx(exponents[0, squares.min(0).argmin()], abs=2e-3)
    allowed = exponents[0, inside.any(0)]
    assert law.exponent_interval == pytest.approx((allowed[0], allowed[-1]), abs=2e-3)
    curves = (heights * (2e7 / law.pivot) ** -exponents)[inside]
    assert law.interval(2e7) == pytest.approx((curves.min(), curves.max()), rel=0.02)


def test_nineteen_in_twenty_intervals_hold_the_exponent():
    random = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        gaps = [0.1 * (size / 1e6) ** -0.3 + random.normal(0, 0.01) for size in SIZES[:4]]
        low, high = fit_power_law(SIZES[:4], gaps).exponent_interval
        held += low < 0.3 < high
    assert 0.9 < held / 200 < 0.99


def test_a_gap_below_zero_counts_like_any_other():
    law = fit_power_law([1e5, 1e6, 1e7], [0.2, 0.1, -0.01])
    assert law.gap(1e7) < fit_power_law([1e5, 1e6], [0.2, 0.1]).gap(1e7)
    assert law.exponent_interval[1] == 4.0  # nothing here bounds how fast the gap falls
    assert law.interval(1e7)[0] < 0


def test_two_sizes_give_a_line_without_an_interval_and_one_gives_none():
    law = fit_power_law([1e6, 1e7], [0.2, 0.1])
    assert law.gap(1e7) == pytest.approx(0.1)
    assert law.exponent_interval is None
    assert law.interval(1e8) is None
    with pytest.raises(InputError, match="at least two sizes for a fit, got 1"):
        fit_power_law([1e6, 1e6], [0.2, 0.1])
    with pytest.raises(InputError, match=r"above zero for a power law, got -0.2000, -0.0100"):
        fit_power_law([1e6, 1e7], [-0.2, -0.01])


def test_each_size_counts_with_the_best_rate_of_each_method():
    found = rungs([*ladder(), model("dense", 4.0, 999)])  # a size without a partner is no rung
    assert [each.weights for each in found] == [weights_of(model("", 0.0, hidden)) for hidden in (64, 128, 256, 512)]
    assert [each.gap for each in found] == pytest.approx([0.2, 0.1, 0.05, 0.025])
    assert {(each.dense_rate, each.quantized_rate, each.edge) for each in found} == {(2e-3, 1e-3, True)}


def test_a_best_rate_inside_of_what_was_tried_is_at_no_edge():
    records = [model(name, abs(rate - 2e-3) + 4, 64, rate) for name in ("dense", "q") for rate in (1e-3, 2e-3, 4e-3)]
    assert [each.edge for each in rungs(records)] == [False]


def test_the_seeds_of_a_rate_count_with_their_mean():
    losses = {1e-3: (3.9, 4.3), 2e-3: (4.0, 4.1)}  # the best single run is of the rate that is worse on the whole
    records = [
        model(name, loss + (name == "q"), 64, rate, seed=seed)
        for name in ("dense", "q")
        for rate, both in losses.items()
        for seed, loss in enumerate(both)
    ]
    (rung,) = rungs(records)
    assert (rung.dense, rung.dense_rate) == pytest.approx((4.05, 2e-3))
    assert rung.gap == pytest.approx(1.0)


def test_weights_are_those_of_the_models_linears():
    config = model("", 0.0, 64).config["size"]
    body = from_scratch(body="llama", hidden_act="silu", size=Size(**config), vocab_size=100)
    names = [name for name, _ in body.named_modules() if name.endswith("_proj")]
    assert len(names) == 14
    assert sum(body.get_submodule(name).weight.numel() for name in names) == weights_of(model("", 0.0, 64))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (model("dense", 4.0, 64, tokens=2000), "one budget and one text: dense bitnet-64 was trained on 2,000 tokens"),
        (model("dense", 4.0, 64, data={"name": "c4"}), "one budget and one text"),
        (model("gptq", 4.0, 64), r"of one method, got b1.58 frozen, gptq"),
    ],
)
def test_what_cannot_be_compared_is_no_ladder(other, message):
    with pytest.raises(InputError, match=message):
        rungs([*ladder(), other])


def test_a_sweep_gets_a_table_figures_and_a_picture(tmp_path, capsys):
    for number, each in enumerate([*ladder(), model("dense", 4.0, 1024), model("b1.58 frozen", 3.999, 1024)]):
        each.write(tmp_path / str(number) / "run" / "run.json")
    law = write_ladder(tmp_path)
    text = (tmp_path / "ladder.md").read_text()
    assert text in capsys.readouterr().out
    assert "| -0.0010 |" in text
    low, high = law.exponent_interval
    assert low < 0.5 < high
    assert f"^-{law.exponent:.3f} (95 %: {low:.2f} to {high:.2f})" in text
    assert json.loads((tmp_path / "ladder.json").read_text())["exponent"] == law.exponent
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_says_what_it_needs(tmp_path):
    with pytest.raises(SystemExit, match=r"usage: .* SWEEP"):
        main([])
    with pytest.raises(SystemExit, match="error: expected gaps of at least two sizes"):
        main([str(tmp_path)])
