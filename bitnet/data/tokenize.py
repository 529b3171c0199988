"""Documents to arrays of token ids, each between its begin and end marks, in batches for speed.

A text that spells out a mark (``</s>`` in a web page) is encoded as those characters, never as the mark: no document
can end itself. A very long document is encoded in pieces, cut where a space follows a visible character. Byte-level
BPE never merges across such a place, so the ids are the same and the memory is bounded.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from bitnet.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Place = TypeVar("Place")
Ids = NDArray[np.uint32]

PIECE = 100_000  # characters encoded at once, of one document: tokenizers takes about 100 bytes of memory for each
GROUP = 250_000  # characters of documents encoded together; more was not faster


class DocumentEncoder:
    """Encodes documents as ``<s> ... </s>``, or ``... </s>`` where the tokenizer has no begin mark of its own.

    Raises:
        InputError: The tokenizer has no end-of-text token.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        from tokenizers import Tokenizer

        begin, end = cast("int | None", tokenizer.bos_token_id), cast("int | None", tokenizer.eos_token_id)
        if end is None:
            raise InputError(
                "the tokenizer must have an end-of-text token (eos_token) to mark where documents end, and has none: "
                "choose another data.tokenizer.path, or set eos_token in its tokenizer_config.json"
            )
        self.end = end
        self._before = [] if begin is None or begin == end else [begin]
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # a copy, whose switches we may set
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()

    def encode(self, documents: Sequence[str]) -> list[Ids]:
        """The ids of each document, marks included."""
        short = [document if len(document) <= PIECE else "" for document in documents]
        encodings = self._backend.encode_batch_fast(short, add_special_tokens=False)
        return [
            self._marked([encoding.ids] if len(document) <= PIECE else map(self._piece, pieces(document)))
            for document, encoding in zip(documents, encodings, strict=True)
        ]

    def _piece(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def _marked(self, parts: Iterable[list[int]]) -> Ids:
        return np.concatenate([np.array(part, dtype=np.uint32) for part in (self._before, *parts, [self.end])])

    def encode_all(self, documents: Iterable[tuple[str, Place]]) -> Iterator[tuple[Ids, str, Place]]:
        """(ids, document, place) for each (document, place), read ahead by one group of documents."""
        group: list[tuple[str, Place]] = []
        characters = 0
        for document, place in documents:
            group.append((document, place))
            characters += len(document)
            if characters >= GROUP:
                yield from self._encode_group(group)
                group, characters = [], 0
        yield from self._encode_group(group)

    def _encode_group(self, group: list[tuple[str, Place]]) -> Iterator[tuple[Ids, str, Place]]:
        for ids, (document, place) in zip(self.encode([document for document, _ in group]), group, strict=True):
            yield ids, document, place


def pieces(document: str) -> Iterator[str]:
    """Cut a document into pieces of at most ``PIECE`` characters that together give its ids."""
    begin = 0
    while len(document) - begin > PIECE:
        end = _boundary(document, begin + PIECE)
        yield document[begin:end]
        begin = end
    yield document[begin:]


def _boundary(document: str, near: int) -> int:
    """The last place before ``near`` where a space follows a visible character; ``near`` if a long stretch has none."""
    for place in range(near, near - PIECE // 2, -1):
        if document[place] == " " and not document[place - 1].isspace():
            return place
    return near
