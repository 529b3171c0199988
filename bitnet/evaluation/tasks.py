"""Accuracy on the tasks of EleutherAI's lm-evaluation-harness, with a model that is in memory.

The harness (extra ``eval``) is imported only here and only when a task is asked for. Its tasks are data sets of the
hub; a task of one's own is a yaml file in the harness's format, which may name local files and then needs no network.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from bitnet.errors import InputError
from bitnet.evaluation.perplexity import evaluating


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    batch_size: int = 8,
    num_fewshot: int | None = None,
    limit: int | None = None,
    max_length: int | None = None,
) -> dict[str, float]:
    """Return the harness's figures as {"task/metric": value}, standard errors as "task/metric_stderr" where it has any.

    Args:
        model: A transformers causal language model, or one whose linears were quantized in place.
        tokenizer: Its transformers tokenizer.
        tasks: Names of tasks or groups that the harness knows, or paths of yaml files.
        batch_size: Requests in a forward pass.
        num_fewshot: Worked examples before each question; None as each task says.
        limit: Only the first so many questions of each task.
        max_length: Longest request in tokens; None as the model's configuration says.

    Raises:
        InputError: lm-eval is not installed, there is no task, or it knows none of a name.
    """
    if not tasks:
        raise InputError("expected at least one task, got none: evaluation.tasks=[arc_easy]")
    if find_spec("lm_eval") is None:
        raise InputError('evaluation.tasks needs lm-eval, which is not installed: pip install "bitnet-qat[eval]"')
    from lm_eval import simple_evaluate  # type: ignore[import-not-found]
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

    manager = TaskManager()
    for task in tasks:
        if not (Path(task).is_file() if task.endswith((".yaml", ".yml")) else manager.match_tasks([task])):
            raise InputError(f"evaluation.tasks: lm-eval has no task {task!r}: lm-eval ls tasks lists them")
    with evaluating(model):
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
        found = simple_evaluate(
            harness,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=0,  # its intervals of metrics without a formula take minutes
        )
    assert found is not None  # it is None in processes other than the first
    return dict(sorted(_figures(found["results"])))


def _figures(results: dict[str, dict[str, Any]]) -> list[tuple[str, float]]:
    """The harness names a figure "metric,filter"; the filter is left out where it is the plain one."""
    return [
        (f"{task}/{name.removesuffix(',none')}", float(value))
        for task, figures in results.items()
        for name, value in figures.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "," in name
    ]
