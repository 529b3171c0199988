"""Tokens are drawn from what the options leave, with the probabilities that the model gives them."""

import pytest
import torch

from bitnet.errors import InputError
from bitnet.generation import Sampler, Sampling
from bitnet.generation.sampling import _nucleus

LOGITS = torch.tensor([0.5, 3.0, -1.0, 2.0, 1.0])
MANY = 1000


def drawn(logits=LOGITS, context=(), number=MANY, **options) -> torch.Tensor:
    """Shares of the tokens among many draws."""
    draw = Sampler(Sampling(**{"temperature": 1.0} | options), context=context)
    return torch.bincount(torch.tensor([draw(logits) for _ in range(number)]), minlength=len(logits)) / number


def test_temperature_zero_takes_the_most_likely_token():
    assert drawn(temperature=0.0, number=5)[1] == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_shares_are_the_probabilities_at_that_temperature(temperature):
    expected = (LOGITS / temperature).softmax(0)
    assert torch.allclose(
        drawn(temperature=temperature), expected, atol=4 * 0.5 / MANY**0.5
    )  # four standard deviations


@pytest.mark.parametrize("temperature", [1e-30, 1e-300])
def test_a_temperature_near_zero_is_as_good_as_zero(temperature):
    assert drawn(temperature=temperature, number=20)[1] == 1


def test_top_k_leaves_so_many_tokens_with_their_ratios():
    found = drawn(top_k=2)
    assert found.nonzero().flatten().tolist() == [1, 3]
    assert abs(found[1] - LOGITS[[1, 3]].softmax(0)[0]) < 0.06
    assert bool((drawn(top_k=99) > 0).all())


@pytest.mark.parametrize(
    ("top_p", "left"), [(1e-9, [1]), (0.6, [1]), (0.7, [1, 3]), (0.9, [1, 3, 4]), (1.0, [0, 1, 2, 3, 4])]
)
def test_top_p_leaves_the_fewest_tokens_that_reach_it(top_p, left):
    assert LOGITS.softmax(0)[[1, 3, 4]].cumsum(0).tolist() == pytest.approx([0.624, 0.853, 0.937], abs=1e-3)
    assert drawn(top_p=top_p).nonzero().flatten().tolist() == left


def test_top_p_comes_after_top_k():
    assert drawn(top_k=2, top_p=0.7).nonzero().flatten().tolist() == [1]  # of two, the first has 0.73


@pytest.mark.parametrize("vocabulary", [255, 256, 257, 5000])
def test_top_p_over_a_flat_vocabulary_looks_beyond_the_first_candidates(vocabulary):
    logits = torch.linspace(0, 1e-3, vocabulary)
    _, places = _nucleus(logits.exp(), 0.9)
    ordered = logits.double().softmax(0).sort(descending=True)
    needed = int((ordered.values.cumsum(0) < 0.9).sum()) + 1
    assert abs(len(places) - needed) <= 1  # float32 sums
    assert set(places.tolist()) <= set(ordered.indices[: needed + 1].tolist())


def test_the_penalty_lowers_tokens_of_the_context_and_of_the_text():
    draw = Sampler(Sampling(temperature=0, repetition_penalty=2.0), context=[1, 1, 2])
    assert [draw(LOGITS) for _ in range(3)] == [3, 1, 1]  # 3 -> 1.5 by the context; 2 -> 1 once it was taken
    expected = torch.tensor([0.5, 1.5, -2.0, 2.0, 1.0]).softmax(0)
    found = torch.zeros(5)
    for seed in range(400):
        found[Sampler(Sampling(temperature=1, repetition_penalty=2.0, seed=seed), context=[1, 2])(LOGITS)] += 1 / 400
    assert torch.allclose(found, expected, atol=0.1)


def test_tokens_of_the_context_that_cannot_be_drawn_are_not_penalized():
    draw = Sampler(Sampling(temperature=0, repetition_penalty=2.0), context=[1, 5, 150])
    assert draw(LOGITS) == 3


def test_a_seed_repeats_itself_and_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    texts = []
    for seed in (1, 1, 2):
        draw = Sampler(Sampling(temperature=1.0, seed=seed))
        texts.append([draw(LOGITS) for _ in range(20)])
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(temperature, value):
    logits = LOGITS.clone()
    logits[2] = value
    with pytest.raises(InputError, match="not finite"):
        Sampler(Sampling(temperature=temperature))(logits)


def test_a_token_that_is_ruled_out_is_never_drawn():
    logits = LOGITS.clone()
    logits[1] = -torch.inf
    assert drawn(logits)[1] == 0
    assert drawn(torch.tensor([0.0, *[-torch.inf] * 3]), number=50)[0] == 1


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"repetition_penalty": 0.0},
        {"max_new_tokens": 0},
        {"max_new_tokens": 1.5},
        {"max_new_tokens": True},
        {"top_k": 2.5},
        {"seed": 1.0},
        {"seed": -1},
        {"stop": ("a", "")},
    ],
)
def test_options_out_of_range_are_refused_by_name(option):
    with pytest.raises(InputError, match=next(iter(option))):
        Sampling(**option)
