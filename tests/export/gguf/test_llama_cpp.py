"""llama.cpp itself: its logits, its tokens, its text. Run with llama-cpp-python installed: ``pytest -m llama_cpp``.

The tolerance of 1e-6 is for models and texts so small that no input lies next to a rounding boundary (see
`bitnet.export.gguf.reference`); seeds where one does are not chosen.
"""

import pytest
import torch
from tokenizers import Regex, pre_tokenizers

from bitnet.export.gguf import GGUFExporter, architecture, exporter, llama_cpp, read
from bitnet.export.gguf.reader import GGUFFile
from bitnet.export.gguf.reference import in_float64
from bitnet.export.gguf.tokenizer import PRE_TOKENIZERS, PROBE
from bitnet.export.parity import difference, logits
from bitnet.export.protocol import ExportError
from bitnet.nn import BitLinear, QuantizedLinear
from bitnet.ptq import KQuant, RoundToNearest, quantize
from bitnet.quant import absmean_ternary

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install llama-cpp-python")
pytestmark = pytest.mark.llama_cpp
TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def ids(model, tokens=4) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (8, tokens), generator=torch.Generator().manual_seed(3))


def distance(model, path, **options) -> float:
    """Relative distance of llama.cpp's logits from the float64 reference's.

    Over the nearer half of all tokens but the first ones, where positions do not show: none of them follows an input
    that was rounded the other way.
    """
    GGUFExporter(**options).write(model, None, path)
    computed, expected = llama_cpp.logits(path, ids(model)), logits(in_float64(GGUFFile(path)), ids(model))
    found = ((computed - expected).norm(dim=-1) / expected.norm(dim=-1))[:, 1:]
    return float(found.flatten().quantile(0.5))


def ptq(model, method):
    quantize(model, method, ids(model))
    return model


@pytest.mark.parametrize("type", ["TQ2_0", "TQ1_0", "Q2_0"])
@pytest.mark.parametrize("body", ["llama", "bitnet", "qwen2", "qwen3", "mistral"])
def test_ternary_models_compute_as_the_reference_says(b158, tmp_path, body, type):
    scale = "block" if body == "qwen2" else "tensor"
    assert distance(b158(body), tmp_path / "m.gguf", type=type, scale=scale) < 1e-6


@pytest.mark.parametrize("scale", ["tensor", "block"])
def test_scales_beside_the_codes_and_in_their_blocks_are_used(b158, tmp_path, scale):
    assert distance(b158("bitnet"), tmp_path / "m.gguf", type="TQ2_0", scale=scale) < 1e-6


@pytest.mark.parametrize("type", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0"])
def test_k_quants_compute_as_the_reference_says(tiny, tmp_path, type):
    model = ptq(tiny("llama"), KQuant(type=type, importance=False))
    assert distance(model, tmp_path / "m.gguf") < 1e-6


@pytest.mark.parametrize("bits", [3, 6])
def test_codes_rounded_to_nearest_compute_as_the_reference_says(tiny, tmp_path, bits):
    model = ptq(tiny("llama"), RoundToNearest(symmetric=False, bits=bits, granularity=64))
    assert distance(model, tmp_path / "m.gguf") < 1e-6


def test_signs_of_one_bit_compute_as_the_reference_says(b158, tmp_path):
    model = b158("llama", layer=BitLinear.from_linear)
    assert distance(model, tmp_path / "m.gguf", type="Q1_0") < 1e-6


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("embeddings", ["f32", "f16", "bf16", "q8_0"])
def test_embeddings_of_every_type_compute_as_the_reference_says(b158, tmp_path, embeddings, tied):
    assert distance(b158("llama", tied=tied), tmp_path / "m.gguf", embeddings=embeddings) < 1e-6


@pytest.mark.parametrize(("mlp", "scale"), [(False, "tensor"), (True, "block")])
def test_biases_of_codes_are_added_after_the_scale(tmp_path, mlp, scale):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=320, attention_bias=True, mlp_bias=mlp)).eval()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            weight = absmean_ternary(layer.weight.detach())
            bias = None if layer.bias is None else torch.randn(layer.out_features) * 0.1
            model.set_submodule(name, QuantizedLinear(weight, bias))
    assert distance(model, tmp_path / "m.gguf", type="TQ2_0", scale=scale) < 1e-6


@pytest.mark.parametrize("body", ["qwen2", "llama"])
def test_the_scales_that_llama_cpp_does_not_use_rightly_are_known(tiny, b158, tmp_path, monkeypatch, body):
    """Once this fails, llama.cpp has learnt it, and the refusal can go."""
    monkeypatch.setattr(architecture.Architecture, "scale_problem", lambda *arguments: None)
    model = b158("qwen2") if body == "qwen2" else tiny("llama")
    if body == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=320, mlp_bias=True)).eval()
        for layer in model.model.layers:
            weight = absmean_ternary(layer.mlp.up_proj.weight.detach())
            layer.mlp.up_proj = QuantizedLinear(weight, torch.randn(256))
    with pytest.raises(ExportError, match="gives other logits"):
        GGUFExporter(type="TQ2_0").write(model, None, tmp_path / "m.gguf")


def test_linear_rotary_scaling_is_the_same_there(tiny, tmp_path):
    model = tiny("mistral", rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0})
    assert distance(model, tmp_path / "m.gguf") < 1e-6


def test_dense_models_answer_as_ours_do(tiny, tmp_path):
    model = tiny("llama")
    exported = GGUFExporter(embeddings="f32", dense="f32").write(model, None, tmp_path / "m.gguf")
    assert exported.runtime is not None
    assert exported.runtime.startswith("llama-cpp-python")
    assert exported.runtime_difference is not None
    assert exported.runtime_difference < 1e-5


def test_rows_of_q_and_k_in_the_wrong_order_fail_the_export(b158, tmp_path, monkeypatch):
    model = b158("llama", seed=1)
    for layer in model.model.layers:  # attention that depends on positions, as a trained model's does
        layer.self_attn.q_proj.weight_scale.mul_(12.0)
        layer.self_attn.k_proj.weight_scale.mul_(12.0)
    monkeypatch.setattr(architecture, "_order", lambda rows, heads: torch.arange(rows))
    with pytest.raises(ExportError, match=r"llama-cpp-python .* gives other logits"):
        GGUFExporter().write(model, None, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_what_llama_cpp_does_not_load_fails_the_export(b158, tmp_path, monkeypatch):
    settings = exporter.settings

    def without_epsilon(*arguments):
        return {
            key: value for key, value in settings(*arguments).items() if "rms_eps" not in key and "epsilon" not in key
        }

    monkeypatch.setattr(exporter, "settings", without_epsilon)
    with pytest.raises(ExportError):
        GGUFExporter().write(b158("llama"), None, tmp_path / "m.gguf")


def rule(name: str):
    if name == "gpt-2":
        return None
    parts = []
    for part in PRE_TOKENIZERS[name]:
        if part["type"] == "Split":
            parts.append(pre_tokenizers.Split(Regex(part["pattern"]["Regex"]), "isolated"))
        elif part["type"] == "Digits":
            parts.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=part["use_regex"]))
    return pre_tokenizers.Sequence(parts)


TEXTS = [
    PROBE,
    "a",
    " a",
    "  two  spaces   ",
    "tab\t\ttabs \t mixed",
    "lines\n\n\nand\r\nreturns \n ",
    "12 123 1234 1234567 3.14e-10 ½ ٣٤",
    "don't I'LL we're they'Ve 's",
    "<s>begin</s><|user|> hi",
    "日本語のテキスト、한국어 텍스트, ภาษาไทย, עברית, हिन्दी",
    "e\u0301 \u00a0nbsp\u2003em \u200b zero \ufeff",
    "🙂👍🏽👩\u200d👩\u200d👧 emoji",
    "snake_case camelCase $x_1^2$ <html> && || != ->",
]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_texts_become_the_same_tokens_there(b158, bpe, tmp_path, name):
    tokenizer = bpe(rule(name), ignore_merges=name == "llama-bpe", template=TEMPLATE)
    GGUFExporter().write(b158("llama"), tokenizer, tmp_path / "m.gguf")
    model = llama_cpp.opened(tmp_path / "m.gguf", 64)
    try:
        different = [
            text
            for text in TEXTS
            if model.tokenize(text.encode(), add_bos=True, special=True) != tokenizer.encode(text)
        ]
        assert different == []
        for text in TEXTS:
            tokens = tokenizer.encode(text, add_special_tokens=False)
            assert model.detokenize(tokens, special=True).decode() == tokenizer.decode(tokens)
        assert (model.token_bos(), model.token_eos()) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert model.metadata["tokenizer.chat_template"] == TEMPLATE
    finally:
        model.close()


def test_it_chats_with_the_models_own_template(b158, bpe, tmp_path):
    tokenizer = bpe(template=TEMPLATE)
    GGUFExporter().write(b158("llama"), tokenizer, tmp_path / "m.gguf")
    model = llama_cpp.opened(tmp_path / "m.gguf", 64)
    try:
        chat = [{"role": "user", "content": "hi"}]
        answer = model.create_chat_completion(chat, max_tokens=4, temperature=0.0)
        prompt = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
        assert answer["usage"]["prompt_tokens"] == len(prompt)
        assert isinstance(answer["choices"][0]["message"]["content"], str)
    finally:
        model.close()


def test_greedy_text_is_the_same_where_no_input_is_quantized(tiny, bpe, tmp_path):
    tokenizer = bpe()
    model = tiny("llama")
    GGUFExporter(embeddings="f32", dense="f32").write(model, tokenizer, tmp_path / "m.gguf")
    prompt = tokenizer.encode("the quick brown")
    there = llama_cpp.opened(tmp_path / "m.gguf", 64)
    try:
        found = []
        for token in there.generate(prompt, temp=0.0, repeat_penalty=1.0):
            found.append(token)
            if len(found) == 16:
                break
    finally:
        there.close()
    loaded = read(tmp_path / "m.gguf").model
    inputs = torch.tensor([prompt])
    expected = loaded.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=1,
    )
    assert found == expected[0, len(prompt) :].tolist()
    assert difference(logits(model, inputs), logits(loaded, inputs)) == 0.0
