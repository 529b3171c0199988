"""Checkpoint files: whole or absent, refused when damaged, and refused for another model or tokenizer."""

import errno
import random
import warnings

import pytest
import torch
from toy_training import ToyData, ToyLanguageModel, toy_module, toy_trainer

from bitnet.errors import InputError
from bitnet.training import AtomicCheckpointIO, LastAndBest


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weight": torch.randn(200, 100), "step": 3}, path)
    return path


def test_what_was_saved_comes_back(saved):
    loaded = AtomicCheckpointIO().load_checkpoint(saved)
    assert loaded["step"] == 3
    assert loaded["weight"].shape == (200, 100)


def test_a_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"got .*nowhere.ckpt, which does not exist"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "nowhere.ckpt")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_checkpoint_is_refused_by_name(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=r"last.ckpt is truncated or damaged"):
        AtomicCheckpointIO().load_checkpoint(saved)


@pytest.mark.parametrize("seed", range(30))
def test_a_flipped_bit_never_loads_as_another_weight(saved, seed):
    expected = AtomicCheckpointIO().load_checkpoint(saved)["weight"]
    content = bytearray(saved.read_bytes())
    content[random.Random(seed).randrange(len(content))] ^= 1 << (seed % 8)
    saved.write_bytes(bytes(content))
    try:
        loaded = AtomicCheckpointIO().load_checkpoint(saved)["weight"]
    except InputError as error:
        assert "last.ckpt is truncated or damaged" in str(error)  # noqa: PT017
    else:
        assert torch.equal(loaded, expected)  # it hit the padding between entries


def test_a_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"state": random.Random(0)}, tmp_path / "evil.ckpt")
    with pytest.raises(InputError, match="could run code"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "evil.ckpt")


def test_a_full_disk_leaves_the_last_good_file(saved, monkeypatch):
    before = saved.read_bytes()
    monkeypatch.setattr("bitnet.training.checkpoint.open", _open_on_a_full_disk, raising=False)
    with pytest.raises(InputError, match=r"cannot write the checkpoint .*last.ckpt: No space left on device"):
        AtomicCheckpointIO().save_checkpoint({"weight": torch.randn(300, 300)}, saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def _open_on_a_full_disk(path, mode):
    path.touch()
    return open("/dev/full", mode)


def test_an_error_in_the_middle_of_writing_is_the_same(saved, monkeypatch):
    before = saved.read_bytes()

    def half(checkpoint, file):
        file.write(b"half")
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(InputError, match="quota"):
        AtomicCheckpointIO().save_checkpoint({}, saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def _fit(root, steps, *, resume=None, fingerprint="a" * 64, **options):
    module = toy_module(**options)
    module.tokenizer_fingerprint = fingerprint
    trainer = toy_trainer(root, steps, [LastAndBest()], enable_checkpointing=True)
    trainer.fit(module, datamodule=ToyData(), ckpt_path=resume)
    return root / "checkpoints/last.ckpt"


def test_a_checkpoint_of_another_tokenizer_is_refused(tmp_path):
    last = _fit(tmp_path, 1)
    with pytest.raises(InputError, match=r"trained with tokenizer a{12}, this run has b{12}"):
        _fit(tmp_path, 2, resume=last, fingerprint="b" * 64)


def test_a_checkpoint_of_another_shape_is_refused_in_one_line(tmp_path):
    last = _fit(tmp_path, 1)
    with pytest.raises(InputError, match=r"embedding.weight is \[23, 16\] there and \[23, 24\] here") as caught:
        _fit(tmp_path, 2, resume=last, model=ToyLanguageModel(width=24))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_layer_is_refused(tmp_path):
    last = _fit(tmp_path, 1)
    model = ToyLanguageModel()
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"extra.weight is absent there and \[2, 2\] here"):
        _fit(tmp_path, 2, resume=last, model=model)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    last = _fit(tmp_path, 1)
    checkpoint = torch.load(last, weights_only=True)
    del checkpoint["bitnet"]
    torch.save(checkpoint, last)
    with pytest.raises(InputError, match="expected a training checkpoint of format 1, got none"):
        _fit(tmp_path, 2, resume=last)


def test_another_number_of_threads_is_said_in_words(tmp_path):
    last = _fit(tmp_path, 1)
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["bitnet"]["threads"] = 64
    torch.save(checkpoint, last)
    with pytest.warns(UserWarning, match="written with 64 threads, this run has 1: .* not bit for bit"):
        _fit(tmp_path, 2, resume=last)


def test_a_checkpoint_that_fits_says_nothing(tmp_path):
    last = _fit(tmp_path, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*(does not have many workers|__len__|epoch ended|srun).*")
        _fit(tmp_path, 2, resume=last)
