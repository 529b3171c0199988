import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

from bitnet.data.pack import Block, batch_of, packed_blocks
from bitnet.data.shuffle import Position

LENGTHS = [3, 10, 1, 8, 2, 25, 7, 16]


def documents_of(lengths: list[int]) -> list[tuple[NDArray[np.int64], Position]]:
    begins = np.cumsum([0, *lengths])
    return [(np.arange(begins[n], begins[n] + length), Position(document=n)) for n, length in enumerate(lengths)]


@pytest.mark.parametrize("block_size", [2, 5, 8, 72])
def test_blocks_hold_every_token_in_order(block_size: int) -> None:
    blocks = [block for block, _ in packed_blocks(documents_of(LENGTHS), block_size)]
    assert np.array_equal(np.concatenate([block.ids for block in blocks]), np.arange(72 // block_size * block_size))


def test_blocks_know_where_documents_begin() -> None:
    blocks = [block for block, _ in packed_blocks(documents_of(LENGTHS), 8)]
    found = [8 * index + int(start) for index, block in enumerate(blocks) for start in block.starts]
    assert found == np.cumsum([0, *LENGTHS])[:-1].tolist()


@pytest.mark.parametrize("block_size", [2, 5, 8])
def test_packing_goes_on_from_every_position(block_size: int) -> None:
    documents = documents_of(LENGTHS)
    straight = list(packed_blocks(documents, block_size))
    for index, (_, position) in enumerate(straight):
        resumed = list(packed_blocks(documents[position.document :], block_size, position.token))
        assert [place for _, place in resumed] == [place for _, place in straight[index + 1 :]]
        for (block, _), (expected, _) in zip(resumed, straight[index + 1 :], strict=True):
            assert np.array_equal(block.ids, expected.ids)
            assert np.array_equal(block.starts, expected.starts)


def test_labels_are_the_ids_and_a_short_block_is_filled_up() -> None:
    blocks = [Block(np.array([5, 6, 7, 8]), np.array([1])), Block(np.array([9, 4]), np.array([], dtype=np.int64))]
    batch = batch_of(blocks, 4, pad=1, isolate_documents=False)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 4, 1, 1]]
    assert batch["labels"].tolist() == [[5, 6, 7, 8], [9, 4, -100, -100]]
    assert {key: value.dtype for key, value in batch.items()} == {"input_ids": torch.int64, "labels": torch.int64}


def test_isolated_documents_restart_positions_and_drop_their_first_label() -> None:
    batch = batch_of([Block(np.arange(10, 18), np.array([2, 3, 6]))], 8, pad=1, isolate_documents=True)
    assert batch["position_ids"].tolist() == [[0, 1, 0, 0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[10, 11, -100, -100, 14, 15, -100, 17]]


def test_transformers_keeps_attention_inside_isolated_documents() -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, use_cache=False
    )
    model = LlamaForCausalLM(config).eval()
    ids = np.array([3, 4, 5, 6, 7, 8, 9, 10])
    batch = batch_of([Block(ids, np.array([0, 3]))], 8, pad=1, isolate_documents=True)
    together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    alone = model(input_ids=batch["input_ids"][:, 3:]).logits
    joined = model(input_ids=batch["input_ids"]).logits
    torch.testing.assert_close(together[:, 3:], alone, atol=1e-6, rtol=0)
    assert (joined[:, 3:] - alone).abs().max() > 1e-4, "the test cannot fail"
