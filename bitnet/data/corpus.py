"""A source opened with its tokenizer: the tokens of each split, and what the run's record says of them."""

import hashlib
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitnet.data.cache import Tokens, cached_tokens, tokens_in_memory
from bitnet.data.passages import joined_ids
from bitnet.data.sources import SPLITS, Shard, Source, Split, documents_of
from bitnet.data.tokenize import DocumentEncoder
from bitnet.data.tokenizer import TokenizerSpec, fingerprint
from bitnet.errors import InputError


class Corpus:
    """Tokenizes a source's splits: all of them into the cache, or, of a streaming source, evaluation text into memory.

    Args:
        source: Where the documents come from.
        spec: Which tokenizer reads them.
        cache_dir: Folder for trained tokenizers and token caches.
        evaluation_limit: Tokens of a streaming source's validation and test splits to read; None reads all.

    Attributes:
        tokenizer: The transformers tokenizer.
        vocab_size: One more than its largest id.
        tokenizer_hash: Its fingerprint.
        hash: SHA-256 of the text where it is read whole, of the source's fingerprint where it is streamed.
        encoder: Documents to ids.

    Raises:
        InputError: A source, tokenizer or cache that cannot be used.
    """

    def __init__(
        self, source: Source, spec: TokenizerSpec, cache_dir: Path, evaluation_limit: int | None = None
    ) -> None:
        self.source, self._limit = source, evaluation_limit
        origin = source.fingerprint()
        self.tokenizer = spec.load(lambda: documents_of(source, "train"), origin, cache_dir)
        self.vocab_size = max(self.tokenizer.get_vocab().values()) + 1
        self.tokenizer_hash = fingerprint(self.tokenizer)
        self.encoder = DocumentEncoder(self.tokenizer)
        self._tokens: dict[Split, Tokens] = {}
        if source.streaming:
            self._shards = source.shards("train")
            self.hash = hashlib.sha256(origin.encode()).hexdigest()
        else:
            self._open_caches(origin, cache_dir)
            self.hash = hashlib.sha256("".join(self._tokens[split].text_hash for split in SPLITS).encode()).hexdigest()

    def training_shards(self) -> list[Shard]:
        """What a streamed training split is read from."""
        return self._shards

    def training_tokens(self, block_size: int) -> Tokens:
        """The cached training split.

        Raises:
            InputError: It is empty, or shorter than one block.
        """
        tokens = self._tokens["train"]
        if len(tokens.ids) < block_size:
            raise InputError(
                f"the training split of {self.source.name} must hold a block of {block_size} tokens, got "
                f"{len(tokens.ids)} tokens in {len(tokens.starts)} documents: add text, or lower data.block_size"
            )
        return tokens

    def evaluation_tokens(self, split: Split) -> Tokens:
        """The validation or test split.

        Raises:
            InputError: It is empty: too few documents for a twentieth of them to be one.
        """
        if split not in self._tokens:
            self._tokens[split] = tokens_in_memory(documents_of(self.source, split), self.encoder, self._limit)
        tokens = self._tokens[split]
        if not len(tokens.ids):
            raise InputError(
                f"the {split} split of {self.source.name} must not be empty: documents go to a split by their hash, "
                "and none came here; add documents, or cut the text into more of them"
            )
        return tokens

    def joined(self, split: Split, max_tokens: int | None = None) -> Tensor:
        """The split as one text, int64 [tokens]: see `bitnet.data.passages.joined_ids`. Read from the source anew.

        Raises:
            InputError: There is nothing in it.
        """
        ids = joined_ids(documents_of(self.source, split), self.tokenizer, max_tokens=max_tokens)
        if len(ids) < 2:
            raise InputError(
                f"the {split} split of {self.source.name} must hold at least 2 tokens to predict one, got {len(ids)}: "
                "add documents"
            )
        return ids

    def first_training_ids(self, documents: int) -> Tensor:
        """The first training documents with their marks, one after the other, int64 [tokens].

        Of a streaming source no more than these documents are read.

        Raises:
            InputError: ``documents`` is below 1.
        """
        if documents < 1:
            raise InputError(f"calibration.documents must be at least 1, got {documents}")
        if self.source.streaming:
            texts = ((text, None) for text in islice(documents_of(self.source, "train"), documents))
            parts = [ids for ids, _, _ in self.encoder.encode_all(texts)]
            ids = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)
        else:
            tokens = self._tokens["train"]
            ids = tokens.ids[: tokens.starts[documents]] if documents < len(tokens.starts) else tokens.ids
        return torch.from_numpy(ids.astype(np.int64))

    def describe(self) -> dict[str, Any]:
        """Hashes, and documents, tokens and bytes of each split read so far (not of a streamed training split)."""
        return {
            "name": self.source.name,
            "corpus_hash": self.hash,
            "tokenizer_hash": self.tokenizer_hash,
            "vocab_size": self.vocab_size,
            "splits": {
                split: {"documents": len(tokens.starts), "tokens": len(tokens.ids), "bytes": tokens.n_bytes}
                for split, tokens in self._tokens.items()
            },
        }

    def _open_caches(self, origin: str, cache_dir: Path) -> None:
        key = hashlib.sha256(f"{origin} {self.tokenizer_hash}".encode()).hexdigest()[:32]
        for split in SPLITS:
            self._tokens[split] = cached_tokens(
                lambda split=split: documents_of(self.source, split),
                self.encoder,
                self.vocab_size,
                cache_dir / "tokens" / f"{self.source.name}-{key}.{split}",
            )
