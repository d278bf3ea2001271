"""Between the probes no callback waits for the device: counted over whole steps of a trainer.

On a CPU nothing waits, so what would wait on an accelerator is counted where it is asked for: what
reads a number (`item`, `bool`, `tolist`, ...), what copies to the host (`cpu`, `numpy`,
`to("cpu")`), and what makes a tensor whose shape hangs on numbers (`nonzero`, a mask as index).
"""

import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import stagewise
import stagewise.callbacks
import stagewise.losses
from stagewise import CosinePath, EDMPath, LinearPath, VPPath, copies, nearest_rows, products
from stagewise.adapters import one_target_maker
from stagewise.bank import row_classes
from stagewise.binned_sums import BinnedSums
from stagewise.callbacks import (
    MemorizationMonitor,
    PosteriorMonitor,
    StageTransitions,
    VelocityErrorMonitor,
)
from stagewise.engines import Auto, Exact, Nearest, all_rows, fused

pytestmark = pytest.mark.usefixtures("quick_figures")

OURS = tuple(
    str(Path(package.__file__).parent)
    for package in (stagewise, stagewise.callbacks, stagewise.losses)
)
METHODS = ("cpu", "tolist", "numpy", "__array__")
SHAPED = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal")

ON_A_CPU_ONLY = "check_times"
"""On an accelerator it asserts on the device; `test_a_step_on_cuda_waits_for_nothing` runs it."""


class HostSyncs(TorchDispatchMode):
    """Notes every host sync that has a frame of some folders on its stack.

    Args:
        folders: The folders.
    """

    def __init__(self, folders):
        super().__init__()
        self.folders, self.places = folders, []

    def note(self, what):
        frame, place = sys._getframe(1), None
        while frame is not None:
            code = frame.f_code
            if code.co_name == ON_A_CPU_ONLY:
                return
            if place is None and code.co_filename.startswith(self.folders):
                place = f"{what} in {code.co_filename}:{frame.f_lineno} ({code.co_name})"
            frame = frame.f_back
        if place:
            self.places.append(place)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        sized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name == "_local_scalar_dense" or name in SHAPED or masked or sized:
            self.note(name)
        return func(*args, **(kwargs or {}))

    @contextmanager
    def counting(self):
        """What does not reach a dispatch mode is counted where it is called."""
        with ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            for name in METHODS:
                patch.setattr(torch.Tensor, name, self.noted(name))
            patch.setattr(torch.Tensor, "to", self.noted("to", _names_cpu))
            stack.enter_context(self)
            yield self

    def noted(self, name, if_=lambda *_, **__: True):
        method = getattr(torch.Tensor, name)

        def call(tensor, *args, **kwargs):
            if if_(*args, **kwargs):
                self.note(name)
            return method(tensor, *args, **kwargs)

        return call


def _names_cpu(*args, **kwargs):
    return any(isinstance(arg, str) and arg == "cpu" for arg in (*args, *kwargs.values()))


@pytest.mark.parametrize(
    "sync",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: int(x[0]),
        lambda x: bool(x.any()),
        lambda x: "yes" if x[0] > 0 else "no",
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.to(device="cpu"),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: list(range(x.argmax())),
    ],
)
def test_the_counter_sees_it(sync):
    x = torch.arange(1.0, 5.0)
    with HostSyncs((str(Path(__file__).parent),)).counting() as ours:
        (x * 2).sum().clamp(0)
        assert ours.places == []
        sync(x)
    assert ours.places
    with HostSyncs(OURS).counting() as others:
        sync(x)
    assert others.places == [], "not by a file of the library"


class Marks(pl.Callback):
    """Notes which syncs belong to which batch; stands after all others."""

    def __init__(self, syncs):
        self.syncs, self.by_batch = syncs, Counter()
        self.seen = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.by_batch[batch_idx] = self.syncs.places[self.seen :]
        self.seen = len(self.syncs.places)


@pytest.mark.parametrize(
    ("options", "labelled"),
    [({"gradient_clip_val": 1.0}, True), ({"precision": "bf16-mixed"}, False)],
)
def test_between_the_probes_nothing_waits(
    make_trainer, make_loader, make_data, tiny_flow, tmp_path, options, labelled
):
    monitors = [
        PosteriorMonitor(every_n_steps=10, strata=4, queries=4),
        VelocityErrorMonitor(every_n_steps=10, strata=4, queries=4),
        MemorizationMonitor(every_n_steps=10, samples=4, steps=4),
        StageTransitions(),
    ]
    x, labels = make_data(15 * 8, classes=3 if labelled else 0)
    model = tiny_flow()
    model.validation_step = lambda batch, batch_idx: None
    syncs = HostSyncs(OURS)
    marks = Marks(syncs)
    trainer = make_trainer(
        *monitors,
        marks,
        max_steps=15,
        log_every_n_steps=13,
        logger=CSVLogger(tmp_path),
        **options,
    )
    with syncs.counting():
        trainer.fit(model, make_loader(x, labels), make_loader(make_data(16)[0]))
    # Probes of the model come after the first step and after the 10th, that of the data before
    # them; after the 13th the training batches are logged, and after the last the model is probed.
    # After the eighth batch the noise of all so far is looked at, once.
    expected = {0, 7, 9, 10, 12, 14}
    assert {batch for batch, places in marks.by_batch.items() if places} == expected, marks.by_batch
    assert len(marks.by_batch) == 15


VIEWS = {
    *("alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split", "t"),
    *("transpose", "unbind", "unsqueeze", "view", "_unsafe_view", "empty", "empty_like"),
    *("new_empty", "split_with_sizes", "scalar_tensor"),
}


class Launches(TorchDispatchMode):
    """Counts what starts a kernel on an accelerator, and notes copies to it that wait.

    Fake tensors raise where numbers are read back.
    """

    def __init__(self):
        super().__init__()
        self.count, self.waits = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, (tuple, list)) and out else out
        if name == "_assert_async" and args[0].is_cuda:
            self.count += 1
        there = isinstance(first, torch.Tensor) and first.is_cuda
        if name == "launch" or (there and name not in VIEWS):
            self.count += 1
            given = [x for x in args if isinstance(x, torch.Tensor) and x.ndim]
            if any(x.device.type == "cpu" for x in given):
                self.waits.append((name, [tuple(x.shape) for x in given]))
        return out


@pytest.fixture(scope="module")
def bank():
    bank = stagewise.LatentBank(
        torch.randn(120, 4, 4, 4), torch.arange(120) // 12, dtype=torch.bfloat16
    )
    bank.row_keys()
    return bank


@pytest.fixture
def on_cuda(bank):
    """An oracle of a class-wise bank and a batch with its labels, all on a fake CUDA device."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        oracle = stagewise.Oracle(bank.to("cuda"))
        x1, xt = torch.randn(2, 8, 4, 4, 4, device="cuda")
        batch = {"xt": xt, "t": torch.rand(8, device="cuda"), "x1": x1}
        yield oracle, batch, torch.zeros(8, dtype=torch.int64, device="cuda")


@pytest.mark.parametrize("path", [LinearPath(), CosinePath(), EDMPath(), VPPath()], ids=repr)
def test_a_class_wise_posterior_is_a_few_launches(on_cuda, path):
    """As many for each path of the library."""
    oracle, batch, labels = on_cuda
    oracle = stagewise.Oracle(oracle.bank, path)
    source = torch.zeros_like(labels)
    queries = oracle.queries(batch["xt"], batch["t"], labels, source)
    assert queries.segments is None, "labels were not read back"
    known = replace(queries, x1=queries.xt)
    xt, t, x1 = batch["xt"], batch["t"], batch["x1"]
    for ask, most in (
        (lambda: oracle.engine.posterior(oracle.bank, known), 3),
        (lambda: oracle.engine.posterior(oracle.bank, queries), 9),
        (lambda: oracle.posterior(xt, t, labels), 12),
        (lambda: oracle.posterior(xt, t, labels, k=3), 19),
        (lambda: oracle.correction(xt, t, x1, labels), 11),
        (lambda: oracle.velocity(xt, t, labels), 20),
    ):
        with Launches() as launches:
            ask()
        assert launches.waits == []
        assert launches.count <= most


KEPT = (64,)
"""The odd numbers of the keys, which go to a real device once."""

DRAWN = ((8, 3), (10, 3), (256, 3), (1, 3))
"""Random numbers from the host, pinned and not waited for on a real device."""

SEVERAL = [
    *((stagewise.Mix(lam), 16) for lam in (1.0, "boundary")),
    (stagewise.Mix(stagewise.Concentration()), 25),
    (stagewise.Mix(stagewise.Smooth()), 29),
    (stagewise.ReferenceSet(4), 29),
    (stagewise.ReferenceSet(4, "boundary"), 30),
    (stagewise.ReferenceSet(4, shared=True), 33),
]


@pytest.mark.parametrize(
    ("target", "most", "labelled", "dtype"),
    [
        *((*some, labelled, torch.float32) for some in SEVERAL for labelled in (True, False)),
        *((*some, k % 4 == 0, torch.bfloat16) for k, some in enumerate(SEVERAL) if k % 2 == 0),
    ],
    ids=repr,
)
def test_a_step_of_a_scheme_waits_for_nothing(on_cuda, target, most, labelled, dtype):
    oracle, batch, labels = on_cuda
    scheme = stagewise.Scheme(oracle, target=target, boundary=0.3)
    scheme._fits = scheme.rows_checked = True  # looks at the numbers of the first call
    batch = {**batch, "x1": batch["x1"].to(dtype)}  # samples of fewer digits than the bank's
    for _ in range(2):  # the first call looks at all rows, and keeps what it finds
        with Launches() as launches:
            u, weight = scheme(batch["x1"], **batch, labels=labels if labelled else None)
    assert u.device == weight.device == labels.device
    assert u.dtype == dtype
    assert all(shapes[0] in (KEPT, *DRAWN) for _, shapes in launches.waits), launches.waits
    assert launches.count <= most


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_whole_step_is_36_launches(on_cuda, by_hand):
    oracle, batch, labels = on_cuda
    options = {"timesteps": stagewise.StageAware(0.3), "weight": stagewise.MinSNR()}
    mix = stagewise.Mix("boundary")
    scheme = stagewise.Scheme(oracle, target=mix, boundary=0.3, **options)
    scheme._fits = scheme.rows_checked = True
    ask = scheme
    if by_hand:
        ask = stagewise.StageTarget()
        told = []
        one_target_maker(ask).observe(told.append)
        ask.scheme, ask._fits = scheme, True
    with Launches() as launches:
        draw = scheme.timesteps.sample
        batch["t"] = ask.times(batch["t"]) if by_hand else draw(8, device="cuda")
        ask(batch["x1"], **batch, labels=labels)
    assert not by_hand or told[0].x0.is_cuda
    few = 63 if by_hand else 36  # an observer looks on
    assert launches.count - len(launches.waits) <= few


def test_a_step_with_masks_waits_for_nothing_more():
    x1, lengths = torch.randn(80, 6, 2), torch.arange(80) % 2 + 5
    mask = torch.arange(6) < lengths[:, None]
    bank = stagewise.LatentBank(x1, torch.arange(80) % 4, mask=mask)
    with FakeTensorMode(allow_non_fake_inputs=True):
        scheme = stagewise.Scheme(stagewise.Oracle(bank.to("cuda")), target=stagewise.Mix())
        scheme._fits = scheme.rows_checked = True
        scheme.last = object()  # as if it were not the first call
        x1, xt = torch.randn(2, 8, 6, 2, device="cuda")
        batch = {"xt": xt, "t": torch.rand(8, device="cuda"), "x1": x1}
        labels = torch.zeros(8, dtype=torch.int64, device="cuda")
        mask = torch.ones(8, 6, dtype=torch.bool, device="cuda")
        with Launches() as launches:
            scheme(x1, **batch, labels=labels, mask=mask)
    # The table of classes, the keys of masks and the odd numbers go to a real device once.
    assert {shapes[0] for _, shapes in launches.waits} == {(6, 3), (80,), (12,)}


@pytest.mark.parametrize(
    "target", [stagewise.Mix(), stagewise.ReferenceSet(4), stagewise.ReferenceSet(10, shared=True)]
)
def test_ends_on_the_device_are_segments_on_the_host(target):
    """What is asked with `ends`, as labels on a device are, is answered as with segments."""
    x1 = torch.randn(40, 6, dtype=torch.float64)
    oracle = stagewise.Oracle(stagewise.LatentBank(x1, torch.arange(40) // 10))
    t, labels = torch.full((8,), 0.3), torch.arange(8) // 2
    source = 10 * labels + torch.arange(8)
    x1 = oracle.bank.take(source)
    xt = 0.3 * x1 + 0.7 * torch.randn_like(x1)
    told = replace(oracle.queries(xt, t, labels, source), x1=x1, twin=source)
    ends = torch.stack([10 * labels, 10 * labels + 10], dim=1)
    asked = replace(told, segments=None, labels=None, ends=ends)
    assert asked.on_host().segments == told.segments
    assert torch.equal(asked.holds(source), told.holds(source))
    one, two = (target.mean(oracle, queries, Random(0)) for queries in (told, asked))
    torch.testing.assert_close(one.difference, two.difference, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(one.top1, two.top1, rtol=1e-9, atol=1e-12)


def test_who_reads_labels_on_the_device(bank, on_cuda):
    """Not for a bank on the host, for few large classes, or for the reference."""
    oracle, batch, labels = on_cuda
    assert oracle.reads_on_device(labels, batch["xt"])
    assert not stagewise.Oracle(bank).reads_on_device(labels, batch["xt"])
    bank, device = oracle.bank, labels.device
    assert Exact().reads_ends(bank, device, 80)
    assert Auto().reads_ends(bank, device, 80)
    assert not Exact("float64").reads_ends(bank, device, 8)
    assert not Nearest(3).reads_ends(bank, device, 8)
    assert not Exact().reads_ends(bank, torch.device("cpu"), 8)


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def large(request, bank):
    """The bank of ImageNet's latents, without numbers, and 256 noisy samples."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        rows = torch.empty(1_281_167, 4096, dtype=request.param, device="cuda")
        large = object.__new__(stagewise.LatentBank)
        large.__dict__.update(bank.__dict__, rows=rows, shape=(4, 32, 32), largest_class=1300)
        large._class_table = {}
        keys = torch.empty(2, len(rows), dtype=torch.int64, device="cuda").unbind()
        large._sorted_keys = {None: keys, torch.bfloat16: keys}
        wide = {"dtype": torch.float64, "device": "cuda"}
        large.offset, large.centre = torch.empty(2, 4096, **wide)
        large.sq_norms, large.mean_sq_norm = torch.empty(len(rows), **wide), torch.empty((), **wide)
        xt = torch.randn(256, 4, 32, 32, device="cuda")
        yield large, xt, torch.rand(256, device="cuda")


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_all_rows_of_imagenet_are_a_few_launches(large, precision):
    bank, xt, t = large
    oracle = stagewise.Oracle(bank, engine=Exact(precision))
    for ask in (
        lambda: oracle.posterior(xt, t),
        lambda: oracle.posterior(xt, t, k=3),
        lambda: oracle.correction(xt, t, xt),
        lambda: oracle.velocity(xt, t),
    ):
        with Launches() as launches:
            ask()
        assert launches.waits == []
        assert launches.count <= 37


def test_many_queries_take_no_more_memory_than_is_stated(large):
    """Each part of a call's queries has its own logits, and partial sums of a second answer."""
    bank, xt, t = large
    held = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ == "empty":
                held.append(out.nbytes)
            return out

    bank.rows, bank.sq_norms = bank.rows[:4000].clone(), bank.sq_norms[:4000].clone()
    xt = xt[:1].expand(20_000, -1, -1, -1)
    with Made():
        stagewise.Oracle(bank, engine=Exact()).posterior(xt, t[:1].expand(20_000))
    assert 2**28 < max(held) <= 2**32


@pytest.mark.parametrize("class_wise", [True, False])
def test_a_card_without_products_of_these_rows_reads_them(large, monkeypatch, class_wise):
    """An old card has none of bfloat16, and torch before 2.8 none of 16 bits."""
    bank, xt, t = large
    monkeypatch.setattr(products, "_multiplies", lambda dtype: False)
    started, launch = [], fused.launch
    for module in (fused, all_rows):
        monkeypatch.setattr(
            module, "launch", lambda name, *args: started.append(name) or launch(name, *args)
        )
    labels = torch.zeros(256, dtype=torch.int64, device="cuda") if class_wise else None
    stagewise.Oracle(bank).posterior(xt, t, labels)
    assert ("project" in started) == (bank.dtype == torch.float32 and not class_wise)
    assert "pull" in started


@pytest.mark.parametrize("target", [target for target, _ in SEVERAL], ids=lambda x: repr(x))
@pytest.mark.parametrize("class_wise", [True, False])
def test_a_step_with_imagenet_waits_for_nothing(large, target, class_wise):
    bank, xt, t = large
    if (
        not class_wise
        and target.lam.sparse
        and not target.reads_rows
        and bank.dtype == torch.float32
    ):
        pytest.skip("products of float32 rows cost more than a wait, by which fewer are computed")
    scheme = stagewise.Scheme(
        stagewise.Oracle(bank), target=target, boundary=0.3, class_wise=class_wise
    )
    scheme._fits = scheme.rows_checked = True
    labels = torch.zeros(256, dtype=torch.int64, device="cuda") if class_wise else None
    with Launches() as launches:
        scheme(xt, xt=xt, t=t, x1=xt, labels=labels)
    # The table of classes and the odd numbers go to a real device once.
    once = ((4096,), (10, 3))
    assert all(shapes[0] in (*once, *DRAWN) for _, shapes in launches.waits), launches.waits
    assert launches.count <= (34 if class_wise else 50)


@pytest.mark.parametrize(
    ("count", "width", "rows"), [(256, 1300, True), (256, 400_000, False), (1, 1_281_167, True)]
)
def test_rows_are_read_or_multiplied_as_costs_less(large, count, width, rows):
    assert fused.by_rows(large[0], count, width) == rows


def test_times_of_any_layout_reach_the_kernel_whole(on_cuda):
    """A kernel reads memory as it lies: an expanded time must not reach it."""
    oracle, batch, labels = on_cuda
    t = torch.rand((), dtype=torch.float64, device="cuda").expand(8)
    oracle.queries(batch["xt"], t, labels)  # to the path's kernel too
    of_another_library = type("Other", (LinearPath,), {})()
    queries = stagewise.Oracle(oracle.bank, of_another_library).queries(batch["xt"], t, labels)
    assert queries.path.alpha.stride() == (0,)
    fused.posterior(oracle.bank, queries, 1, 12)  # where it is launched, each tensor is looked at
    with pytest.raises(AssertionError, match="prepare"):
        fused.launch("prepare", [8], [queries.xt, queries.path.alpha], [], [])


def test_what_is_wrong_on_a_device_is_told_by_the_next_call(bank, monkeypatch):
    """On a device the answer of the call itself is that of no rows, and nothing waits."""
    late, known = [], torch.full((3,), row_classes.KNOWN)
    monkeypatch.setattr(row_classes, "_sent", lambda told: (told, lambda: bool(late)))
    bank.report(known.clone().fill_(99).where(torch.arange(3) == 1, known))
    bank.report(known)
    late.append(True)
    with pytest.raises(ValueError, match="Class 99 is not in the bank, which has 10 classes"):
        bank.report(known)
    bank.report(known)
    bank._unknown.clear()


def test_sums_by_bins_wait_for_nothing():
    sums = BinnedSums.empty([0.0, 0.1, 0.6, 1.0], "ab")
    with HostSyncs(OURS).counting() as syncs:
        sums.update(torch.rand(500), torch.randn(2, 500))
    assert syncs.places == []


@pytest.mark.parametrize("samples", [8, 300])
def test_nearest_rows_wait_once_for_all_samples(bank, samples, monkeypatch):
    """To know that no sample needs a second look."""
    x = torch.randn(samples, 4, 4, 4)
    x[3] = torch.nan
    # One look at bounds and one gathering for each 256, as an accelerator has it.
    monkeypatch.setattr(nearest_rows, "_GATHER", {"cpu": 2**26})
    with HostSyncs(OURS).counting() as syncs:
        copies.nearest_rows(bank, x)
    assert len(syncs.places) == 1, syncs.places


@pytest.mark.parametrize("labels", [False, True])
def test_no_grid_is_larger_than_cuda_allows(large, on_cuda, monkeypatch, labels):
    """Neither by a class of a million rows nor by 70 000 queries."""
    grids, launch = [], fused.launch

    def noted(name, grid, *args):
        grids.append(grid)
        launch(name, grid, *args)

    for module in (fused, all_rows):
        monkeypatch.setattr(module, "launch", noted)
    stagewise.Oracle(large[0]).posterior(large[1][:1], large[2][:1])
    xt = torch.empty(70_000, 4, 4, 4, device="cuda")
    asked = torch.zeros(70_000, dtype=torch.int64, device="cuda") if labels else None
    stagewise.Oracle(on_cuda[0].bank).posterior(xt, xt[:, 0, 0, 0], asked)
    assert max(grid[1] for grid in grids if len(grid) > 1) <= 65535
    assert max(grid[0] for grid in grids) < 2**31
    assert [1] in grids, "all of one call's queries"
