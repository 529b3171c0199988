"""Calls that a GPU would get: the same code on the CPU, the emulator in the place of the driver."""

import gc
import warnings
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from bitnet.errors import InputError
from bitnet.ops.build import BuildError
from bitnet.ops.cuda import dispatch
from bitnet.ops.cuda.dispatch import cuda_linear, kernel_linear, prepare, weights_used
from bitnet.ops.cuda.layout import unprepack
from bitnet.ops.packed_linear import reference_linear
from bitnet.quant import PackedTensor, QTensor, absmean_ternary


@pytest.fixture
def emulated(monkeypatch, emulator):
    """The kernels run in the emulator, on a device that has passed its examination."""
    monkeypatch.setattr(dispatch, "run", lambda queue, device: emulator.run(queue))
    monkeypatch.setattr(dispatch, "multiprocessors", lambda device: 4)
    monkeypatch.setattr(dispatch, "fault_on", lambda index: None)


def weights(rows: int = 20, columns: int = 150, layout: str = "i2") -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.randint(0, 2, (rows, columns), dtype=torch.int8) * 2 - 1
    weight = PackedTensor.of(QTensor(codes, torch.rand(rows, 1), levels=2 if layout == "b1" else 3), layout)
    return weight.packed, weight.scale


@pytest.mark.parametrize("layout", ["i2", "t5", "b1"])
@pytest.mark.parametrize("shape", [(150,), (2, 3, 150), (0, 150), (5, 0, 150), (1, 20, 150)])
def test_every_layout_and_shape_of_inputs_is_exact(emulated, layout, shape):
    packed, scale = weights(layout=layout)
    x, bias = torch.randn(shape), torch.randn(20)
    expected = reference_linear(x, packed, scale, bias, layout, "absmax_b1")
    assert torch.equal(cuda_linear(x, packed, scale, bias, layout, "absmax_b1"), expected)


def test_inputs_need_not_be_contiguous(emulated):
    packed, _ = weights()
    x, bias, every_other = torch.randn(150, 4).t(), torch.randn(40)[::2], torch.rand(20, 2)[:, :1]
    expected = reference_linear(x, packed, every_other, bias, "i2")
    assert torch.equal(cuda_linear(x, packed, every_other, bias, "i2"), expected)


@pytest.mark.parametrize("x_dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias_dtype", [torch.float64, torch.float32])
def test_double_precision_is_computed_like_the_reference_does(emulated, x_dtype, bias_dtype):
    packed, scale = weights()
    x, bias = torch.randn(3, 150).to(x_dtype), torch.randn(20).to(bias_dtype)
    expected = reference_linear(x, packed, scale, bias, "i2")
    found = cuda_linear(x, packed, scale, bias, "i2")
    assert found.dtype == x_dtype
    assert torch.equal(found, expected)


def test_a_weight_changed_in_place_is_noticed(emulated):
    packed, scale = weights()
    x = torch.randn(2, 150)
    before = cuda_linear(x, packed, scale, None, "i2")
    packed.copy_(weights()[0])
    after = cuda_linear(x, packed, scale, None, "i2")
    assert not torch.equal(after, before)
    assert torch.equal(after, reference_linear(x, packed, scale, None, "i2"))


def test_the_reordered_weight_is_made_once_and_goes_with_the_weight(emulated, monkeypatch):
    made = []
    monkeypatch.setattr(dispatch, "prepack", lambda codes, make=dispatch.prepack: made.append(1) or make(codes))
    packed, scale = weights()
    known = len(dispatch._prepacked)
    for _ in range(3):
        cuda_linear(torch.randn(2, 150), packed, scale, None, "i2")
    assert len(made) == 1
    assert len(dispatch._prepacked) == known + 1
    del packed
    gc.collect()
    assert len(dispatch._prepacked) == known


def test_a_weight_whose_changes_nobody_counts_is_never_taken_for_the_old_one(emulated):
    packed, scale = weights()
    x = torch.randn(2, 150)
    with torch.inference_mode():
        uncounted = packed.clone()
        for _ in range(2):
            with pytest.warns(RuntimeWarning, match="outside of inference mode"):
                found = cuda_linear(x, uncounted, scale, None, "i2")
            assert torch.equal(found, reference_linear(x, uncounted, scale, None, "i2"))
            uncounted.copy_(weights()[0])


def test_what_a_graph_must_keep_outlives_the_weight_that_it_came_from(emulated):
    packed, scale = weights()
    x = torch.randn(2, 150)
    with weights_used() as kept:
        for _ in range(2):
            cuda_linear(x, packed, scale, None, "i2")
    codes = unprepack(kept[0])
    assert kept[0] is kept[1]
    cuda_linear(x, weights()[0], scale, None, "i2")  # outside: not collected
    assert len(kept) == 2
    packed.copy_(weights()[0])
    cuda_linear(x, packed, scale, None, "i2")
    assert torch.equal(unprepack(kept[0]), codes)


def test_bytes_that_are_no_codes_are_refused(emulated):
    packed, scale = weights()
    with pytest.raises(InputError, match="damaged"):
        cuda_linear(torch.randn(2, 150), torch.full_like(packed, 0b11), scale, None, "i2")


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused_as_everywhere(emulated):
    packed, scale = weights()
    with pytest.raises(InputError, match="153 input features"):
        cuda_linear(torch.randn(2, 153), packed, scale, None, "i2")


def test_a_first_call_while_a_graph_is_captured_is_refused_and_a_later_one_is_not(emulated, monkeypatch):
    packed, scale = weights()
    other, _ = weights()
    prepare(packed, "i2", 150)
    monkeypatch.setattr(dispatch, "capturing", lambda device: True)
    cuda_linear(torch.randn(2, 150), packed, scale, None, "i2")
    with pytest.raises(InputError, match="before a CUDA graph is captured"):
        cuda_linear(torch.randn(2, 150), other, scale, None, "i2")


def test_rows_longer_than_float32_is_exact_for_go_to_the_reference(emulated, monkeypatch):
    monkeypatch.setattr(dispatch, "EXACT_COLUMNS", 149)
    monkeypatch.setattr(dispatch, "kernel_linear", lambda *arguments: pytest.fail("the kernels ran"))
    packed, scale = weights()
    x = torch.randn(2, 150)
    assert torch.equal(cuda_linear(x, packed, scale, None, "i2"), reference_linear(x, packed, scale, None, "i2"))


def test_a_device_is_examined_with_every_kernel(emulated):
    assert dispatch.wrong_on(torch.device("cpu")) is None


def test_a_device_that_answers_wrongly_is_found_out(emulated, monkeypatch, emulator):
    def one_off(queue, device):
        emulator.run(queue)
        results = queue[1].arguments[7]
        if "tiles_64x32" in queue[1].kernel:
            results[-1, -1] += 1

    monkeypatch.setattr(dispatch, "run", one_off)
    assert "multiply_tiles_64x32 answers wrongly for 1 tokens" in dispatch.wrong_on(torch.device("cpu"))


@pytest.mark.parametrize("error", [BuildError("no NVRTC"), OSError("no NVRTC"), RuntimeError("no NVRTC")])
def test_a_device_without_kernels_says_so_once_and_runs_the_reference(monkeypatch, error):
    def fail(*arguments):
        raise error

    dispatch.fault_on.cache_clear()
    monkeypatch.setattr(dispatch, "wrong_on", fail)
    packed, scale = weights()
    x = torch.randn(2, 150)
    with pytest.warns(RuntimeWarning, match="plain PyTorch on CUDA device 0.*no NVRTC"):
        assert dispatch.fault_on(0) == "no NVRTC"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.fault_on(0) == "no NVRTC"
    monkeypatch.setattr(dispatch, "kernel_linear", lambda *arguments: pytest.fail("the kernels ran"))
    known = dispatch.fault_on
    monkeypatch.setattr(dispatch, "fault_on", lambda index: known(0))
    assert torch.equal(cuda_linear(x, packed, scale, None, "i2"), reference_linear(x, packed, scale, None, "i2"))
    known.cache_clear()


def test_a_full_memory_says_nothing_about_the_kernels(monkeypatch):
    answers = [torch.OutOfMemoryError("full"), None]

    def examine(device):
        answer = answers.pop(0)
        if answer is not None:
            raise answer

    dispatch.fault_on.cache_clear()
    monkeypatch.setattr(dispatch, "wrong_on", examine)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        dispatch.fault_on(0)
    assert dispatch.fault_on(0) is None
    dispatch.fault_on.cache_clear()


def test_a_device_that_is_first_used_in_inference_mode_is_examined_outside_of_it(monkeypatch):
    found = []
    dispatch.fault_on.cache_clear()
    monkeypatch.setattr(dispatch, "wrong_on", lambda device: found.append(torch.is_inference_mode_enabled()))
    with torch.inference_mode():
        dispatch.fault_on(0)
    assert found == [False]
    dispatch.fault_on.cache_clear()


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("captured", [0, 1])
def test_a_capture_is_seen_on_the_current_device_and_on_the_tensors(monkeypatch, current, captured):
    class Cuda:
        def __init__(self) -> None:
            self.now = current

        def is_initialized(self):
            return True

        def is_current_stream_capturing(self):
            return self.now == captured

        @contextmanager
        def device(self, device):
            before, self.now = self.now, device.index
            yield
            self.now = before

    monkeypatch.setattr(dispatch.torch, "cuda", Cuda())
    assert dispatch.capturing(torch.device("cuda", 1)) == (captured in (1, current))


def test_launches_come_after_the_threads_context_and_go_to_the_current_stream(monkeypatch):
    done = []
    stream = SimpleNamespace(cuda_stream=1234)
    cuda = SimpleNamespace(device=lambda device: nullcontext(), current_stream=lambda device: stream)
    module = SimpleNamespace(launch=lambda *launch: done.append(launch))
    monkeypatch.setattr(dispatch.torch, "cuda", cuda)
    monkeypatch.setattr(dispatch, "module_on", lambda index: done.append(("module", index)) or module)
    monkeypatch.setattr(dispatch, "enter_context", lambda index: done.append(("context", index)))
    launch = dispatch.Launch("kernel", (1, 1), 32, ())
    dispatch.run([launch, launch], torch.device("cuda", 3))
    assert done[-3:] == [("context", 3), (launch, 1234), (launch, 1234)]


def test_the_kernels_are_registered_for_gpus_and_importing_them_looks_for_none():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("bitnet::packed_linear", "CUDA")
    assert dispatch.fault_on.cache_info().currsize == 0


def test_a_forced_kernel_is_the_one_that_runs(emulated, monkeypatch, emulator):
    ran = []
    monkeypatch.setattr(dispatch, "run", lambda queue, device: ran.append(queue[1].kernel) or emulator.run(queue))
    packed, scale = weights()
    kernel_linear(torch.randn(2, 150), packed, scale, None, "i2", "absmax", "multiply_tiles_128x64")
    assert ran == ["multiply_tiles_128x64"]


def test_a_ternary_weight_is_exact_too(emulated):
    weight = PackedTensor.of(absmean_ternary(torch.randn(33, 150)))
    x = torch.randn(2, 150)
    expected = reference_linear(x, weight.packed, weight.scale, None, weight.layout)
    assert torch.equal(cuda_linear(x, weight.packed, weight.scale, None, weight.layout), expected)
