"""Token ids outside batches: a split as one continuous text to evaluate on, windows of training text to calibrate on.

Published perplexities are taken of a split joined into one string: documents follow each other after a blank line,
without marks between them, and only the tokenizer's own marks stand at its ends. The string is never held whole: it is
encoded in pieces, cut where byte-level BPE merges nothing (`bitnet.data.tokenize`), so the ids are those of one call.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bitnet.data.tokenize import PIECE, pieces
from bitnet.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

SEPARATOR = "\n\n"


def joined_ids(
    documents: Iterable[str], tokenizer: "PreTrainedTokenizerFast", *, max_tokens: int | None = None
) -> Tensor:
    """Return the ids of all documents joined by a blank line, int64 [n], with the marks that the tokenizer adds itself.

    The ids are those of ``tokenizer(text)``, so that figures compare with those of other programs: a document that
    spells out a mark gives the mark, unlike in training batches. With ``max_tokens`` the first so many ids; no more
    documents are read than they take.
    """
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # a copy, whose switches we may set
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False  # of 250,876 tokens of C4 validation text it makes two ``</s>``, not 250,880
    before, after = _own_marks(backend)
    parts, count = [before], len(before)
    for piece in _joined_pieces(documents):
        if max_tokens is not None and count >= max_tokens:
            break
        parts.append(backend.encode(piece, add_special_tokens=False).ids)
        count += len(parts[-1])
    else:
        parts.append(after)
    return torch.from_numpy(np.concatenate([np.array(part, dtype=np.int64) for part in parts]))[:max_tokens]


def random_windows(ids: Tensor, windows: int, window: int, *, seed: int) -> Tensor:
    """Return ``windows`` stretches of ``window`` consecutive ids, int64 [windows, window], at random places.

    The places are drawn independently (two windows may overlap) from a generator of their own.

    Raises:
        InputError: a number is below 1, or there are fewer ids than one window takes.
    """
    for name, value in (("windows", windows), ("window", window)):
        if value < 1:
            raise InputError(f"calibration.{name} must be at least 1, got {value}")
    if len(ids) < window:
        raise InputError(
            f"expected at least one window of {window} tokens of calibration text, got {len(ids)} tokens: raise "
            "calibration.documents, or lower calibration.window"
        )
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(len(ids) - window + 1, (windows,), generator=generator)
    return ids[places[:, None] + torch.arange(window)]


def ids_hash(ids: Tensor) -> str:
    """Return the SHA-256 of the ids and their shape, as 64 hexadecimal digits: equal for equal text, on any machine."""
    digest = hashlib.sha256(repr(tuple(ids.shape)).encode())
    digest.update(ids.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _joined_pieces(documents: Iterable[str]) -> Iterator[str]:
    """`bitnet.data.tokenize.pieces` of the joined text, from a buffer that holds little more than one document."""
    buffer = ""
    for number, document in enumerate(documents):
        buffer += SEPARATOR + document if number else document
        if len(buffer) > PIECE:
            *whole, buffer = pieces(buffer)
            yield from whole
    if buffer:
        yield buffer


def _own_marks(backend: "Tokenizer") -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts in front of a text and after it."""
    encoding = backend.encode("a", add_special_tokens=True)
    text = [index for index, special in enumerate(encoding.special_tokens_mask) if not special]
    return encoding.ids[: text[0]], encoding.ids[text[-1] + 1 :]
