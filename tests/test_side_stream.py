"""The oracle beside the network: in which order streams wait, and that nothing else changes."""

import weakref

import pytest
import torch

from stagewise import Concentration, LatentBank, Mix, Oracle, Scheme, StageAware, side_stream
from stagewise.losses import FlowMatchingLoss


class Stream:
    """A stream that notes what is queued, in place of one of a device."""

    current = []

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def __enter__(self):
        self.current.append(self)

    def __exit__(self, *_):
        self.current.pop()


@pytest.fixture
def log(monkeypatch):
    """A log of two streams; the CPU stands in for a device."""
    log = []
    main, side = Stream("main", log), Stream("side", log)
    main.current[:] = [main]
    monkeypatch.setattr(side_stream, "_streams", {})
    monkeypatch.setattr(side_stream, "_runs_beside", lambda x: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: main.current[-1])
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    kept = lambda x, stream: log.append(f"{stream.name} keeps {tuple(x.shape)}")  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "record_stream", kept)
    return log


def losses(log=None, target=None):
    """Three steps of a network with dropout: losses, and the state of the generator after."""
    torch.manual_seed(0)
    x1 = torch.randn(12, 6)
    net = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Dropout())
    oracle = Oracle(LatentBank(x1, torch.arange(12) // 4))
    scheme = Scheme(oracle, target=target or Mix(), timesteps=StageAware(0.3), boundary=0.4)
    if log is not None:
        ask = scheme._correction

        def noted(*args, **known):
            log.append(f"{Stream.current[-1].name} asks")
            return ask(*args, **known)

        scheme._correction = noted

    def model(xt, t):
        if log is not None:
            log.append(f"{Stream.current[-1].name} runs the network")
        return net(xt)

    loss_fn = FlowMatchingLoss(scheme=scheme)
    found = [loss_fn(model, x1[:8]).item() for _ in range(3)]
    return found, torch.get_rng_state()


@pytest.mark.parametrize("target", [Mix(), Mix("boundary"), Mix(Concentration())])
def test_it_is_asked_beside_the_network(log, monkeypatch, target):
    found, state = losses(log, target)
    step = ["side waits for main", "side asks", "main runs the network", "main waits for side"]
    assert log == 3 * [*step, "main keeps (8, 6)", "main keeps (8,)"]
    assert len(side_stream._streams) == 1
    monkeypatch.undo()
    expected, same = losses(target=target)
    assert found == expected
    assert torch.equal(state, same)


def test_what_is_read_is_held_until_it_is_waited_for(log):
    x = torch.randn(3)
    left = weakref.ref(x)
    wait = side_stream.beside(lambda: (torch.ones(1),), x)
    del x
    assert left() is not None
    assert wait()[0] == 1
    del wait
    assert left() is None


def test_without_a_device_it_is_only_called():
    assert not side_stream._runs_beside(torch.ones(1))
    done = []
    wait = side_stream.beside(lambda: (done.append(1) or torch.ones(1),), torch.ones(1))
    assert done == [1]
    assert wait()[0] == 1
    assert done == [1]
