"""Weights & Biases, without an account too.

The mode is settled before ``wandb.init``, which would otherwise ask for a key on the terminal, or wait for a server
that it cannot reach. Without a key or a server the run is written to its folder, whole, and uploaded later if at all.
"""

import netrc
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from bitnet.errors import InputError
from bitnet.report.loggers import require

if TYPE_CHECKING:
    from lightning.pytorch.loggers import WandbLogger

SERVER = "https://api.wandb.ai"
REACH_SECONDS = 5.0


def wandb_logger(
    run_dir: Path,
    *,
    kind: str = "run",
    project: str = "bitnet",
    group: str | None = None,
    name: str | None = None,
    tags: Sequence[str] = (),
    offline: bool = False,
) -> "WandbLogger":
    """Log to W&B, in ``run_dir/wandb``; offline where ``offline`` is set, or there is no key or no server.

    Runs stand together by ``group`` (the method's name) and, inside it, by ``kind`` (dense, qat, ptq: W&B's job type).

    Says in one line why a run is offline and how to upload it. ``WANDB_MODE`` in the environment may
    take a run offline or disable it, and cannot force one online.

    Raises:
        InputError: wandb is not installed, or the netrc file cannot be read.
    """
    require("wandb", extra="wandb")
    from lightning.pytorch.loggers import WandbLogger

    run_dir.mkdir(parents=True, exist_ok=True)
    mode, reason = _mode(offline)
    if mode == "offline":
        print(f"W&B is offline ({reason}). To upload the run afterwards: wandb sync {run_dir}/wandb/offline-run-*")
    # Lightning's own ``offline=True`` sets WANDB_MODE for the whole process; ``mode`` holds for this run alone.
    return WandbLogger(
        save_dir=run_dir,
        project=project,
        name=name or "/".join(run_dir.parts[-2:]),
        group=group,
        job_type=kind,
        tags=[kind, *tags],
        mode=mode,
    )


def _mode(offline: bool) -> tuple[str, str]:
    """Return W&B's mode and, where it is offline, the reason."""
    if os.environ.get("WANDB_MODE") == "disabled":
        return "disabled", ""
    if os.environ.get("WANDB_MODE") in ("offline", "dryrun"):
        return "offline", "WANDB_MODE says so"
    if offline:
        return "offline", "as configured"
    server = os.environ.get("WANDB_BASE_URL", SERVER)
    if not has_key(server):
        return "offline", "no key: wandb login, or WANDB_API_KEY, gives one"
    if problem := unreachable(server):
        return "offline", f"{server} cannot be reached: {problem}"
    return "online", ""


def has_key(server: str) -> bool:
    """Whether the environment or the netrc file holds a key for ``server``.

    Raises:
        InputError: the netrc file cannot be read.
    """
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(urlsplit(server).netloc) is not None
    except FileNotFoundError:
        return False
    except (netrc.NetrcParseError, OSError) as error:
        raise InputError(f"{path} was to be searched for a W&B key and cannot be read: {error}") from error


def unreachable(server: str) -> str | None:
    """Return why the server does not answer (any HTTP status is an answer), or None. Honours the proxy variables."""
    try:
        urllib.request.urlopen(server, timeout=REACH_SECONDS).close()
    except urllib.error.HTTPError as error:
        error.close()
    except OSError as error:  # URLError and timeouts are OSErrors
        return str(error)
    return None
