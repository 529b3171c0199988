from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from bitnet.data.c4 import C4
from bitnet.data.sources import documents_of
from bitnet.errors import InputError

MakeDocument = Callable[[int], str]


def test_shards_come_in_the_order_of_their_names(c4: C4, make_document: MakeDocument) -> None:
    assert [shard.name for shard in c4.shards("train")] == [f"c4-train.0000{n}-of-00003.json.gz" for n in range(3)]
    assert list(documents_of(c4, "train")) == [make_document(number) for number in range(121)]


def test_validation_and_test_share_out_the_validation_shards(c4: C4, make_document: MakeDocument) -> None:
    validation, test = list(documents_of(c4, "validation")), list(documents_of(c4, "test"))
    assert Counter(validation + test) == Counter(make_document(1000 + number) for number in range(60))
    assert len(test) >= 5
    assert len(validation) > 2 * len(test)


def test_a_folder_without_shards_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(InputError, match=r"no c4-train\.\*\.json\.gz in .* \(it holds train\.jsonl\)"):
        C4(tmp_path).shards("train")


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.path must be a folder .* there is no such folder"):
        C4(tmp_path / "missing")


def test_a_policy_that_does_not_exist_is_refused(c4_folder: Path) -> None:
    with pytest.raises(InputError, match=r"on_bad_line must be one of error, skip, got 'drop'"):
        C4(c4_folder, on_bad_line="drop")  # pyright: ignore[reportArgumentType]


def test_fingerprint_follows_content_and_not_time(c4: C4, c4_folder: Path) -> None:
    before = c4.fingerprint()
    shard = c4_folder / "c4-train.00001-of-00003.json.gz"
    shard.touch()
    assert C4(c4_folder).fingerprint() == before
    shard.write_bytes((c4_folder / "c4-train.00000-of-00003.json.gz").read_bytes())
    assert C4(c4_folder).fingerprint() != before


def test_without_a_path_and_offline_the_hub_is_refused_at_once() -> None:
    with pytest.raises(
        InputError, match=r"allenai/c4 is on the Hugging Face hub and HF_HUB_OFFLINE is set: .*data\.path"
    ):
        C4().fingerprint()
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        C4().shards("train")
