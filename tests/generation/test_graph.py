"""A token's step from a recording is the step itself. A tape of operators stands in for a CUDA graph."""

import re
import warnings

import pytest
import torch
from text_models import BODIES, byte_level, quantized, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bitnet.errors import InputError
from bitnet.generation import CachedModel, Sampling, stream
from bitnet.generation import cache as cache_module
from bitnet.generation.cache import SMALLEST
from bitnet.generation.graph import RecordedStep, graph_problem
from bitnet.generation.step import OneToken
from bitnet.nn import fuse

IDS = torch.randint(300, (90,), generator=torch.Generator().manual_seed(3)).tolist()
READS_BACK = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero")


class Tape(TorchDispatchMode):
    """What a CUDA graph keeps of a run: operators on addresses. No Python runs again; reading a number back fails."""

    def __init__(self) -> None:
        super().__init__()
        self.done, self.replays = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in READS_BACK:
            raise RuntimeError("operation not permitted when stream is capturing")
        answer = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, answer))
        return answer

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, answer in self.done:
            for old, new in zip(tree_leaves(answer), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():  # no view, and not in place
                    old.copy_(new)


class Tapes:
    """A recorder."""

    def __init__(self) -> None:
        self.made: list[Tape] = []

    def __call__(self, run):
        run()
        self.made.append(Tape())
        with self.made[-1]:
            answer = run()
        answer.fill_(torch.nan)  # a capture computes nothing
        return answer, self.made[-1].replay


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """Packed layers go through PyTorch's dispatch, as they do where tensors are not in main memory."""
    monkeypatch.setattr(fuse, "cpu_linear", fuse.packed_linear)


def recorded(model) -> tuple[CachedModel, Tapes]:
    cached, tapes = CachedModel(model), Tapes()
    cached._step = RecordedStep(model, tapes, required=True)
    return cached, tapes


def plain(model) -> CachedModel:
    cached = CachedModel(model)
    cached._step = OneToken(model, recorded=True)
    return cached


def model_of(body: str, form: str):
    return tiny(body).double() if form == "dense" else quantized(body, packed=True)


@pytest.mark.parametrize("form", ["dense", "packed"])
@pytest.mark.parametrize("body", BODIES)
def test_replayed_steps_give_the_logits_of_launched_ones_while_the_memory_doubles(body, form):
    model = model_of(body, form)
    (ours, tapes), theirs = recorded(model), plain(model)
    begin = SMALLEST - 4
    for cached in (ours, theirs):
        cached.read(IDS[:begin])
    found = torch.stack([ours.read([each]) for each in IDS[begin:]])
    expected = torch.stack([theirs.read([each]) for each in IDS[begin:]])
    if form == "dense":
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    else:  # the mask may reorder attention's sums, which may move a code
        assert (found - expected).std() / expected.std() < 0.01
    assert [each.replays for each in tapes.made] == [4, len(IDS) - SMALLEST]


def test_texts_that_are_cut_and_go_on_elsewhere_need_no_new_recording():
    model = tiny("llama").double()
    cached, tapes = recorded(model)
    for ids in (IDS[:40], [*IDS[:25], 7, *IDS[26:44]], IDS[:30]):
        same = cached.keep(ids)
        cached.read(ids[same:-3])
        for each in ids[-3:]:
            found = cached.read([each])
        fresh = plain(model)
        fresh.read(ids[:-1])
        assert torch.allclose(found, fresh.read(ids[-1:]), rtol=0, atol=1e-12)
    assert len(tapes.made) == 1


def test_logits_that_were_given_out_are_not_overwritten_by_later_steps():
    cached, _ = recorded(tiny("qwen2"))
    cached.read(IDS[:5])
    first = cached.read(IDS[5:6])
    kept = first.clone()
    cached.read(IDS[6:7])
    assert torch.equal(first, kept)


def test_a_changed_model_is_recorded_anew_when_the_change_is_noticed(monkeypatch):
    made = []

    def step_of(model, graph):
        made.append(RecordedStep(model, Tapes(), required=True))
        return made[-1]

    monkeypatch.setattr(cache_module, "_step_of", step_of)
    model, other = tiny("llama").double(), tiny("llama", seed=1).double()
    cached = CachedModel(model)
    cached.read(IDS[:10])
    cached.read(IDS[10:11])
    model.load_state_dict(other.state_dict())
    cached.read(IDS[11:15])
    found = cached.read(IDS[15:16])
    assert [each.recordings for each in made] == [1, 1]
    fresh = plain(other)
    fresh.read(IDS[:15])
    assert torch.allclose(found, fresh.read(IDS[15:16]), rtol=0, atol=1e-12)


def test_a_recording_that_fails_is_said_once_and_the_text_is_the_same():
    model = tiny("bitnet").double()
    cached, theirs = CachedModel(model), plain(model)

    def fail(run):
        run()
        raise RuntimeError("out of memory")

    cached._step = RecordedStep(model, fail)
    for each in (cached, theirs):
        each.read(IDS[:5])
    with pytest.warns(RuntimeWarning, match="without a CUDA graph, whose recording failed: out of memory"):
        assert torch.equal(cached.read(IDS[5:6]), theirs.read(IDS[5:6]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(cached.read(IDS[6:7]), theirs.read(IDS[6:7]))
    required = CachedModel(model)
    required._step = RecordedStep(model, fail, required=True)
    required.read(IDS[:5])
    with pytest.raises(RuntimeError, match="out of memory"):
        required.read(IDS[5:6])


def test_a_step_that_waits_for_a_number_could_not_be_recorded():
    model = tiny("llama")
    cached, _ = recorded(model)
    cached._step._step = OneToken(model)  # its norms read a sum back, where tensors are in main memory
    cached.read(IDS[:5])
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        cached.read(IDS[5:6])


def test_what_cannot_be_replayed_says_why(monkeypatch):
    model = tiny("llama")
    assert graph_problem(model) == "the model is on cpu, and not on one CUDA device"
    with pytest.raises(InputError, match="the model is on cpu"):
        CachedModel(model, graph=True)
    assert not isinstance(CachedModel(model)._step, RecordedStep)


@pytest.mark.parametrize(
    ("change", "message"), [("hook", "no step of its own for LlamaForCausalLM"), ("rotary", "dynamic.* changes with")]
)
def test_models_that_change_in_a_step_are_not_recorded(change, message):
    model = tiny("llama")
    if change == "hook":
        model.model.layers[0].register_forward_hook(lambda *_: None)
    else:
        model.model.rotary_emb.rope_type = "dynamic"

    class OnGpu:
        """The model, said to be on a GPU."""

        def __getattr__(self, name):
            return getattr(model, name)

        def parameters(self):
            yield type("Parameter", (), {"device": torch.device("cuda", 0)})()

        def buffers(self):
            yield from ()

    OnGpu.__name__ = "LlamaForCausalLM"
    assert re.search(message, graph_problem(OnGpu()) or "")


def test_a_model_on_a_gpu_is_recorded_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(cache_module, "graph_problem", lambda model: None)
    monkeypatch.setattr(cache_module, "cuda_graph", lambda device: Tapes())
    model, tokenizer = tiny("llama"), byte_level()
    texts = []
    for graph in (None, True, False):
        cached = CachedModel(model, graph=graph)
        assert isinstance(cached._step, RecordedStep) == (graph is not False)
        texts.append("".join(stream(model, tokenizer, "Die", Sampling(temperature=0, max_new_tokens=9), cached=cached)))
        assert cached.graphed == (graph is not False)
    assert len(set(texts)) == 1


@pytest.mark.parametrize("body", BODIES)
def test_a_compiler_follows_the_step_of_a_packed_model_without_a_break(body):
    model = quantized(body, packed=True)
    step, positions = OneToken(model, recorded=True), torch.tensor([[4]])

    class Memory:
        def __init__(self, layer: int) -> None:
            draw = torch.Generator().manual_seed(layer)
            self.keys, self.values = torch.randn(2, 1, 2, 8, 12, generator=draw).unbind()

        def update(self, keys, values):
            self.keys.index_copy_(-2, positions[0], keys)
            self.values.index_copy_(-2, positions[0], values)
            return self.keys, self.values

    mask = (torch.arange(8) <= 4)[None, None, None]
    with torch.no_grad():
        expected = step.run(torch.tensor([[7]]), positions, [Memory(0), Memory(1)], mask)
        torch.compiler.reset()
        compiled = torch.compile(step.run, fullgraph=True, backend="eager")
        found = compiled(torch.tensor([[7]]), positions, [Memory(0), Memory(1)], mask)
    assert torch.equal(found, expected)
