"""The text that every CPython carries: the language reference of ``pydoc`` and the standard library's docstrings.

About 2 MB of English about Python, there without a download, which makes it the default for a first run. A document is
a topic of the reference, or a top-level class or function with its signatures and docstrings, or a module's prose.
Sources are parsed, never imported. Patch releases of Python edit their documentation, so runs of different Pythons
read different text: the record holds the corpus's hash, and only runs of one hash belong on one axis.
"""

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bitnet.data.sources import Shard, Split, in_split

# Third-party code, tests, applications and bundled wheels: not the library's documentation.
LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "ensurepip", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo"}
)


class PyDocs:
    """Source of the running Python's own documentation; see the module's docstring."""

    name = "pydocs"
    streaming = False

    def __init__(self) -> None:
        self.skipped: dict[str, int] = {}
        self._documents: list[str] | None = None

    def shards(self, split: Split) -> list[Shard]:
        return [Shard("pydocs", partial(self._read, split))]

    def fingerprint(self) -> str:
        root, digest = _library(), hashlib.sha256(sys.version.encode())
        for path in _files(root):
            stat = path.stat()
            digest.update(f"{path.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def _read(self, split: Split) -> Iterator[str]:
        if self._documents is None:  # 2 MB, read three times: parsing the library takes seconds
            self._documents = list(dict.fromkeys([*_topics(), *_library_documents()]))
        return in_split(self._documents, split)


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*.py") if not LEFT_OUT.intersection(path.relative_to(root).parts))


def _topics() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from (topics[name].strip() for name in sorted(topics))


def _library_documents() -> Iterator[str]:
    """Documents of the library in the order of its files, each docstring once.

    A docstring that another one repeats word for word (an override, a copied class) is left out: split by the hash of a
    whole document, it would otherwise stand in training and evaluation at once.
    """
    root, seen = _library(), set[str]()
    for path in _files(root):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # a template or a file for another Python: it has no docstrings that this one can read
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        prose = _new_docstring(tree, seen)
        if prose:
            yield f"{module}\n\n{prose}"
        for node in tree.body:
            text = "\n\n".join(_described(node, seen))
            if text:
                yield text


def _described(node: ast.stmt, seen: set[str], indent: str = "") -> Iterator[str]:
    """Signature and docstring of a definition, then those of the definitions inside a class."""
    if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return
    prose = _new_docstring(node, seen)
    inner = indent + "    "
    if prose:
        heading = f"class {node.name}" if isinstance(node, ast.ClassDef) else f"{node.name}({ast.unparse(node.args)})"
        yield f"{indent}{heading}:\n" + "\n".join(inner + line if line else "" for line in prose.splitlines())
    if isinstance(node, ast.ClassDef):
        for member in node.body:
            yield from _described(member, seen, inner if prose else indent)


def _new_docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, seen: set[str]) -> str:
    text = (ast.get_docstring(node) or "").strip()
    if text in seen:
        return ""
    seen.add(text)
    return text
