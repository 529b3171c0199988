"""``python -m bitnet.report RUNS -o report/``: the page of runs and sweeps; ``wandb ...``: a dashboard on W&B."""

import argparse
import signal
import sys
from pathlib import Path

from bitnet.errors import InputError

DESCRIPTION = """\
Write one HTML page of all results below the folders named: quality against size, gaps with their intervals, errors of
layers, codes, training curves, samples, and of each result the command that made it. The page holds everything it
shows: it can be mailed, printed, and opened without a network.
"""
EPILOG = """\
  python -m bitnet.report runs -o report                everything below runs/
  python -m bitnet.report runs --apart -o report        runs of different texts too, a part of the page for each
  python -m bitnet.report wandb --help                  the same as a dashboard on Weights & Biases
"""


def main(arguments: list[str] | None = None) -> None:
    """Parse ``arguments`` (the process's own by default), write the page, and print where it is."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["wandb"]:
        from bitnet.report.workspace import main as workspace

        return workspace(arguments[1:])
    options = _parser().parse_args(arguments)
    from bitnet.report.page import write_page

    try:
        path, notes = write_page(
            options.runs, options.output, title=options.title, apart=options.apart, codes=not options.no_codes
        )
    except InputError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename or options.output}: {error.strerror or error}")
    for note in notes:
        print(note)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m bitnet.report", description=DESCRIPTION, epilog=EPILOG, formatter_class=_Verbatim
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="folder of a run or of a sweep, or a run.json"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="folder for the page (index.html), or its name in .html"
    )
    parser.add_argument("--title", help='of the page; by default "Quantization report"')
    parser.add_argument(
        "--apart", action="store_true", help="runs evaluated on different tokens: a part of the page for each"
    )
    parser.add_argument("--no-codes", action="store_true", help="do not read the exported models to count their codes")
    return parser


class _Verbatim(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description and the examples as they are."""


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that nothing half-written stays
    main()
