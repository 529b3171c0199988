import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitnet.data import C4, PyDocs, Source, Text, TokenizerSpec, WikiText
from bitnet.data.batches import ENDLESS, Batch, BatchShape, CachedBatches, EvaluationBatches, StreamedBatches
from bitnet.data.corpus import Corpus
from bitnet.data.datamodule import TextDataModule
from bitnet.data.shuffle import Position
from bitnet.errors import InputError

BLOCK, ROWS = 32, 4


@pytest.fixture
def options(tmp_path: Path, spec: TokenizerSpec) -> dict[str, Any]:
    return {
        "tokenizer": spec,
        "block_size": BLOCK,
        "batch_size": ROWS,
        "seed": 3,
        "cache_dir": tmp_path / "cache",
        "validation_blocks": None,
    }


@pytest.fixture(params=["text", "c4"])
def source(request: pytest.FixtureRequest) -> Source:
    """A source that is cached and one that is streamed."""
    return request.getfixturevalue(request.param)


def consumed(module: TextDataModule, count: int) -> list[Batch]:
    return [module.consume(batch) for batch in islice(module.train_dataloader(), count)]


def same(one: list[Batch], two: list[Batch]) -> bool:
    return len(one) == len(two) and all(torch.equal(a[key], b[key]) for a, b in zip(one, two, strict=True) for key in a)


def test_a_batch_is_ids_and_labels(source: Source, options: dict[str, Any]) -> None:
    (batch,) = consumed(TextDataModule(source, **options), 1)
    assert sorted(batch) == ["input_ids", "labels"]
    assert batch["input_ids"].shape == (ROWS, BLOCK)
    assert batch["input_ids"].dtype == torch.int64
    assert torch.equal(batch["labels"], batch["input_ids"])


def test_isolated_documents_come_with_positions(source: Source, options: dict[str, Any]) -> None:
    module = TextDataModule(source, **options, isolate_documents=True)
    (batch,) = consumed(module, 1)
    begin = batch["input_ids"] == module.tokenizer.bos_token_id
    assert begin.any()
    assert (batch["position_ids"][begin] == 0).all()
    assert (batch["labels"][begin] == -100).all()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 4, 45])  # 45: the third epoch of the smaller corpus
def test_batches_go_on_where_a_state_was_taken(
    source: Source, options: dict[str, Any], workers: int, stop: int
) -> None:
    options["num_workers"] = workers
    straight = consumed(TextDataModule(source, **options), stop + 6)
    first = TextDataModule(source, **options)
    assert same(consumed(first, stop), straight[:stop])
    second = TextDataModule(source, **options)
    second.load_state_dict(first.state_dict())
    assert same(consumed(second, 6), straight[stop:])


def test_batches_that_were_prepared_but_not_consumed_do_not_count(source: Source, options: dict[str, Any]) -> None:
    module = TextDataModule(source, **options, num_workers=2)
    batches = iter(module.train_dataloader())
    expected = [next(batches) for _ in range(6)]
    module.consume(expected[0])
    module.consume(expected[1])
    resumed = next(iter(module.train_dataloader()))
    assert torch.equal(resumed["input_ids"], expected[2]["input_ids"])


def test_the_state_is_small_and_plain(source: Source, options: dict[str, Any]) -> None:
    module = TextDataModule(source, **options)
    consumed(module, 3)
    state = module.state_dict()
    assert len(repr(state)) < 600
    file = options["cache_dir"] / "state.pt"
    torch.save(state, file)
    assert torch.load(file, weights_only=True) == state


def test_the_cached_state_is_the_number_of_samples(text: Text, options: dict[str, Any]) -> None:
    module = TextDataModule(text, **options)
    consumed(module, 5)
    assert module.state_dict()["consumed"] == {"samples": 5 * ROWS}


def test_making_a_loader_leaves_the_random_state_alone(source: Source, options: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    consumed(TextDataModule(source, **options, num_workers=2), 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 16}, r"made with data\.block_size 32 and this run has 16"),
        ({"seed": 4}, r"made with data\.seed 3 and this run has 4"),
        ({"tokenizer": TokenizerSpec(vocab_size=300)}, "made with tokenizer_hash"),
    ],
)
def test_a_state_of_other_data_is_refused(
    source: Source, options: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    state = TextDataModule(source, **options).state_dict()
    with pytest.raises(InputError, match=message):
        TextDataModule(source, **options | change).load_state_dict(state)


def test_a_state_of_other_text_is_refused(text: Text, options: dict[str, Any], tmp_path: Path) -> None:
    state = TextDataModule(text, **options).state_dict()
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(f"other text {number}" for number in range(300)))
    with pytest.raises(InputError, match="made with corpus_hash"):
        TextDataModule(Text(other), **options).load_state_dict(state)


def test_a_streamed_state_of_another_worker_count_is_refused(c4: C4, options: dict[str, Any]) -> None:
    state = TextDataModule(c4, **options, num_workers=2).state_dict()
    with pytest.raises(InputError, match=r"made with data\.num_workers 2 and this run has 1"):
        TextDataModule(c4, **options).load_state_dict(state)


def test_a_cached_state_goes_on_with_another_batch_size_and_worker_count(text: Text, options: dict[str, Any]) -> None:
    first = TextDataModule(text, **options)
    consumed(first, 3)
    second = TextDataModule(text, **options | {"batch_size": 2}, num_workers=1)
    second.load_state_dict(first.state_dict())
    rows = torch.cat([batch["input_ids"] for batch in consumed(second, 4)])
    assert torch.equal(rows, torch.cat([batch["input_ids"] for batch in consumed(first, 2)]))


def rows_of(batches: Iterator[Batch], count: int) -> list[tuple[int, ...]]:
    return [tuple(row) for batch in islice(batches, count) for row in batch["input_ids"].tolist()]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_out_a_cached_epoch(text: Text, options: dict[str, Any], world_size: int) -> None:
    corpus = Corpus(text, options["tokenizer"], options["cache_dir"])
    tokens, shape = corpus.training_tokens(BLOCK), BatchShape(BLOCK, 1, pad=0, isolate_documents=False)
    blocks = len(tokens.ids) // BLOCK
    seen: Counter[tuple[int, ...]] = Counter()
    for rank in range(world_size):
        batches = CachedBatches(tokens, shape, seed=0, samples=0, rank=rank, world_size=world_size)
        seen.update(rows_of(iter(batches), len(range(rank, blocks, world_size))))
    assert seen == Counter(tuple(row) for row in tokens.ids[: blocks * BLOCK].reshape(-1, BLOCK).tolist())


def test_a_new_epoch_has_a_new_order(text: Text, options: dict[str, Any]) -> None:
    corpus = Corpus(text, options["tokenizer"], options["cache_dir"])
    tokens, shape = corpus.training_tokens(BLOCK), BatchShape(BLOCK, 1, pad=0, isolate_documents=False)
    blocks = len(tokens.ids) // BLOCK
    rows = rows_of(iter(CachedBatches(tokens, shape, seed=0, samples=0)), 2 * blocks)
    assert rows[:blocks] != rows[blocks:]
    assert Counter(rows[:blocks]) == Counter(rows[blocks:])


@pytest.mark.parametrize("world_size", [1, 2, 5])  # five readers of three shards: documents are shared out
def test_streaming_ranks_lose_and_repeat_no_document(
    c4: C4, options: dict[str, Any], world_size: int, make_document: Any
) -> None:
    corpus = Corpus(c4, options["tokenizer"], options["cache_dir"])
    shape = BatchShape(8, 1, pad=0, isolate_documents=False)
    tokens: list[int] = []
    for rank in range(world_size):
        batches = StreamedBatches(
            c4.shards("train"),
            corpus.encoder,
            shape,
            seed=0,
            streams=[Position()],
            rank=rank,
            world_size=world_size,
            skipped={},
        )
        for batch in batches:
            tokens += batch["input_ids"][0].tolist()
            if batch["state"]["position"]["epoch"] == 1:
                break
        begin = [index for index, token in enumerate(tokens) if token == corpus.tokenizer.bos_token_id]
        del tokens[begin[-1] :]  # of the next epoch
    begin = [index for index, token in enumerate(tokens) if token == corpus.tokenizer.bos_token_id]
    seen = Counter(tuple(tokens[one:two]) for one, two in pairwise([*begin, len(tokens)]))
    assert seen == Counter(tuple(ids.tolist()) for ids in corpus.encoder.encode([make_document(n) for n in range(121)]))


def test_evaluation_holds_every_token_once(source: Source, options: dict[str, Any]) -> None:
    module = TextDataModule(source, **options)
    batches = list(module.val_dataloader())
    labels = torch.cat([batch["labels"].flatten() for batch in batches])
    tokens = module.corpus.evaluation_tokens("validation")
    assert labels[labels != -100].tolist() == tokens.ids.tolist()
    assert len(batches) == len(module.val_dataloader())
    assert module.bytes_per_token == tokens.n_bytes / len(tokens.ids)


def test_evaluation_ranks_share_out_the_blocks(text: Text, options: dict[str, Any]) -> None:
    corpus = Corpus(text, options["tokenizer"], options["cache_dir"])
    shape = BatchShape(BLOCK, 3, pad=0, isolate_documents=False)
    tokens = corpus.evaluation_tokens("validation")
    whole = rows_of(iter(EvaluationBatches(tokens, shape, blocks=None)), 999)
    ranks = [EvaluationBatches(tokens, shape, blocks=None, rank=rank, world_size=2) for rank in range(2)]
    with_targets = [[batch for batch in rank if (batch["labels"] != -100).any()] for rank in ranks]
    assert Counter(row for rank in with_targets for row in rows_of(iter(rank), 999)) == Counter(whole)


@pytest.mark.parametrize("blocks", [1, 3, 4, 7])
def test_evaluation_ranks_have_equally_many_batches(text: Text, options: dict[str, Any], blocks: int) -> None:
    corpus = Corpus(text, options["tokenizer"], options["cache_dir"])
    shape = BatchShape(BLOCK, 3, pad=0, isolate_documents=False)
    tokens = corpus.evaluation_tokens("validation")
    ranks = [EvaluationBatches(tokens, shape, blocks=blocks, rank=rank, world_size=2) for rank in range(2)]
    assert len({len(list(rank)) for rank in ranks} | {len(rank) for rank in ranks}) == 1


def test_evaluation_stops_at_the_limit(source: Source, options: dict[str, Any]) -> None:
    module = TextDataModule(source, **options | {"validation_blocks": 5})
    assert sum(len(batch["input_ids"]) for batch in module.val_dataloader()) == 5


def test_no_text_is_in_two_splits(text: Text, options: dict[str, Any]) -> None:
    module = TextDataModule(text, **options)
    texts = []
    for tokens in (
        module.corpus.training_tokens(BLOCK),
        module.corpus.evaluation_tokens("validation"),
        module.corpus.evaluation_tokens("test"),
    ):
        texts.append({module.tokenizer.decode(part.tolist()) for part in np.split(tokens.ids, tokens.starts[1:])})
    assert not texts[0] & texts[1]
    assert not texts[0] & texts[2]
    assert not texts[1] & texts[2]
    assert sum(map(len, texts)) == 300


def test_the_record_says_what_the_data_was(source: Source, options: dict[str, Any]) -> None:
    module = TextDataModule(source, **options, path="somewhere")
    said = module.describe()
    assert said["name"] == source.name
    assert said["path"] == "somewhere"
    assert said["corpus_hash"] == TextDataModule(source, **options).corpus_hash
    assert said["splits"]["validation"]["tokens"] > said["splits"]["validation"]["documents"] > 0
    assert said["skipped_lines"] == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_lines_are_counted_and_reported(c4_folder: Path, options: dict[str, Any], workers: int) -> None:
    import gzip

    for shard in c4_folder.glob("c4-train*"):
        shard.write_bytes(shard.read_bytes() + gzip.compress(b'{"text": null}\n'))
    module = TextDataModule(C4(c4_folder, on_bad_line="skip"), **options, num_workers=workers)
    consumed(module, 80)  # two epochs: a line counts once
    assert module.describe()["skipped_lines"] == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_line_in_the_middle_of_training_is_one_readable_error(
    c4_folder: Path, options: dict[str, Any], workers: int
) -> None:
    import gzip

    module = TextDataModule(C4(c4_folder), **options, num_workers=workers)
    module.setup()
    shard = c4_folder / "c4-train.00002-of-00003.json.gz"
    shard.write_bytes(shard.read_bytes() + gzip.compress(b'{"text": null}\n'))
    with pytest.raises(InputError, match=r"^c4-train\.00002-of-00003\.json\.gz:42: expected") as caught:
        consumed(module, 80)
    assert "\n" not in str(caught.value)


def test_an_empty_corpus_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n")
    with pytest.raises(InputError, match="text"):
        TextDataModule(Text(tmp_path / "empty.txt"), **options).setup()


def test_a_corpus_smaller_than_a_block_is_refused(text: Text, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"must hold a block of 1000000 tokens, got \d+ tokens in \d+ documents"):
        TextDataModule(text, **options | {"block_size": 1_000_000}).setup()


def test_a_corpus_of_one_document_has_no_validation_and_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("word " * 1000)
    with pytest.raises(InputError, match="the validation split of text must not be empty"):
        TextDataModule(Text(tmp_path / "one.txt"), **options).setup()


@pytest.mark.parametrize("size", [{"block_size": 1}, {"batch_size": 0}, {"num_workers": -1}, {"validation_blocks": 0}])
def test_a_size_that_is_too_small_is_refused(text: Text, options: dict[str, Any], size: dict[str, int]) -> None:
    with pytest.raises(InputError, match=rf"data\.{next(iter(size))} must be at least"):
        TextDataModule(text, **options | size)


def test_the_training_loader_has_a_length(text: Text, options: dict[str, Any]) -> None:
    assert len(TextDataModule(text, **options).train_dataloader()) == ENDLESS


@pytest.mark.slow
def test_a_line_of_fifty_megabytes_is_read(options: dict[str, Any], tmp_path: Path) -> None:
    import resource

    path = tmp_path / "long.txt"
    path.write_text("\n\n".join(f"text {number}" for number in range(100)) + "\n\n" + "some words " * 4_700_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    module = TextDataModule(Text(path), **options)
    module.setup()
    tokens = module.corpus.training_tokens(BLOCK)
    assert len(tokens.ids) > 5_000_000
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 700, f"{grown:.0f} MiB for a line of 50"


@pytest.mark.parametrize("kind", [PyDocs, C4, WikiText])
def test_sources_have_a_name_and_a_mode(kind: type[Any]) -> None:
    assert isinstance(kind.name, str)
    assert kind.streaming == (kind is C4)


def test_importing_the_package_loads_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys, bitnet.data; "
        "print([name for name in ('lightning', 'transformers', 'datasets', 'tokenizers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
