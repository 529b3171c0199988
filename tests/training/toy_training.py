"""A tiny causal language model with ternary layers and dropout, and a data module that resumes exactly."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from lightning import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from bitnet.nn import BitLinear158
from bitnet.training import AtomicCheckpointIO, LanguageModelingModule, RandomState, adamw, constant

VOCABULARY = 23


class ToyLanguageModel(nn.Module):
    """Embedding, two ternary layers around a squared ReLU, dropout, a head: what a token says of the next one."""

    def __init__(self, width: int = 16, vocabulary: int = VOCABULARY, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.norm = nn.RMSNorm(width)
        self.up = BitLinear158(width, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.down = BitLinear158(2 * width, width)
        self.head = nn.Linear(width, vocabulary, bias=True)
        self.calls: list[dict[str, Any]] = []

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool = True) -> Any:
        hidden = self.embedding(input_ids)
        hidden = hidden + self.down(self.dropout(self.up(self.norm(hidden)).relu().square()))
        return SimpleNamespace(logits=self.head(hidden))


class _Blocks(IterableDataset):
    """Block number n is a pure function of n."""

    def __init__(self, data: "ToyData", first: int, number: int) -> None:
        self.data, self.first, self.number = data, first, number

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        start = self.data.consumed if self.first == 0 else self.first
        for n in range(start, self.first + self.number):
            ids = torch.randint(0, self.data.vocabulary, (4, 8), generator=torch.Generator().manual_seed(n))
            ids[:, 1::2] = (ids[:, ::2] + 1) % self.data.vocabulary  # something to learn
            yield {"input_ids": ids, "labels": ids.clone(), "number": torch.tensor(n)}


class ToyData(LightningDataModule):
    """Counts the batches that were trained on, and goes on after them."""

    def __init__(self, length: int = 10_000, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.length, self.vocabulary, self.consumed = length, vocabulary, 0

    def train_dataloader(self) -> DataLoader:
        return DataLoader(_Blocks(self, 0, self.length), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(_Blocks(self, 1_000_000, 3), batch_size=None)

    def on_before_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        if self.trainer is not None and self.trainer.training:
            self.consumed = int(batch["number"]) + 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"consumed": self.consumed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.consumed = state_dict["consumed"]


def toy_module(total_steps: int = 12, **options: Any) -> LanguageModelingModule:
    torch.manual_seed(7)
    return LanguageModelingModule(
        options.pop("model", None) or ToyLanguageModel(),
        options.pop("optimizer", None) or (lambda model: adamw(model, lr=1e-2, weight_decay=0.1)),
        options.pop("schedule", None) or constant(),
        total_steps,
        **options,
    )


def toy_trainer(root: Any, max_steps: int = 12, callbacks: Any = (), **options: Any) -> Trainer:
    settings = {
        "max_steps": max_steps,
        "accelerator": "cpu",
        "devices": 1,
        "gradient_clip_val": 1.0,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": None,
        "limit_val_batches": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
        "plugins": [AtomicCheckpointIO()],
        "default_root_dir": root,
    }
    return Trainer(**(settings | options), callbacks=[RandomState(), *callbacks])
