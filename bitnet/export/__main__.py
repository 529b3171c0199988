"""``python -m bitnet.export RUN_OR_DIR --to gguf --type TQ2_0``: write a model that exists in another format."""

import argparse
import signal
import sys
from pathlib import Path

from bitnet.errors import InputError
from bitnet.export.protocol import ExportError

DESCRIPTION = """\
Write a model in another format. PATH is the folder of a run, a packed or Hugging Face folder, or a .gguf file.
Codes and scales are carried over as they are, never computed again; what was written is read back and compared
before it gets its name. A format that cannot carry the model says why.
"""
EPILOG = """\
  python -m bitnet.export runs/NAME --check                        which formats does it fit?
  python -m bitnet.export runs/NAME --to gguf --type TQ2_0         for llama.cpp
  python -m bitnet.export runs/NAME --to hf --weights bitlinear    packed codes for transformers
"""


def main(arguments: list[str] | None = None) -> None:
    """Parse ``arguments`` (the process's own by default), write, and print what was written."""
    options = _parser().parse_args(arguments)
    try:
        if not options.check and options.to is None:
            raise InputError("name a format with --to, or ask which ones fit with --check")
        if options.threads is not None and options.threads < 1:
            raise InputError(f"--threads must be at least 1, got {options.threads}")
        _quiet(options.threads)
        print(_checked(options) if options.check else _written(options))
    except (InputError, ExportError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename or options.output or 'the output'}: {error.strerror or error}")


def _parser() -> argparse.ArgumentParser:
    from bitnet.export.writing import FORMATS, options_of

    parser = argparse.ArgumentParser(
        "python -m bitnet.export", description=DESCRIPTION, epilog=EPILOG, formatter_class=_Verbatim
    )
    parser.add_argument("path", metavar="PATH", type=Path, help="what to export")
    parser.add_argument("--to", choices=list(FORMATS), help="the format to write")
    parser.add_argument("-o", "--output", type=Path, help="where to; by default beside PATH, or in the run's folder")
    parser.add_argument("--check", action="store_true", help="write nothing: say which formats the model fits, and why")
    parser.add_argument("--threads", type=int, help="CPU threads; by default torch's own choice")
    parser.add_argument("--no-tokenizer", action="store_true", help="write the model alone")
    group = parser.add_argument_group("options of the formats")
    owners: dict[str, list[str]] = {}
    for name in FORMATS:
        for option, default in options_of(name).items():
            owners.setdefault(option, []).append(f"{name} (default {default})")
    for option, used in owners.items():
        group.add_argument(f"--{option.replace('_', '-')}", dest=f"option_{option}", help="of " + ", ".join(used))
    return parser


def _written(options: argparse.Namespace) -> str:
    from bitnet.export.reading import load
    from bitnet.export.writing import describe, exporter

    given = {key.removeprefix("option_"): value for key, value in vars(options).items() if key.startswith("option_")}
    target = exporter(options.to, **{key: value for key, value in given.items() if value is not None})
    loaded = load(options.path)
    output = options.output or _default_output(options.path, target.filename)
    tokenizer = None if options.no_tokenizer else loaded.tokenizer
    done = target.write(loaded.model, tokenizer, output, loaded.record)
    return describe(done)


def _checked(options: argparse.Namespace) -> str:
    from rich.console import Console

    from bitnet.export.doctor import diagnose, diagnosis_table
    from bitnet.export.reading import load

    loaded = load(options.path)
    console = Console()
    tokenizer = None if options.no_tokenizer else loaded.tokenizer
    with console.capture() as text:
        console.print(diagnosis_table(diagnose(loaded.model, tokenizer), f"{options.path} ({loaded.format})"))
    return text.get().rstrip()


def _default_output(path: Path, filename: str) -> Path:
    """In a run's folder, or beside the folder or file that was read."""
    from bitnet.export.reading import RUN

    path = path.resolve()  # "." has no name to go beside

    if (path / RUN).is_file():
        return path / filename
    return path.with_name(f"{path.stem if path.is_file() else path.name}-{filename}")


def _quiet(threads: int | None) -> None:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)


class _Verbatim(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description and the examples as they are."""


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that nothing half-written stays
    main()
