"""C4, the web text that BitNet b1.58 was trained on: a local folder of its shards, or the hub's ``allenai/c4``.

``path`` set means the folder only; unset means the hub only; neither ever stands in for the other. C4 has no test
split: a share of its validation documents, chosen by hash, is set apart as the test split and never evaluated as
validation. Published figures are of all of them: ``test_share=0``.
"""

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bitnet.data.hub import HubDataset, stream_shards, text_documents
from bitnet.data.jsonlines import read_json_lines
from bitnet.data.sources import OnBadLine, Shard, Split, check_choice, hash_share
from bitnet.errors import InputError

TEST_SHARE = 0.2
HEAD_BYTES = 4096  # of each shard, in the fingerprint


class C4:
    """Source of C4's English text.

    Args:
        path: Folder with ``c4-train.*.json.gz`` and ``c4-validation.*.json.gz``; None streams ``allenai/c4``.
        on_bad_line: ``error`` stops at a line that is not a JSON object with a string in ``text``, naming shard and
            line; ``skip`` leaves it out and counts it.
        test_share: of the validation documents, set apart as the test split; 0 leaves that empty.

    Raises:
        InputError: ``path`` is no folder; ``test_share`` outside [0, 1).
    """

    name = "c4"
    streaming = True

    def __init__(
        self, path: str | Path | None = None, on_bad_line: OnBadLine = "error", test_share: float = TEST_SHARE
    ) -> None:
        check_choice("data.source.on_bad_line", on_bad_line, ("error", "skip"))
        self.path = None if path is None else Path(path)
        if self.path is not None and not self.path.is_dir():
            raise InputError(
                f"data.path must be a folder of C4 shards (c4-train.*.json.gz), got {path}: there is no such folder"
            )
        if not 0 <= test_share < 1:
            raise InputError(f"data.source.test_share must be at least 0 and below 1, got {test_share}")
        self.on_bad_line: OnBadLine = on_bad_line
        self._test_share = test_share
        self.skipped: dict[str, int] = {}
        self._hub = HubDataset("allenai/c4", "en")

    def shards(self, split: Split) -> list[Shard]:
        stored = "train" if split == "train" else "validation"
        whole = self._hub_shards(stored) if self.path is None else self._local_shards(stored)
        if split == "train":
            return whole
        return [Shard(shard.name, partial(_carve, shard, split, self._test_share)) for shard in whole]

    def fingerprint(self) -> str:
        cut = "" if self._test_share == TEST_SHARE else f" test {self._test_share}"
        return self._text_fingerprint() + cut

    def _text_fingerprint(self) -> str:
        if self.path is None:
            return f"{self._hub.repository}/{self._hub.config}@{self._hub.commit()}"
        digest = hashlib.sha256()
        for path in [*self._files("train"), *self._files("validation")]:
            with path.open("rb") as shard:
                head = shard.read(HEAD_BYTES)
            digest.update(f"{path.name} {path.stat().st_size} {hashlib.sha256(head).hexdigest()}\n".encode())
        return digest.hexdigest()

    def _files(self, split: str) -> list[Path]:
        assert self.path is not None
        found = sorted(self.path.glob(f"c4-{split}.*.json.gz"))
        if not found:
            there = sorted(entry.name for entry in self.path.iterdir())[:5]
            raise InputError(
                f"no c4-{split}.*.json.gz in {self.path} (it holds {', '.join(there) or 'nothing'}): set data.path to "
                "the folder that holds C4's shards under their own names"
            )
        return found

    def _local_shards(self, split: str) -> list[Shard]:
        read = partial(read_json_lines, skipped=self.skipped, on_bad_line=self.on_bad_line)
        return [Shard(path.name, partial(read, path)) for path in self._files(split)]

    def _hub_shards(self, split: str) -> list[Shard]:
        read = partial(text_documents, skipped=self.skipped, on_bad_line=self.on_bad_line)
        return stream_shards(self._hub.stream(split), f"c4-{split}", read)


def _carve(shard: Shard, split: Split, test_share: float) -> Iterator[str]:
    for document in shard.read():
        if (hash_share(document) < test_share) == (split == "test"):
            yield document
