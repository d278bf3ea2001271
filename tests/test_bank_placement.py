"""Where the bank of a run lies: chosen by what is free, moved once, kept on the host if it must."""

import gc
import logging
import re
import weakref

import pytest
import torch

from stagewise import LatentBank, Mix, Oracle, Scheme, memory
from stagewise.bank import rows as rows_module
from stagewise.bank import streaming
from stagewise.callbacks import PosteriorMonitor, StageScheme
from stagewise.callbacks.run_oracles import still_to_come
from stagewise.callbacks.training_bank import storage_beside

CUDA = torch.device("cuda", 0)


@pytest.fixture
def bank():
    return LatentBank(torch.randn(100, 64))


@pytest.fixture
def free(monkeypatch):
    """Sets what is free; `to` a CUDA device and `pin` are noted, and give the bank itself."""
    told, done = {"cuda": 10**9, "cpu": 10**9}, []
    monkeypatch.setattr(
        rows_module, "available_memory", lambda device="cpu": told[torch.device(device).type]
    )
    monkeypatch.setattr(rows_module.RowStore, "to", lambda bank, _: done.append("to") or bank)
    monkeypatch.setattr(rows_module.RowStore, "pin", lambda bank: done.append("pin") or bank)
    return told, done


@pytest.mark.parametrize(
    ("cuda", "taken", "host", "does"),
    [
        (2 * 25600, 0, 10**9, ["to"]),
        (2 * 25600 - 1, 0, 10**9, ["pin"]),
        (4 * 25600, 2 * 25600, 10**9, ["to"]),
        (4 * 25600, 2 * 25600 + 1, 10**9, ["pin"]),
        (1000, 0, 25600, []),  # no room to pin it
    ],
)
def test_where_there_is_room(bank, free, cuda, taken, host, does):
    told, done = free
    told.update(cuda=cuda, cpu=host)
    assert bank.beside_training(CUDA, taken) is bank
    assert done == does


def test_a_device_that_runs_out_leaves_it_on_the_host(bank, free, monkeypatch):
    _, done = free

    def full(bank, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(rows_module.RowStore, "to", full)
    with pytest.warns(UserWarning, match=r"does not fit on cuda:0, where 1.0 GB were free") as said:
        assert bank.beside_training(CUDA) is bank
    assert len(said) == 1
    assert done == ["pin"]


def test_what_torch_holds_unused_is_free(monkeypatch):
    for name, value in {"mem_get_info": (100, 999), "memory_reserved": 70}.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 30)
    assert memory.available_memory(CUDA) == 140


def test_what_training_has_yet_to_take():
    layer = torch.nn.Linear(3, 5)  # 20 numbers
    adam = torch.optim.Adam(layer.parameters())
    assert still_to_come([adam]) == 3 * 80
    layer(torch.randn(2, 3)).sum().backward()
    assert still_to_come([adam]) == 2 * 80
    adam.step()
    assert still_to_come([adam]) == 0


def test_a_large_bank_beside_cuda_is_bfloat16(monkeypatch, caplog):
    supported = [True]
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: supported[0])
    x = 5 + torch.randn(32, 4, 8, 8)
    with caplog.at_level(logging.INFO):
        assert storage_beside(torch.device("cpu"), 10**6, x) is None
        assert storage_beside(CUDA, 10**9 // 1024, x) is None  # 1 GB at most
        assert storage_beside(CUDA, 10**6, x.half()) is None
        assert not caplog.records
        assert storage_beside(CUDA, 10**6, x) == torch.bfloat16
    (said,) = caplog.messages
    assert "bfloat16, 512.0 MB in place of 1.0 GB" in said
    error = float(re.search(r"rounded by ([\d.]+)%", said).group(1)) / 100
    rows = LatentBank(x, dtype=torch.bfloat16)
    gap = (rows.take(torch.arange(32)) - x.flatten(1)).norm()
    assert error == pytest.approx(float(gap / (x.flatten(1) - rows.centre).norm()), rel=0.05)
    supported[0] = False
    with caplog.at_level(logging.INFO):
        assert storage_beside(CUDA, 10**6, x) is None
    assert "cuda:0 has no bfloat16" in caplog.messages[-1]


@pytest.mark.usefixtures("quick_figures")
@pytest.mark.parametrize("given", [False, True])
def test_monitor_and_scheme_move_it_once(
    make_trainer, make_loader, make_data, tiny_flow, monkeypatch, given
):
    """What is moved here is only copied: there is no device."""
    moved, left = [], []

    def beside(bank, device, taken):
        if bank not in moved:
            moved.append(bank._moved(torch.clone))
            left.append(weakref.ref(bank))
        return moved[-1]

    monkeypatch.setattr(rows_module.RowStore, "beside_training", beside)
    x1, _ = make_data(32)
    scheme = Scheme(Oracle(LatentBank(x1)), target=Mix(), class_wise=False) if given else None
    steer = StageScheme(scheme) if given else StageScheme(target=Mix(), class_wise=False)
    monitor = PosteriorMonitor(strata=4, queries=4)
    oracles = []
    monkeypatch.setattr(
        Oracle,
        "ask",
        lambda self, *a, ask=Oracle.ask, **k: oracles.append(self) or ask(self, *a, **k),
    )
    make_trainer(monitor, steer, max_steps=2).fit(tiny_flow(), make_loader(x1))
    assert len(moved) == 1
    assert {id(oracle.bank) for oracle in oracles} == {id(moved[0])}
    gc.collect()
    assert given or left[0]() is None, "the copy on the host is let go of"


class Stream:
    """A stream that notes what is queued, in place of one of a device."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append((self.name, "waits for", other.name))

    def wait_event(self, event):
        self.log.append((self.name, "waits for", event.at))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("target", [torch.float32, torch.float64])
def test_no_buffer_is_filled_while_it_is_read(monkeypatch, target):
    """The copy into a buffer waits for the work on what it held; that work waits for its copy."""
    log = []
    main, side = Stream("main", log), Stream("side", log)

    class Event:
        def record(self, stream):
            assert stream is main
            self.at = f"work {log[-1][2]}"

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    x = torch.arange(35.0).reshape(7, 5)
    seen = []
    spans, like = [(0, 2), (2, 4), (4, 6), (6, 7)], x.new_empty(0, 5, dtype=target)
    for turn, (first, chunk) in enumerate(streaming._copied_ahead(x, spans, 2, like)):
        assert torch.equal(chunk, x[first : first + len(chunk)].to(target))
        seen.append(chunk.data_ptr())
        log.append(("main", "does", turn))
    assert seen[:2] == seen[2:]
    assert len(set(seen)) == (2 if target == x.dtype else 1), "two buffers, or one that is wider"
    assert log == [
        ("side", "waits for", "main"),
        ("main", "waits for", "side"),
        ("main", "does", 0),
        ("main", "waits for", "side"),
        ("main", "does", 1),
        ("side", "waits for", "work 0"),
        ("main", "waits for", "side"),
        ("main", "does", 2),
        ("side", "waits for", "work 1"),
        ("main", "waits for", "side"),
        ("main", "does", 3),
    ]
