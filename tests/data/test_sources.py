from collections import Counter

from bitnet.data.sources import SPLITS, in_split, split_of


def test_splits_are_a_partition_of_the_documents(documents: list[str]) -> None:
    found = [document for split in SPLITS for document in in_split(documents, split)]
    assert Counter(found) == Counter(documents)


def test_about_nine_tenths_go_to_training_and_the_rest_in_halves() -> None:
    shares = Counter(split_of(f"text {number}") for number in range(20_000))
    assert abs(shares["train"] - 18_000) < 200
    assert abs(shares["validation"] - 1_000) < 150
    assert abs(shares["test"] - 1_000) < 150


def test_a_documents_split_depends_on_its_text_alone() -> None:
    pinned = {"a": "train", "text 3": "train", "naïve": "test", "text 22": "test"}  # a change moves text between splits
    assert {text: split_of(text) for text in pinned} == pinned


def test_white_space_is_no_document() -> None:
    assert list(in_split(["", " \n\t ", "x"], split_of("x"))) == ["x"]


def test_a_lone_surrogate_has_a_split() -> None:
    assert split_of("\ud800 broken") in ("train", "validation", "test")
