from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet.data import C4, Source, Text, TokenizerSpec, passages, tokenize
from bitnet.data.datamodule import TextDataModule
from bitnet.data.passages import ids_hash, joined_ids, random_windows
from bitnet.data.sources import Shard, documents_of
from bitnet.errors import InputError


@pytest.fixture(params=["text", "c4"])
def source(request: pytest.FixtureRequest) -> Source:
    return request.getfixturevalue(request.param)


@pytest.fixture
def options(tmp_path: Path, spec: TokenizerSpec) -> dict[str, Any]:
    return {"tokenizer": spec, "block_size": 32, "cache_dir": tmp_path / "cache", "validation_blocks": 1}


def test_a_joined_split_is_one_string_to_the_tokenizer(source: Source, options: dict[str, Any]) -> None:
    module = TextDataModule(source, **options)
    text = "\n\n".join(documents_of(source, "validation"))
    ids = module.joined("validation")
    assert ids.dtype == torch.int64
    assert ids.tolist() == module.tokenizer(text).input_ids
    assert ids[0] == module.tokenizer.bos_token_id
    spelt = "".join(documents_of(source, "validation")).count("<s>")
    assert (ids == module.tokenizer.bos_token_id).sum() == 1 + spelt  # none between documents
    assert len(ids) > 32  # more than validation_blocks hold


@pytest.mark.parametrize("piece", [50, 333])
def test_pieces_give_the_ids_of_the_whole(tokenizer: Any, documents: list[str], monkeypatch: Any, piece: int) -> None:
    whole = joined_ids(documents, tokenizer)
    for module in (tokenize, passages):
        monkeypatch.setattr(module, "PIECE", piece)
    assert torch.equal(joined_ids(documents, tokenizer), whole)


def test_a_limit_gives_the_first_ids_and_reads_no_further(
    tokenizer: Any, documents: list[str], monkeypatch: Any
) -> None:
    whole = joined_ids(documents, tokenizer)
    for module in (tokenize, passages):
        monkeypatch.setattr(module, "PIECE", 50)
    read = 0

    def counted() -> Iterator[str]:
        nonlocal read
        for document in documents:
            read += 1
            yield document

    assert torch.equal(joined_ids(counted(), tokenizer, max_tokens=77), whole[:77])
    assert read < 10


def test_marks_that_the_tokenizer_puts_at_the_end_stand_there_once(tokenizer: Any) -> None:
    from tokenizers import processors

    marks = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=marks
    )
    ids = joined_ids(["one", "two"], tokenizer)
    assert ids.tolist() == tokenizer("one\n\ntwo").input_ids
    assert ids[-1] == tokenizer.eos_token_id


def test_calibration_windows_are_stretches_of_the_first_documents(source: Source, options: dict[str, Any]) -> None:
    module = TextDataModule(source, **options)
    documents = list(documents_of(source, "train"))[:3]
    text = torch.cat([torch.from_numpy(ids.astype("int64")) for ids in module.corpus.encoder.encode(documents)])
    windows = module.calibration_windows(40, 20, documents=3, seed=5)
    assert windows.shape == (40, 20)
    assert windows.dtype == torch.int64
    stretches = {tuple(row) for row in text.unfold(0, 20, 1).tolist()}
    assert {tuple(row) for row in windows.tolist()} <= stretches
    assert len({tuple(row) for row in windows.tolist()}) > 20  # at random places


def test_equal_seeds_give_equal_windows_and_leave_torch_s_own_state(source: Source, options: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    one, two, other = (TextDataModule(source, **options).calibration_windows(8, 20, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert ids_hash(one) == ids_hash(two) != ids_hash(other)
    assert torch.equal(torch.get_rng_state(), before)


def test_more_documents_than_there_are_take_all(source: Source, options: dict[str, Any]) -> None:
    module = TextDataModule(source, **options)
    count = len(list(documents_of(source, "train")))
    all_of_them = module.corpus.first_training_ids(count)
    assert torch.equal(module.corpus.first_training_ids(count + 1), all_of_them)
    assert len(module.corpus.first_training_ids(count - 1)) < len(all_of_them)


def test_of_a_streamed_source_only_the_documents_asked_for_are_read(c4: C4, options: dict[str, Any]) -> None:
    module = TextDataModule(c4, **options)
    module.setup()
    given: list[str] = []
    shards = c4.shards("train")

    def counted(shard: Shard) -> Iterator[str]:
        for document in shard.read():
            given.append(document)
            yield document

    c4.shards = lambda split: [Shard(shard.name, lambda shard=shard: counted(shard)) for shard in shards]  # type: ignore
    module.calibration_windows(2, 8, documents=4)
    assert len(given) == 4


def test_every_window_can_be_the_first_or_the_last() -> None:
    windows = random_windows(torch.arange(12), 200, 10, seed=0)
    assert set(windows[:, 0].tolist()) == {0, 1, 2}
    assert torch.equal(random_windows(torch.arange(10), 3, 10, seed=0), torch.arange(10).expand(3, 10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"windows": 0, "window": 4}, r"calibration\.windows must be at least 1, got 0"),
        ({"windows": 2, "window": 0}, r"calibration\.window must be at least 1"),
        ({"windows": 2, "window": 4, "documents": 0}, r"calibration\.documents must be at least 1"),
        ({"windows": 2, "window": 10**6}, r"window of 1000000 tokens of calibration text, got \d+ tokens: raise"),
    ],
)
def test_numbers_that_cannot_be_met_are_refused(
    text: Text, options: dict[str, Any], arguments: dict[str, int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        TextDataModule(text, **options).calibration_windows(**arguments)


def test_a_hash_tells_shapes_and_orders_apart() -> None:
    ids = torch.arange(6)
    assert len({ids_hash(each) for each in (ids, ids.reshape(2, 3), ids.reshape(3, 2), ids.flip(0))}) == 4
    assert ids_hash(ids) == ids_hash(ids.int())
