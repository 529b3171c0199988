"""A training of adapters: its checkpoints hold what is trained, resume to the same bits, and refuse another base."""

import pytest
import torch
from toy_training import ToyData, ToyLanguageModel, toy_module, toy_trainer

from bitnet.errors import InputError
from bitnet.nn import LatentLoRA
from bitnet.training import LastAndBest, adamw
from bitnet.training.frozen import frozen_weights

STEPS = 8
TRAINED = {
    *(f"model.{name}.parametrizations.weight.0.{part}" for name in ("up", "down") for part in "ab"),
    "model.norm.weight",
    "model.head.bias",
}


def _run(root, *, until=STEPS, resume=None, base=3):
    torch.manual_seed(base)
    model = ToyLanguageModel(dropout=0.2)
    LatentLoRA(rank=4)(model)
    module = toy_module(STEPS, model=model)
    trainer = toy_trainer(
        root, until, [LastAndBest()], enable_checkpointing=True, val_check_interval=4, limit_val_batches=3
    )
    torch.manual_seed(99)
    trainer.fit(module, datamodule=ToyData(), ckpt_path=resume)
    return module


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    root = tmp_path_factory.mktemp("stopped")
    _run(root, until=5)
    return root / "checkpoints/last.ckpt"


def test_a_resumed_run_ends_in_the_same_bits(tmp_path, stopped):
    straight, resumed = _run(tmp_path).state_dict(), _run(tmp_path / "resumed", resume=stopped).state_dict()
    assert straight.keys() == resumed.keys()
    for name, weight in straight.items():
        assert torch.equal(weight, resumed[name]), name


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(stopped):
    assert torch.load(stopped, weights_only=True)["state_dict"].keys() == TRAINED


def test_a_base_of_other_weights_is_refused(tmp_path, stopped):
    with pytest.raises(InputError, match=r"those of this model are others than it was trained with: resume with"):
        _run(tmp_path, resume=stopped, base=4)


def test_without_adapters_nothing_is_left_out():
    model = ToyLanguageModel()
    model.embedding.requires_grad_(False)
    assert frozen_weights(model) == {}


def test_adapters_decay_and_the_base_is_in_no_group():
    model = ToyLanguageModel()
    LatentLoRA(rank=4)(model)
    optimizer = adamw(model, lr=1e-3, weight_decay=0.1)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    settings = {f"model.{name}": decay[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert settings == {name: 0.1 if "parametrizations" in name else 0.0 for name in TRAINED}
    assert len(decay) == len(settings)


def test_adapters_learn():
    torch.manual_seed(7)
    model, losses = ToyLanguageModel(), list[float]()
    LatentLoRA(rank=4, head=True, embeddings=True)(model)
    optimizer = adamw(model, lr=3e-2, weight_decay=0.0)
    for batch in ToyData(40).train_dataloader():
        ids = batch["input_ids"]
        loss = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < sum(losses[:5]) - 1
