from io import StringIO

import torch
from rich.console import Console
from toy_models import tiny_llama

from bitnet.ptq import GPTQ, quantize
from bitnet.ptq.progress import ConsoleProgress


def test_a_pipe_gets_a_line_a_block_with_its_error(text):
    out = StringIO()
    quantize(tiny_llama(), GPTQ(), text, progress=ConsoleProgress(Console(file=out, width=100)))
    lines = out.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["block 1/2", "block 2/2"]
    assert all("mean error" in line and "left" in line for line in lines)


def test_a_terminal_gets_a_bar_with_layer_error_and_time_left(text):
    out = StringIO()
    console = Console(file=out, width=140, force_terminal=True)
    quantize(tiny_llama(), GPTQ(), text, progress=ConsoleProgress(console))
    assert "2/2" in out.getvalue()
    assert "down_proj" in out.getvalue()
    assert "left" in out.getvalue()


def test_blocks_of_an_earlier_start_are_said_to_be(text, tmp_path):
    quantize(tiny_llama(), GPTQ(), text, directory=tmp_path / "j")
    out = StringIO()
    progress = ConsoleProgress(Console(file=out, width=100))
    quantize(tiny_llama(), GPTQ(), text, directory=tmp_path / "j", progress=progress)
    assert out.getvalue().count("taken from the earlier start") == 2


def test_nothing_is_told_by_default(text, capsys):
    torch.manual_seed(0)
    quantize(tiny_llama(), GPTQ(), text)
    assert capsys.readouterr() == ("", "")
