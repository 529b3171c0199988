"""Whatever is wrong with the files of a packed folder is an `InputError`, soon, and nothing in them is executed."""

import json
import shutil
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bitnet.errors import InputError
from bitnet.export import PackedExporter, packed_read
from bitnet.export.packed_read import read
from bitnet.models.empty import empty_causal_lm
from bitnet.nn import convert
from bitnet.ptq import RoundToNearest, quantize

Q = "model.layers.0.self_attn.q_proj"
MANIFEST, TOKENIZER = "bitnet.json", "tokenizer.json"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    convert(model)
    raw = Tokenizer(models.WordLevel({f"w{each}": each for each in range(90)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="w0")
    return PackedExporter(rest="int8").write(model, tokenizer, tmp_path_factory.mktemp("packed") / "packed").path


@pytest.fixture
def folder(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "packed"))


def edit(folder: Path, change: Callable[[Any], Any]) -> None:
    """Change the manifest as someone who knows its checksums: of itself, and of the files as they are now."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    if isinstance(manifest.get("files"), dict):
        files = {name: folder / name for name in manifest["files"]}
        manifest["files"] |= {name: zlib.crc32(file.read_bytes()) for name, file in files.items() if file.is_file()}
    manifest["checksum"] = packed_read.checksum(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["config"].update(vocab_size="x"),
        lambda m: m["config"].update(hidden_size=2.5),
        lambda m: m["config"].update(hidden_size=10**30),
        lambda m: m["config"].update(num_attention_heads=0),
        lambda m: m["config"].update(num_key_value_heads=[1]),
        lambda m: m["config"].update(rope_parameters={"rope_type": "x"}),
        lambda m: m["config"].update(rope_parameters={"rope_type": "default", "rope_theta": 0}),
        lambda m: m["config"].update(pad_token_id=1000000007),
        lambda m: m["config"].update(hidden_act=[]),
        lambda m: m["config"].update(rms_norm_eps="x"),
        lambda m: m.update(tied={"model.norm.weight": []}),
        lambda m: m.update(tied={"model.norm.weight": "nowhere"}),
        lambda m: m.update(tied={"lm_head.weight": "model.norm.weight"}),
        lambda m: m.update(tied=[1]),
        lambda m: m.update(dtype="__name__"),
        lambda m: m.update(files=3),
        lambda m: m.update(files={"../packed/tokenizer.json": 1}),
        lambda m: m.update(checksums={**m["checksums"], f"{Q}.scale": "x"}),
        lambda m: m["layers"].update({Q: "x"}),
        lambda m: m["layers"].update({Q: []}),
        lambda m: m["layers"].update({"": m["layers"][Q]}),
        lambda m: m["layers"][Q].update(activation="x"),
        lambda m: m["layers"][Q].update(activation=["x"]),
        lambda m: m["layers"][Q].update(kind=[]),
        lambda m: m["layers"][Q].update(kind="embedding"),
        lambda m: m["layers"]["model.embed_tokens"].update(kind="linear"),
        lambda m: m["layers"][Q].update(home=3),
        lambda m: m["layers"][Q].update(tensors=3),
        lambda m: m["layers"][Q].update(tensors=[["packed"]]),
        lambda m: m["layers"][Q].update(weight=[]),
        lambda m: m["layers"][Q]["weight"].update(columns=10**30),
        lambda m: m["layers"][Q]["weight"].update(columns=-1),
        lambda m: m["layers"][Q]["weight"].update(columns="x"),
        lambda m: m["layers"][Q]["weight"].update(layout=[]),
        lambda m: m["layers"]["lm_head"]["weight"].update(group_size=0),
        lambda m: m["layers"]["lm_head"]["weight"].update(group_size="x"),
        lambda m: m["layers"]["lm_head"]["weight"].update(levels=[]),
        lambda m: m["layers"]["lm_head"]["weight"].update(levels=0),
        lambda m: m["layers"]["lm_head"]["weight"].update(columns=10**30),
    ],
)
def test_values_that_do_not_fit_are_refused(folder, change):
    edit(folder, change)
    with pytest.raises(InputError):
        read(folder)


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer"])
@pytest.mark.parametrize("count", [300_000, 1_000_000_007, 1e308, -1])
def test_more_layers_than_tensors_are_refused_before_they_are_built(key, count):
    plain = GPT2Config() if key == "n_layer" else LlamaConfig()
    with pytest.raises(InputError, match="tensors in all: it is damaged"):
        empty_causal_lm({**json.loads(plain.to_json_string()), key: count}, most_layers=100)


def test_a_changed_manifest_is_found_wherever_it_changed(folder):
    content = (folder / MANIFEST).read_text()
    for old, new in (
        ('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'),
        ('"bits": 8', '"bits": 7'),
        ("qdata", "qdatb"),
    ):
        if old in content:
            (folder / MANIFEST).write_text(content.replace(old, new, 1))
            with pytest.raises(InputError, match="its checksum differs"):
                read(folder)
    (folder / MANIFEST).write_text(json.dumps(json.loads(content)))  # other spaces mean the same
    read(folder)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "\x00\xff", '{"model": {}}', '{"model": {"type": "BPE"}}', "[" * 9999]
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_damaged_file_beside_the_tensors_is_refused(folder, name, content):
    (folder / name).write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=rf"{name} is not what was written"):
        read(folder)
    with suppress(InputError):  # where the file says nothing wrong it reads; nothing else is raised
        read(folder, verify=False)


def test_a_missing_tokenizer_is_an_error_and_no_missing_feature(folder):
    (folder / TOKENIZER).unlink()
    with pytest.raises(InputError, match=r"lacks tokenizer\.json"):
        read(folder)


def test_code_beside_a_tokenizer_is_not_executed(folder):
    ran = folder.parent / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass EvilTokenizer: pass\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    edit(folder, lambda _: None)
    with pytest.raises(InputError, match="tokenizer that does not load"):
        read(folder)
    assert not ran.exists()


def test_without_verifying_no_tensor_is_read_before_its_use(written, folder):
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{Q}.packed"].fill_(0xFF)
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match="not those that were written"):
        read(folder)
    assert bool(read(folder, verify=False).model.model.norm.weight.isnan().all())
    (folder / TOKENIZER).write_text((folder / TOKENIZER).read_text() + " ")
    assert read(folder, verify=False).tokenizer is not None


def test_four_bit_codes_beside_others_are_refused_by_name(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=96, n_positions=64)).eval()
    quantize(model, RoundToNearest(bits=4, symmetric=False))
    folder = PackedExporter().write(model, None, tmp_path / "packed").path
    edit(folder, lambda m: m["layers"]["transformer.h.0.attn.c_attn"]["weight"].update(group_size=-16))
    with pytest.raises(InputError, match=r"transformer.h.0.attn.c_attn: "):
        read(folder)
