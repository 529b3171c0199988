import pytest
import torch
import torch.multiprocessing
from toy_models import tiny_llama

from bitnet.errors import InputError
from bitnet.ptq import GPTQ, Statistic, quantize
from bitnet.ptq.activations import ActivationStore
from bitnet.ptq.statistics import InputStatistics, StageInputs
from bitnet.quant import StaticActivation

EVERYTHING = list(Statistic)


def test_the_statistics_are_means_over_all_tokens():
    x, x_fp = torch.randn(3, 7, 5), torch.randn(3, 7, 5)
    sums = InputStatistics(EVERYTHING, 5)
    for part, part_fp in zip(x.split(2), x_fp.split(2), strict=True):
        sums.update(part, part_fp)
    stats = sums.finish("layer")
    flat, flat_fp = x.reshape(-1, 5), x_fp.reshape(-1, 5)
    assert stats.n_tokens == 21
    assert torch.allclose(stats.hessian, flat.T @ flat / 21, atol=1e-6)
    assert torch.allclose(stats.cross, (flat - flat_fp).T @ flat / 21, atol=1e-6)
    assert torch.allclose(stats.mean_square, flat.square().mean(0), atol=1e-6)
    assert torch.equal(stats.absmax, flat.abs().amax(0))


def test_only_what_was_asked_for_is_collected():
    sums = InputStatistics([Statistic.MEAN_SQUARE], 4)
    sums.update(torch.randn(3, 4))
    stats = sums.finish("layer")
    assert (stats.hessian, stats.cross, stats.absmax) == (None, None, None)


def test_statistics_of_two_shares_merge_to_those_of_the_whole():
    x, x_fp = torch.randn(20, 5), torch.randn(20, 5)
    parts = []
    for share in (slice(0, 6), slice(6, 20)):
        parts.append(InputStatistics(EVERYTHING, 5))
        parts[-1].update(x[share], x_fp[share])
    whole = InputStatistics(EVERYTHING, 5)
    whole.update(x, x_fp)
    merged, expected = parts[0].merge(parts[1]).finish("layer"), whole.finish("layer")
    assert merged.n_tokens == expected.n_tokens == 20
    for name in ("hessian", "cross", "mean_square", "absmax"):
        assert torch.allclose(getattr(merged, name), getattr(expected, name), atol=1e-6)


def test_no_token_and_bad_tokens_are_refused_by_name():
    with pytest.raises(InputError, match=r"no calibration token reaches up_proj"):
        InputStatistics(EVERYTHING, 4).finish("up_proj")
    sums = InputStatistics([Statistic.ABSMAX], 2)
    sums.update(torch.tensor([[1.0, torch.inf]]))
    with pytest.raises(InputError, match="inputs of up_proj hold NaN or infinity"):
        sums.finish("up_proj")


def _quantize_a_share(rank: int, port: int, ids: torch.Tensor, results: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = tiny_llama()
    quantize(model, GPTQ(correction=0.5), ids, activation=StaticActivation())
    torch.save(model.state_dict(), f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_quantize_to_one_model_that_saw_the_whole_text(text, tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_quantize_a_share, (port, text, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    alone = tiny_llama()
    quantize(alone, GPTQ(correction=0.5), text, activation=StaticActivation())
    codes = {name: tensor for name, tensor in alone.state_dict().items() if name.endswith("qdata")}
    different = sum(int((ranks[0][name] != tensor).sum()) for name, tensor in codes.items())
    assert different < 0.01 * sum(tensor.numel() for tensor in codes.values())  # sums of floats in another order
    scale = "model.layers.0.self_attn.q_proj.activation.scale"
    assert torch.equal(ranks[0][scale], alone.state_dict()[scale])


def test_a_static_range_is_that_of_every_batch():
    inputs = StageInputs(set(), 3, StaticActivation(), torch.device("cpu"))
    for batch in (torch.tensor([[-1.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 3.0]])):
        inputs.update(batch, None)
    inputs.finish("layer")
    codes = inputs.quantizer()(torch.tensor([[-1.0, 3.0, 9.0]]))
    assert codes.dequantize().tolist()[0] == pytest.approx([-1.0, 3.0, 3.0], abs=0.02)


def test_tensors_beyond_the_budget_come_back_from_files_bit_for_bit(tmp_path):
    tensors = [torch.randn(2, 3), torch.randn(4, 5).bfloat16(), torch.randn(1)]
    with ActivationStore(budget=30, directory=tmp_path) as store:
        for tensor in tensors:
            store.append(tensor)
        assert store.spilled == 1
        for _ in range(2):
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tensors, store, strict=True))
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())
