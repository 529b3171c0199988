"""Resuming inside a real Lightning training: the weights, and so the batches in their order, are bit-identical."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from bitnet.data import Source, TokenizerSpec
from bitnet.data.datamodule import TextDataModule

STEPS = 12
# Lightning's own; nothing else is let through, so the loaders draw no remark about workers, samplers or lengths.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")


class Toy(lightning.LightningModule):
    """Two layers; keeps the ids of every batch it trained on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Embedding(400, 16), torch.nn.Linear(16, 400))
        self.seen: list[torch.Tensor] = []

    def _loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        assert sorted(batch) == ["input_ids", "labels"], "the state did not leave the batch"
        logits = self.layers(batch["input_ids"][:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        self.seen.append(batch["input_ids"])
        return self._loss(batch)

    def validation_step(self, batch: dict[str, torch.Tensor], _: int) -> None:
        self._loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


@pytest.fixture(params=["text", "c4"])
def source(request: pytest.FixtureRequest) -> Source:
    return request.getfixturevalue(request.param)


class Saving(lightning.Callback):
    """Saves once after five steps: at the end of the fifth, or, as Ctrl-C may, amid the sixth."""

    def __init__(self, path: Path, moment: str) -> None:
        self.path, self.moment = path, moment

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if self.moment == "after" and trainer.global_step == 5 and not self.path.exists():
            trainer.save_checkpoint(self.path)

    def on_before_optimizer_step(self, trainer: lightning.Trainer, *_: Any) -> None:
        if self.moment == "within" and trainer.global_step == 5:
            trainer.save_checkpoint(self.path)


def train(module: TextDataModule, resume: Path | None = None, accumulate: int = 1, callbacks: Any = None) -> Toy:
    toy = Toy()
    lightning.Trainer(
        max_steps=STEPS,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=callbacks,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=1,
        accumulate_grad_batches=accumulate,
    ).fit(toy, datamodule=module, ckpt_path=None if resume is None else str(resume))
    return toy


@pytest.fixture
def module(source: Source, spec: TokenizerSpec, tmp_path: Path) -> Callable[..., TextDataModule]:
    return partial(TextDataModule, source, spec, block_size=32, batch_size=4, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_training_equals_an_uninterrupted_one(
    module: Callable[..., TextDataModule], tmp_path: Path, workers: int, accumulate: int
) -> None:
    path = tmp_path / "after.ckpt"
    straight = train(module(num_workers=workers), accumulate=accumulate, callbacks=[Saving(path, "after")])
    resumed = train(module(num_workers=workers), resume=path, accumulate=accumulate)
    assert len(straight.seen) == STEPS * accumulate
    for expected, batch in zip(straight.seen[5 * accumulate :], resumed.seen, strict=True):
        assert torch.equal(expected, batch)
    for expected, weight in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, weight)


def test_a_batch_whose_step_was_cut_off_comes_again(module: Callable[..., TextDataModule], tmp_path: Path) -> None:
    path = tmp_path / "within.ckpt"
    straight = train(module(), callbacks=[Saving(path, "within")])
    resumed = module()
    resumed.load_state_dict(torch.load(path, weights_only=True)["TextDataModule"])
    assert torch.equal(next(iter(resumed.train_dataloader()))["input_ids"], straight.seen[5])
