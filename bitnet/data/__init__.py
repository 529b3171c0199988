"""Text to batches: source, split, tokenizer, tokens, fixed blocks, batches; every stage can be taken up again.

:class:`~bitnet.data.datamodule.TextDataModule` puts the stages together; it is imported from its own module, because
Lightning comes with it. Nothing here imports transformers or datasets before they are used.
"""

from bitnet.data.c4 import C4
from bitnet.data.pydocs import PyDocs
from bitnet.data.sources import Shard, Source, Split
from bitnet.data.text import Text
from bitnet.data.tokenizer import TokenizerSpec, check_vocabulary, fingerprint
from bitnet.data.wikitext import WikiText

__all__ = [
    "C4",
    "PyDocs",
    "Shard",
    "Source",
    "Split",
    "Text",
    "TokenizerSpec",
    "WikiText",
    "check_vocabulary",
    "fingerprint",
]
