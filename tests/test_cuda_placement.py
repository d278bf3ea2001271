"""Device placement for CUDA, checked without a GPU: fake tensors raise when devices are mixed."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from stagewise import LatentBank, LinearPath, LogitNormal, Oracle, StageCurve, VPPath
from stagewise.engines import Exact, Nearest, log_weights
from stagewise.losses import FlowMatchingLoss
from stagewise.stages import stage_edges, stratified_times


@pytest.fixture
def bank():
    return LatentBank(torch.randn(60, 3, 4, 4), torch.arange(60) % 4)


ENGINES = (
    Exact("float32", chunk_size=12),
    Exact("float64"),
    Nearest(12, precision="float32"),
    Nearest(12, draws=5, precision="float32"),
)


def assert_on_cuda(*tensors):
    for tensor in tensors:
        assert tensor.device.type == "cuda"


@pytest.mark.parametrize("residency", ["cuda", "cpu"])
@pytest.mark.parametrize("labels", [None, [0, 3]])
@pytest.mark.parametrize("engine", ENGINES, ids=repr)
@pytest.mark.parametrize(
    ("path", "dtype"),
    [(LinearPath(), torch.float32), (VPPath(), torch.bfloat16)],
    ids=["linear-float32", "vp-bfloat16"],
)
def test_oracle_on_cuda(bank, residency, labels, path, engine, dtype):
    """Fake tensors hold no numbers, so that a device sync is an error too."""
    bank = LatentBank(bank.rows.unflatten(1, bank.shape), torch.arange(60) // 15, dtype=dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        oracle = Oracle(bank.to(residency), path, engine, null_class=3)
        xt = torch.randn(2, 3, 4, 4, device="cuda")
        x1, t = torch.randn_like(xt), torch.rand(2, device="cuda")
        source = torch.arange(2, device="cuda")
        post = oracle.posterior(xt, t, labels, source=source, k=3)
        tensors = [value for value in vars(post).values() if isinstance(value, torch.Tensor)]
        assert len(tensors) == 8
        assert_on_cuda(*tensors)
        correction = oracle.correction(xt, t, x1, labels)
        velocity = oracle.velocity(xt, t, labels)
        assert_on_cuda(correction, velocity)
        assert correction.shape == velocity.shape == xt.shape
        assert post.mean.shape == xt.shape
        assert post.weights.shape == post.rows.shape == (2, 3)


class Moved(TorchDispatchMode):
    """Counts the numbers of rows of `dim` that cross from the host to a device."""

    def __init__(self, dim):
        super().__init__()
        self.dim, self.numbers = dim, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("copy_", "_to_copy"):
            source, to = (
                (args[1], args[0]) if func.overloadpacket.__name__ == "copy_" else (args[0], out)
            )
            crosses = source.device.type == "cpu" and to.device.type == "cuda"
            self.numbers += source.numel() * (crosses and source.shape[1:] == (self.dim,))
        return out


@pytest.mark.parametrize("labels", [None, [0, 1, 2, 3]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kept", "times"), [(2**30, 1), (0, 2)])
def test_rows_on_the_host_cross_once_if_they_are_not_too_many(
    labels, dtype, kept, times, monkeypatch
):
    monkeypatch.setattr(log_weights, "_KEPT", kept)
    bank = LatentBank(torch.randn(4000, 64), torch.arange(4000) // 1000, dtype=dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        oracle = Oracle(bank, engine=Exact("float32"))
        xt, t = torch.randn(4, 64, device="cuda"), torch.rand(4, device="cuda")
        with Moved(64) as moved:
            oracle.posterior(xt, t, labels)
    leading = 2 * 4 * 64 * 64  # 64 rows of each query, read twice
    assert moved.numbers == times * 4000 * 64 + leading


def test_mixed_devices_are_caught_at_all(bank):
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match="device"):
        torch.randn(3, device="cuda") + torch.randn(3, device="cpu")


@pytest.mark.parametrize("class_wise", [True, False])
def test_measuring_on_cuda(bank, class_wise, monkeypatch):
    import stagewise.stages as stages

    answers = []
    ask = stages._ask
    monkeypatch.setattr(stages, "_ask", lambda *args: answers.append(ask(*args)) or answers[-1])
    times = stratified_times(stage_edges(0.1, 4), 3)
    monkeypatch.setattr(stages, "check_times", lambda *args: None)  # reads values; t is ours
    with FakeTensorMode(allow_non_fake_inputs=True):
        oracle = Oracle(bank.to("cuda"), engine=Exact("float32"))
        curve = StageCurve.measure(oracle, times, class_wise=class_wise, batch_size=5)
        assert_on_cuda(*answers)
        assert curve.values.shape == (5, 4, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_on_cuda(dtype):
    with FakeTensorMode():
        net = torch.nn.Linear(8, 8, device="cuda", dtype=dtype)
        loss_fn = FlowMatchingLoss(timesteps=LogitNormal(stratified=True), weight=lambda t: 1 + t)
        x1 = torch.randn(6, 8, device="cuda", dtype=dtype)
        loss = loss_fn(lambda xt, t: net(xt), x1)
        assert_on_cuda(loss, *vars(loss_fn.last).values())
