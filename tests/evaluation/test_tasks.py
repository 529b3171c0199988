import json
from pathlib import Path

import pytest
import torch

from bitnet.errors import InputError
from bitnet.evaluation.tasks import evaluate_tasks

TASK = """
task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["red", "green"]
doc_to_target: label
metric_list:
  - metric: acc
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Eight questions about colours, in a file of one's own: no network."""
    lines = [{"question": f"Thing {number} is", "label": number % 2} for number in range(8)]
    (tmp_path / "colours.jsonl").write_text("\n".join(map(json.dumps, lines)))
    path = tmp_path / "colours.yaml"
    path.write_text(TASK.format(file=tmp_path / "colours.jsonl"))
    return path


@pytest.mark.filterwarnings("default")  # the harness's own
def test_a_task_of_one_s_own_is_evaluated_offline(task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    from transformers import LlamaConfig, LlamaForCausalLM

    from bitnet.data import TokenizerSpec

    tokenizer = TokenizerSpec(vocab_size=258).load(lambda: ["red and green things"], "colours", tmp_path)
    config = LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    model.train()
    figures = evaluate_tasks(model, tokenizer, [str(task)])
    assert figures["colours/acc"] in [right / 8 for right in range(9)]
    assert figures == evaluate_tasks(model, tokenizer, [str(task)])
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every byte equally likely: the shorter answer wins, which every second one is
    assert evaluate_tasks(model, tokenizer, [str(task)])["colours/acc"] == 0.5
    assert model.training
    with pytest.raises(InputError, match="no task 'colors'"):
        evaluate_tasks(model, tokenizer, ["colors"])


def test_a_missing_harness_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnet.evaluation.tasks.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "bitnet-qat\[eval\]"'):
        evaluate_tasks(torch.nn.Linear(2, 2), None, ["arc_easy"])
    with pytest.raises(InputError, match="at least one task"):
        evaluate_tasks(torch.nn.Linear(2, 2), None, [])
