import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bitnet.errors import InputError
from bitnet.evaluation import BlocksProtocol, TextProtocol, compare, evaluate_text
from bitnet.evaluation.bootstrap import bootstrap_intervals
from bitnet.evaluation.text import windows_of

VOCAB = 19


class History(nn.Module):
    """Logits depend on every token before them in the window: a window cut elsewhere gives another loss."""

    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, VOCAB)
        nn.init.normal_(self.table.weight, std=scale)
        self.dropout = nn.Dropout(0.5)
        self.rows: list[int] = []

    def forward(self, input_ids: torch.Tensor, use_cache: bool = True):
        assert not use_cache
        self.rows.append(len(input_ids))
        steps = torch.arange(1, input_ids.shape[1] + 1)[:, None]
        return SimpleNamespace(logits=self.dropout(self.table(input_ids)).cumsum(dim=1) / steps.sqrt())


def text(length: int = 103) -> torch.Tensor:
    return torch.randint(VOCAB, (length,))


def log_probabilities(model: History, ids: list[int]) -> torch.Tensor:
    """Of the token after ``ids``, in float64."""
    table = model.table.weight.detach().double()
    return (table[ids].sum(dim=0) / math.sqrt(len(ids))).log_softmax(dim=0)


def reference_losses(model: History, ids: list[int], window: int, stride: int) -> list[float]:
    """Token by token: each read in the first window that holds it, unless it is the first token of that window."""
    losses, seen = [], 0
    for begin in range(0, len(ids), stride):
        for place in range(begin, min(begin + window, len(ids))):
            if place >= seen and place > begin:
                losses.append(-float(log_probabilities(model, ids[begin:place])[ids[place]]))
        seen = max(seen, min(begin + window, len(ids)))
    return losses


@pytest.mark.parametrize("length", [2, 9, 10, 11, 20, 21, 103])
@pytest.mark.parametrize("stride", [None, 1, 4, 9])
def test_each_token_is_predicted_once_from_what_its_window_holds(length, stride):
    model, ids = History(), text(length)
    found = evaluate_text(model, ids, window=10, stride=stride, batch_size=3)
    expected = reference_losses(model, ids.tolist(), 10, stride or 10)
    assert found.scores.nll.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert found.nll == pytest.approx(sum(expected) / len(expected), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.nll))
    if stride is not None:
        assert found.n_tokens == length - 1
    assert int(found.window_tokens.sum()) == found.n_tokens


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_the_batch_size_changes_no_loss(batch_size):
    model, ids = History(), text()
    one, two = (evaluate_text(model, ids, window=10, stride=4, batch_size=size) for size in (7, batch_size))
    assert torch.equal(one.scores.nll, two.scores.nll)
    assert max(model.rows) <= max(7, batch_size)


def test_windows_overlap_by_what_the_stride_leaves():
    assert list(windows_of(10, 4, 4)) == [(0, 4, 1), (4, 8, 5), (8, 10, 9)]
    assert list(windows_of(9, 4, 4)) == [(0, 4, 1), (4, 8, 5)]  # the ninth has nothing before it
    assert list(windows_of(9, 4, 2)) == [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 9, 8)]
    assert list(windows_of(3, 4, 2)) == [(0, 3, 1)]


def test_a_limit_reads_the_beginning_of_the_text():
    model, ids = History(), text()
    limited = evaluate_text(model, ids, window=10, max_tokens=33)
    assert torch.equal(limited.scores.nll, evaluate_text(model, ids[:33], window=10).scores.nll)
    assert limited.text_hash != evaluate_text(model, ids, window=10).text_hash


def compared(noise: float = 0.5, **options: int):
    reference, ids = History(), text(203)
    model = History()
    model.load_state_dict(reference.state_dict())
    with torch.no_grad():
        model.table.weight += noise * torch.randn(VOCAB, VOCAB)
    return model, reference, ids, evaluate_text(model, ids, window=10, reference=reference, **options)


@pytest.mark.parametrize("cells", [VOCAB, 5 * VOCAB, 1 << 20])
def test_divergence_and_agreement_are_those_of_the_two_distributions(cells, monkeypatch):
    monkeypatch.setattr(compare, "CELLS", cells)
    model, reference, ids, found = compared()
    kl, agrees = [], []
    for place in [place for place in range(len(ids)) if place % 10]:
        history = ids[place - place % 10 : place].tolist()
        log_p, log_q = (log_probabilities(each, history) for each in (model, reference))
        kl.append(float((log_q.exp() * (log_q - log_p)).sum()))
        agrees.append(int(log_p.argmax() == log_q.argmax()))
    assert found.kl == pytest.approx(sum(kl) / len(kl), rel=1e-5)
    assert found.top1_agreement == sum(agrees) / len(agrees)
    assert 0 < found.top1_agreement < 1
    alone = evaluate_text(reference, ids, window=10)
    assert found.gap == pytest.approx(found.nll - alone.nll, abs=1e-12)
    assert found.of_reference is not None
    assert torch.equal(found.of_reference.scores.nll, alone.scores.nll)
    assert found.of_reference.protocol() == alone.protocol() == found.protocol()


def test_a_model_beside_itself_has_no_divergence_at_all():
    model, ids = History(), text()
    found = evaluate_text(model, ids, window=10, reference=model)
    assert (found.gap, found.kl, found.top1_agreement) == (0.0, 0.0, 1.0)


def test_without_a_reference_there_is_nothing_to_compare():
    found = evaluate_text(History(), text(), window=10)
    assert (found.gap, found.kl, found.top1_agreement, found.of_reference) == (None, None, None, None)
    assert set(found.intervals(100)) == {"nll"}


def test_a_token_of_probability_zero_stays_finite():
    model, reference, _, _ = compared()
    with torch.no_grad():
        model.table.weight[:, 3] = -1e4
    found = evaluate_text(model, torch.tensor([1, 3, 2, 3]), window=2, reference=reference)
    assert 1e3 < found.nll < 1e5
    assert math.isfinite(found.kl or math.inf)
    assert found.perplexity == math.inf
    assert found.figures(None)["perplexity"] is None  # json has no infinity


def test_a_paired_interval_is_narrower_than_what_its_parts_would_give():
    *_, found = compared(noise=0.1)
    intervals = found.intervals(500)
    assert found.gap is not None
    for name, value in (("nll", found.nll), ("gap", found.gap), ("kl", found.kl)):
        low, high = intervals[name]
        assert low < value < high
    width = {name: high - low for name, (low, high) in intervals.items()}
    assert width["gap"] < width["nll"] / 3


def test_the_interval_covers_the_mean_that_the_windows_come_from_and_is_the_same_every_time():
    hits = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        sums = 3.0 * 9 + torch.randn(60, 1, generator=generator, dtype=torch.float64)
        ((low, high),) = bootstrap_intervals(sums, torch.full((60,), 9), resamples=400).tolist()
        hits += low < 3.0 < high
    assert 178 <= hits <= 199  # 95 % of 200 is 190; percentile intervals of 60 windows are a little narrow
    one, two = (bootstrap_intervals(sums, torch.full((60,), 9), seed=5) for _ in range(2))
    assert torch.equal(one, two)


def test_the_interval_of_windows_of_unequal_length_weighs_them_by_their_tokens():
    tokens = torch.tensor([100, 1])
    sums = torch.tensor([[100.0], [50.0]], dtype=torch.float64)
    ((low, high),) = bootstrap_intervals(sums, tokens, resamples=400).tolist()
    assert (low, high) == (1.0, 50.0)  # both windows the same one: 1 in 4 draws each


def test_chunks_of_draws_give_the_interval_of_all(monkeypatch):
    sums, tokens = torch.randn(50, 2, dtype=torch.float64), torch.full((50,), 7)
    whole = bootstrap_intervals(sums, tokens, resamples=300)
    monkeypatch.setattr("bitnet.evaluation.bootstrap.CELLS", 50 * 7)
    torch.testing.assert_close(bootstrap_intervals(sums, tokens, resamples=300), whole)  # a product's sum may differ


def test_figures_are_named_as_in_a_record():
    *_, found = compared()
    figures = found.figures(100)
    assert figures["gap_interval"][0] < figures["gap"] < figures["gap_interval"][1]
    assert figures["evaluation"]["predicted_tokens"] == found.n_tokens
    assert figures["evaluation"] != evaluate_text(History(), text(203), window=10, stride=5).protocol()
    assert found.figures(None)["nll_interval"] is None
    short = evaluate_text(History(), text(8), window=10).figures(100)
    assert (short["nll_interval"], short["bits_per_byte"]) == (None, None)


def test_bits_per_byte_counts_the_bytes_of_the_predicted_tokens():
    found = evaluate_text(History(), text(), window=10, bytes_per_token=4.0)
    assert found.loss.bits_per_byte == pytest.approx(found.nll / math.log(2) / 4.0)


def test_both_models_keep_their_modes_and_progress_ends_at_all_windows():
    model, reference = History(), History()
    model.train()
    reference.eval()
    steps: list[tuple[int, int]] = []
    evaluate_text(model, text(41), window=10, batch_size=3, reference=reference, progress=lambda *at: steps.append(at))
    assert (model.training, model.dropout.training, reference.training) == (True, True, False)
    assert steps == [(3, 4), (4, 4)]
    assert model.table.weight.grad is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window must be at least 2"),
        ({"window": 8, "stride": 9}, "stride must be 1 to the window's 8"),
        ({"window": 8, "stride": 0}, "stride must be 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_tokens": 1}, "at least 2 tokens, got 1"),
    ],
)
def test_sizes_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        evaluate_text(History(), text(), **options)


def test_texts_that_are_no_row_of_ids_are_refused():
    for ids in (torch.zeros(2, 5, dtype=torch.long), torch.zeros(5)):
        with pytest.raises(InputError, match="one row of whole numbers"):
            evaluate_text(History(), ids)


def test_a_model_of_nan_is_refused_and_named():
    good, bad = History(), History()
    with torch.no_grad():
        bad.table.weight[5, 5] = float("nan")
    ids = torch.full((9,), 5)
    with pytest.raises(InputError, match="the model's loss on this text is nan"):
        evaluate_text(bad, ids, window=4)
    with pytest.raises(InputError, match="the reference model's loss on this text is nan"):
        evaluate_text(good, ids, window=4, reference=bad)


def test_a_protocol_evaluates_with_its_options_and_the_data_s_block_size():
    model, ids = History(), text()
    found = TextProtocol(stride=4, max_tokens=50, compare=False).evaluate(model, ids, block_size=10, reference=model)
    assert torch.equal(found.scores.nll, evaluate_text(model, ids[:50], window=10, stride=4).scores.nll)
    assert found.kl is None
    assert TextProtocol(window=7).evaluate(model, ids, block_size=10).window == 7
    assert TextProtocol().evaluate(model, ids, block_size=10, reference=model).kl == 0


@pytest.mark.parametrize(
    "options",
    [
        {"split": "train"},
        {"window": 1},
        {"window": 8, "stride": 9},
        {"batch_size": None},
        {"batch_size": 2.0},
        {"bootstrap": 3},
        {"compare": "yes"},
        {"tasks": "arc_easy"},
        {"tasks": [3]},
    ],
)
def test_a_protocol_that_cannot_be_followed_is_refused_by_its_key(options):
    with pytest.raises(InputError, match=rf"evaluation\.{list(options)[-1]}"):
        TextProtocol(**options)


def test_protocols_keep_their_tasks_as_a_tuple():
    assert TextProtocol(tasks=["a", "b"]).tasks == ("a", "b")
    assert BlocksProtocol(tasks=["a"]).tasks == ("a",)
    assert BlocksProtocol().protocol() == {"text": "packed"}
