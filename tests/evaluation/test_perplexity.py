import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bitnet.errors import InputError
from bitnet.evaluation import LossSummary, evaluate_loss


class Bigrams(nn.Module):
    """Logits are a table's row for each token: a language model whose loss is easy to compute by hand."""

    def __init__(self, vocab: int = 17, scale: float = 3.0) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, vocab)
        nn.init.normal_(self.table.weight, std=scale)
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, use_cache: bool = True):
        assert not use_cache  # transformers ignores positions that restart when its cache is on
        logits = self.dropout(self.table(input_ids))
        if position_ids is not None:
            logits = logits * (1 + position_ids[..., None])
        return SimpleNamespace(logits=logits)


def random_batches(sizes: list[tuple[int, int]], vocab: int = 17) -> list[dict[str, torch.Tensor]]:
    batches = []
    for shape in sizes:
        input_ids = torch.randint(vocab, shape)
        labels = input_ids.masked_fill(torch.rand(shape) < 0.2, -100)
        batches.append({"input_ids": input_ids, "labels": labels})
    return batches


def reference_loss(model: Bigrams, batches: list[dict[str, torch.Tensor]]) -> tuple[float, int]:
    """Token by token, in float64."""
    table = model.table.weight.detach().double()
    nll, count = 0.0, 0
    for batch in batches:
        for row, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            for before, label in zip(row[:-1], labels[1:], strict=True):
                if label != -100:
                    nll -= float(table[before, label] - torch.logsumexp(table[before], 0))
                    count += 1
    return nll, count


def test_loss_is_the_mean_over_tokens_and_not_over_batches():
    model = Bigrams()
    batches = random_batches([(4, 32), (1, 3), (2, 9)])
    nll, count = reference_loss(model, batches)
    loss = evaluate_loss(model, batches)
    assert loss.n_tokens == count
    assert loss.nll_sum == pytest.approx(nll, rel=1e-6)  # float32 log-softmax, float64 sum
    assert loss.perplexity == pytest.approx(math.exp(nll / count), rel=1e-5)


def test_a_token_of_probability_zero_gives_a_large_finite_loss():
    model = Bigrams(scale=1.0)
    with torch.no_grad():
        model.table.weight[:, 3] = -1e4  # exp(-1e4) is 0 in float64 too
    batch = {"input_ids": torch.tensor([[1, 3, 2]]), "labels": torch.tensor([[1, 3, 2]])}
    loss = evaluate_loss(model, [batch])
    assert 1e4 < loss.nll_sum < 1.1e4
    assert loss.perplexity == math.inf  # 5000 nats a token
    assert LossSummary(5000.0, 10).perplexity == pytest.approx(math.exp(500))


def test_position_ids_reach_the_model():
    model = Bigrams()
    plain = random_batches([(2, 8)])[0]
    placed = {**plain, "position_ids": torch.arange(8).expand(2, 8)}
    assert evaluate_loss(model, [plain]).nll != evaluate_loss(model, [placed]).nll


def test_bits_per_byte_counts_the_bytes_of_the_predicted_tokens():
    model = Bigrams()
    batches = random_batches([(2, 8)])
    loss = evaluate_loss(model, batches, bytes_per_token=4.0)
    assert loss.bits_per_byte == pytest.approx(loss.nll / math.log(2) / 4.0)
    assert evaluate_loss(model, batches).bits_per_byte is None


def test_every_module_keeps_its_mode_and_no_gradient_appears():
    model = Bigrams()
    model.train()
    model.table.eval()
    evaluate_loss(model, random_batches([(2, 8)]))
    assert (model.training, model.table.training, model.dropout.training) == (True, False, True)
    assert model.table.weight.grad is None


def test_modes_come_back_after_a_failure():
    model = Bigrams()
    with pytest.raises(KeyError, match="labels"):
        evaluate_loss(model, [{"input_ids": torch.zeros(1, 4, dtype=torch.long)}])
    assert model.training


def test_dropout_is_off_so_that_two_evaluations_agree():
    model = Bigrams()
    batches = random_batches([(2, 8)])
    assert evaluate_loss(model, batches) == evaluate_loss(model, batches)


def test_only_the_first_batches_count_where_a_limit_is_set():
    model = Bigrams()
    batches = random_batches([(2, 8), (2, 8), (2, 8)])
    assert evaluate_loss(model, batches, max_batches=2) == evaluate_loss(model, batches[:2])


def test_nothing_to_predict_is_refused():
    batch = {"input_ids": torch.zeros(2, 1, dtype=torch.long), "labels": torch.zeros(2, 1, dtype=torch.long)}
    for batches in ([], [batch]):
        with pytest.raises(InputError, match="at least one token"):
            evaluate_loss(Bigrams(), batches)


def test_a_model_of_nan_is_refused():
    model = Bigrams()
    with torch.no_grad():
        model.table.weight[5, 5] = float("nan")
    batch = {"input_ids": torch.full((1, 4), 5), "labels": torch.full((1, 4), 5)}
    with pytest.raises(InputError, match="nan"):
        evaluate_loss(model, [batch])
