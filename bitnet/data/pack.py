"""Token streams to fixed blocks, and blocks to batches.

Documents follow one another without padding; a document that does not fit goes on in the next block. What is left over
at the end of a block is not stored anywhere: the position of the next token (document and offset in it) is enough to
encode that document again and go on.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitnet.data.shuffle import Position

IGNORED = -100  # the label that cross entropy leaves out


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive tokens, and the places among them where documents begin."""

    ids: NDArray[Any]
    starts: NDArray[np.int64]


def packed_blocks(
    documents: Iterable[tuple[NDArray[Any], Position]], block_size: int, first_token: int = 0
) -> Iterator[tuple[Block, Position]]:
    """Full blocks of ``block_size`` tokens, each with the position of the token that follows it.

    Args:
        documents: Token ids of each document with its position.
        block_size: Tokens in a block.
        first_token: Tokens of the first document to leave out: those that blocks before a resume have held.
    """
    ids, starts, filled = np.empty(block_size, dtype=np.uint32), list[int](), 0
    for document, position in documents:
        taken, first_token = first_token, 0
        while taken < len(document):
            if taken == 0:
                starts.append(filled)
            count = min(block_size - filled, len(document) - taken)
            ids[filled : filled + count] = document[taken : taken + count]
            filled, taken = filled + count, taken + count
            if filled == block_size:
                yield Block(ids, np.array(starts, dtype=np.int64)), replace(position, token=taken)
                ids, starts, filled = np.empty(block_size, dtype=np.uint32), [], 0


def batch_of(blocks: Sequence[Block], block_size: int, *, pad: int, isolate_documents: bool) -> dict[str, Tensor]:
    """A batch of blocks: ``input_ids`` and ``labels``, int64 [len(blocks), block_size].

    ``labels`` equal ``input_ids``: whoever computes the loss shifts by one. A block shorter than ``block_size`` (the
    end of an evaluation split) is filled with ``pad``, labelled -100, so that every token of the text stands in one
    block.

    With ``isolate_documents`` there are also ``position_ids``, int64 of the same shape, which start again at 0 with
    each document. transformers derives from them a mask that keeps attention inside a document (where no cache is in
    use), and the first token of a document, which nothing before it can predict, is labelled -100.
    """
    ids = torch.full((len(blocks), block_size), pad, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    positions = torch.arange(block_size).repeat(len(blocks), 1)
    for row, block in enumerate(blocks):
        length = len(block.ids)
        ids[row, :length] = torch.from_numpy(block.ids.astype(np.int64))
        labels[row, :length] = ids[row, :length]
        if isolate_documents:
            labels[row, block.starts] = IGNORED
            positions[row] -= _nearest_start(block.starts, block_size)
    batch = {"input_ids": ids, "labels": labels}
    return batch | {"position_ids": positions} if isolate_documents else batch


def _nearest_start(starts: NDArray[np.int64], length: int) -> Tensor:
    """For each place in a block where its document begins, seen from inside the block."""
    nearest = np.zeros(length, dtype=np.int64)
    nearest[starts] = starts
    return torch.from_numpy(np.maximum.accumulate(nearest))
