"""The hub's reader on local files: ``load_dataset("json", ...)`` streams them by the same code as the hub's."""

import gzip
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader, IterableDataset

from bitnet.data import hub
from bitnet.data.hub import HubDataset, open_stream, stream_shards, text_documents
from bitnet.data.sources import Shard
from bitnet.errors import InputError


def shards_of(paths: list[Path], skipped: dict[str, int] | None = None, on_bad_line: Any = "error") -> list[Shard]:
    stream = open_stream("json", data_files=[str(path) for path in paths], split="train")
    read = partial(text_documents, skipped={} if skipped is None else skipped, on_bad_line=on_bad_line)
    return stream_shards(stream, "hub", read)


class InWorker(IterableDataset[str]):
    def __init__(self, shard: Shard) -> None:
        self.shard = shard

    def __iter__(self) -> Iterator[str]:
        return self.shard.read()


@pytest.fixture
def paths(c4_folder: Path) -> list[Path]:
    return sorted(c4_folder.glob("c4-train*"))


def test_a_file_is_a_shard_and_can_be_read_again(paths: list[Path], make_document: Callable[[int], str]) -> None:
    shards = shards_of(paths)
    for _ in range(2):
        assert [list(shard.read()) for shard in shards] == [
            [make_document(number) for number in numbers] for numbers in (range(50), range(50, 80), range(80, 121))
        ]


def test_a_data_worker_reads_all_of_a_shard(paths: list[Path]) -> None:
    shard = shards_of(paths)[1]
    loader = DataLoader(InWorker(shard), batch_size=None, num_workers=2)
    assert sorted(loader) == sorted([*shard.read(), *shard.read()]), "datasets shared the shard out among the workers"


def test_a_row_without_text_is_named_or_skipped(tmp_path: Path) -> None:
    path = tmp_path / "s.json.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n{"text": null}\n{"text": "b"}\n'))
    with pytest.raises(InputError, match=r"hub\[0\]:2: expected a string"):
        list(shards_of([path])[0].read())
    skipped: dict[str, int] = {}
    assert list(shards_of([path], skipped, "skip")[0].read()) == ["a", "b"]
    assert skipped == {"hub[0]": 1}


def test_a_missing_column_does_not_pass_for_no_text(tmp_path: Path) -> None:
    path = tmp_path / "s.json.gz"
    path.write_bytes(gzip.compress(b'{"body": "a"}\n'))
    with pytest.raises(InputError, match=r'hub\[0\]:1: expected a string in "text"'):
        list(shards_of([path])[0].read())


def test_what_datasets_cannot_read_is_one_clear_error(tmp_path: Path, paths: list[Path]) -> None:
    damaged = tmp_path / "c4-train.json.gz"
    damaged.write_bytes(paths[0].read_bytes()[:-30])
    with pytest.raises(InputError, match=r"json: `datasets` cannot read on .* data\.path"):
        shards_of([damaged])
    with pytest.raises(InputError, match=r"hub\[1\]: `datasets` cannot read on .* data\.path"):
        list(shards_of([paths[0], damaged])[1].read())


def test_an_unreachable_hub_is_a_quick_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: Any, timeout: float, **__: Any) -> None:
        assert timeout == hub.HUB_TIMEOUT <= 10
        raise Exception("no route")  # no type of its own: each version of the hub's library has another

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    with pytest.raises(InputError, match=r"not answer for allenai/c4 \(Exception\).*data\.path.*HF_HUB"):
        HubDataset("allenai/c4", "en").commit()
