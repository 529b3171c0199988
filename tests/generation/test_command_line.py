"""``python -m bitnet.generate``: text on standard output, everything else on standard error."""

import io
import json
import os
import re
import subprocess
import sys

import pytest
from text_models import byte_level, quantized
from transformers import PreTrainedTokenizerBase

from bitnet.export import PackedExporter
from bitnet.export.reading import Loaded
from bitnet.generate import Sampling, complete, main

MODEL, TOKENIZER = quantized("bitnet", packed=True, context=400), byte_level()
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}assistant:"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "weights").write_bytes(b"0" * 10**6)
    return tmp_path


@pytest.fixture
def run(folder):
    """The command on a model that needs no file."""

    def run(*arguments: str, tokenizer: PreTrainedTokenizerBase | None = TOKENIZER) -> int:
        return main([str(folder), *arguments], lambda path: Loaded(MODEL, tokenizer, path, "packed"))

    return run


def chatting() -> PreTrainedTokenizerBase:
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_standard_output_is_the_text_alone_and_figures_go_to_standard_error(run, capsys):
    assert run("Die Katze", "--temperature", "0", "--max-new-tokens", "12") == 0
    found = capsys.readouterr()
    assert found.out == complete(MODEL, TOKENIZER, "Die Katze", Sampling(temperature=0, max_new_tokens=12)).text + "\n"
    assert re.fullmatch(
        r"\[packed, 1\.0 MB, loaded in \d+\.\d\d s \| prompt: 7 tokens, \d+\.\d tokens/s \| "
        r"text: 12 tokens, \d+\.\d tokens/s, ended by --max-new-tokens\]\n",
        found.err,
    )


def test_every_option_reaches_the_sampling(run, capsys):
    options = {"max_new_tokens": 9, "temperature": 1.5, "top_k": 40, "top_p": 0.8, "repetition_penalty": 1.3, "seed": 7}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert run("a", *flags, "--stop", "x", "--stop", "yy", "--quiet") == 0
    found = capsys.readouterr()
    assert found.out == complete(MODEL, TOKENIZER, "a", Sampling(**options, stop=("x", "yy"))).text + "\n"
    assert found.err == ""


def test_a_graph_is_refused_where_there_is_no_gpu_and_none_can_be_asked_for(run, capsys):
    assert run("a", "--graph") == 1
    assert "error: a CUDA graph needs a model whose steps can be replayed; here the model is on cpu" in (
        capsys.readouterr().err
    )
    assert run("a", "--no-graph", "--max-new-tokens", "2") == 0


def test_a_minus_reads_the_prompt_from_standard_input(run, capsys, monkeypatch):
    run("Die\nKatze", "--seed", "3", "--max-new-tokens", "9")
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("Die\nKatze\n"))
    assert run("-", "--seed", "3", "--max-new-tokens", "9") == 0
    assert capsys.readouterr().out == expected


def test_standard_input_that_is_no_text_is_refused(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    assert run("-") == 1
    assert "standard input is not text in utf-8" in capsys.readouterr().err


def test_lines_of_a_conversation_that_are_no_text_are_refused(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8"))
    assert run("--chat", tokenizer=chatting()) == 1
    assert re.fullmatch("> error: standard input is not text in utf-8: .*\n", capsys.readouterr().err)


def test_json_holds_the_text_and_its_figures(run, capsys):
    assert run("a", "--json", "--max-new-tokens", "5", "--quiet") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == complete(MODEL, TOKENIZER, "a", Sampling(max_new_tokens=5)).text
    assert (found["new_tokens"], found["finish"]) == (5, "length")


def test_chat_answers_one_message(run, capsys):
    tokenizer = chatting()
    assert run("Hi", "--chat", "--system", "Be kind", "--max-new-tokens", "9", tokenizer=tokenizer) == 0
    prompt = tokenizer.encode("<s>system: Be kinduser: Hiassistant:", add_special_tokens=False)
    expected = complete(MODEL, tokenizer, prompt, Sampling(max_new_tokens=9)).text
    assert capsys.readouterr().out == expected + "\n"


def test_a_conversation_goes_on_and_reads_only_what_is_new(run, capsys, monkeypatch):
    tokenizer = chatting()
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nYou\n"))
    assert run("--chat", "--max-new-tokens", "9", "--temperature", "0", tokenizer=tokenizer) == 0
    found = capsys.readouterr()
    prompts = [int(each) for each in re.findall(r"prompt: (\d+) tokens", found.err)]
    assert len(prompts) == 2
    first = tokenizer.encode("<s>user: Hiassistant:", add_special_tokens=False)
    answer = complete(MODEL, tokenizer, first, Sampling(max_new_tokens=9, temperature=0)).text
    assert found.out.startswith(answer + "\n")
    second = tokenizer.encode(f"<s>user: Hiassistant:{answer}user: Youassistant:", add_special_tokens=False)
    assert prompts[1] < len(second) - 10  # where the answer's text is cut into other tokens, it is read again


def test_an_interrupt_ends_with_what_was_written(run, capsys, monkeypatch):
    said = []

    def interrupted(text="", end="\n", file=None, flush=False):
        said.append((file, text))
        if len(said) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", interrupted)
    assert run("a") == 130
    assert "ended by interruption" in said[-1][1]
    assert said[-1][0] is sys.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a prompt"),
        (["a", "--temperature", "-1"], "temperature must be 0"),
        (["a", "--top-p", "0"], "top_p must be above 0"),
        (["a", "--top-k", "-3"], "top_k must be 0"),
        (["a", "--threads", "0"], "--threads must be at least 1"),
        (["a", "--stop", ""], "stop must be texts"),
        (["a", "--chat"], "no chat template"),
        (["--chat"], "no chat template"),
        (["a", "--system", "b"], "add --chat"),
        (["a" * 400], "context is 400"),
        (["a\udcff"], "no text, at character 1"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(run, capsys, arguments, message):
    assert run(*arguments) == 1
    found = capsys.readouterr()
    assert found.out == ""
    assert re.fullmatch(f"error: .*{re.escape(message)}.*\n", found.err)


def test_a_rounded_head_is_asked_for_and_said(folder, capsys):
    model = quantized("bitnet", packed=True)
    load = lambda path: Loaded(model, TOKENIZER, path, "packed")  # noqa: E731
    assert main([str(folder), "a", "--head", "int8", "--max-new-tokens", "3"], load) == 0
    assert capsys.readouterr().err.startswith("[packed, head rounded to int8, ")
    assert type(model.lm_head).__name__ == "DigitLinear"


def test_a_model_without_a_tokenizer_is_refused(run, capsys):
    assert run("a", tokenizer=None) == 1
    assert "has no tokenizer" in capsys.readouterr().err


def test_what_an_export_wrote_is_read_and_written_on(tmp_path, capsys):
    PackedExporter().write(MODEL, TOKENIZER, tmp_path / "packed")
    capsys.readouterr()
    assert main([str(tmp_path / "packed"), "Die Katze", "--max-new-tokens", "9", "--temperature", "0"]) == 0
    found = capsys.readouterr()
    assert found.out == complete(MODEL, TOKENIZER, "Die Katze", Sampling(temperature=0, max_new_tokens=9)).text + "\n"
    assert found.err.startswith("[packed")


def test_a_path_without_a_model_is_refused(tmp_path, capsys):
    assert main([str(tmp_path / "missing"), "a"]) == 1
    assert capsys.readouterr().err.startswith("error: no model in ")


PROGRAM = """
import sys; sys.path.insert(0, {tests!r})
from bitnet.export.reading import Loaded; from bitnet.generate import main
from text_models import byte_level, quantized
load = lambda path: Loaded(quantized("bitnet", context=4000), byte_level(), path, "packed")
sys.exit(main([{folder!r}, "a", "--max-new-tokens", "3000"], load))
"""


def test_a_reader_that_goes_away_ends_it_quietly(folder):
    program = PROGRAM.format(tests=os.path.dirname(__file__), folder=str(folder))
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(5)
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_an_output_that_is_full_is_said_in_one_line(folder, flags):
    program = PROGRAM.format(tests=os.path.dirname(__file__), folder=str(folder)).replace('"3000"', f'"3", *{flags}')
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert re.fullmatch("error: standard output cannot be written to: .*No space left.*\n", found.stderr)
    assert found.returncode == 1


def test_the_help_page_loads_neither_torch_nor_transformers():
    program = (
        "import sys, bitnet.generate as g\n"
        "try: g.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
