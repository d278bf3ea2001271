"""The kernels of the exact engine on CUDA without a card: run by an interpreter, and compiled."""

import gc
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import cycle, product
from random import Random

import pytest
import torch

from stagewise import (
    CosinePath,
    EDMPath,
    LatentBank,
    LinearPath,
    Mix,
    Oracle,
    ReferenceSet,
    Scheme,
    VPPath,
    products,
)
from stagewise.engines import Exact, all_rows, fused, fused_path, kernels
from stagewise.paths import Prediction
from stagewise.schemes import correction

triton = pytest.importorskip("triton")

DIMS, DTYPES = (3, 64, 768, 1024), ("float32", "bfloat16", "float16")
TIMES = (0, 0.01, 0.1, 0.5, 0.999, 1)
LABELS = torch.bucketize(
    torch.arange(101), torch.tensor([1, 31]), right=True
)  # a program reads 64 rows
SOURCES = torch.tensor([0, 20, 80])
WAYS = ("class", "all", "all_class", "all_again")


def errors(dim, dtype, way, turn):
    """At each time: of m - x_1, of weights and statistics; and rows that are wrong.

    Each time has one source, and with every turn another one.
    """
    generator = torch.Generator().manual_seed(dim)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(len(LABELS), dim) + normal(dim)
    x[85] = x[80]  # a duplicate, and a near one
    x[90] = x[80] + 0.01 * normal(dim)
    bank = LatentBank(x, LABELS, dtype=getattr(torch, dtype))
    t = torch.tensor(TIMES, dtype=torch.float64)
    source = SOURCES.roll(turn).repeat(len(TIMES) // len(SOURCES))
    x1 = bank.take(source)
    xt = t[:, None] * x1 + (1 - t[:, None]) * normal(*x1.shape)
    labels = LABELS[source].tolist() if "class" in way else None
    queries = Oracle(bank, engine=Exact("float64")).queries(xt, t, labels)
    queries, k = replace(queries, x1=x1 if way != "all" else None), max(queries.sizes)
    if way == "class":
        post = fused.posterior(bank, queries, k, k)
    else:
        post = all_rows.posterior(bank, queries, 3, 1e-30 if "again" in way else 1e-4)
    found = {}
    for b, time in enumerate(TIMES):
        own = bank.take(torch.arange(len(bank))[queries.segments[b]])
        gap = queries.xt[b] - queries.path.alpha[b] * own
        exact = -gap.square().sum(1) / (2 * queries.path.sigma[b] ** 2)
        weights = exact.softmax(0)
        expected = weights @ (own - x1[b])
        # What is left of m once x_1 is subtracted again has the digits of x_1.
        wrong = (post.mean[b] - x1[b] - expected).norm() / expected.norm().clamp_min(1e-8)
        entropy = -torch.special.xlogy(weights, weights).sum()
        told = torch.stack([post.ess[b], post.weights[b, 0], post.log_evidence[b]])
        sums = torch.stack([1 / weights.square().sum(), weights.max(), exact.logsumexp(0)])
        there = post.rows[b] >= 0
        place = (post.rows[b] - queries.segments[b].start)[there]
        statistics = (
            ((told - sums) / sums.where(sums != 0, 1)).abs().max(),
            (post.entropy[b] - entropy).abs(),
            (post.weights[b, there] - weights[place]).abs().max(),
        )
        off = torch.stack(statistics).max()  # NaN is not lost, as it would be in Python's
        missed = (~there).sum() != post.rows.shape[1] - min(post.rows.shape[1], len(own))
        found[time] = [*map(float, (wrong, off, missed))]
    return found


def corners():
    """Banks whose rows are all equal, and more nearly equal rows than lead."""
    t = torch.tensor([0.0, 0.5, 1.0, 1.0], dtype=torch.float64)
    for size, dtype in product((0.7, 0.0), (torch.float32, torch.bfloat16)):
        bank, row = LatentBank(torch.full((40, 3), size), dtype=dtype), torch.full((4, 3), size)
        x1 = bank.take(torch.arange(4))
        xt = t[:, None] * x1 + (1 - t[:, None]) * torch.randn(4, 3)
        xt[3] += 1  # not from a row
        queries = Oracle(bank).queries(xt, t)
        for known in (x1, None):
            asked = replace(queries, x1=known)
            for post in (
                fused.posterior(bank, asked, 2, 40),
                all_rows.posterior(bank, asked, 2, 1e-4),
            ):
                torch.testing.assert_close(post.mean, bank.take(torch.arange(4)))
                torch.testing.assert_close(post.mean.float(), row, rtol=1e-2, atol=1e-6)
                torch.testing.assert_close(post.ess, torch.full_like(t, 40.0))
                torch.testing.assert_close(post.weights, torch.full((4, 2), 1 / 40).double())
    exact, generator = Exact("float64"), torch.Generator().manual_seed(0)
    bank, t = LatentBank(torch.randn(40, 3, generator=generator)), torch.tensor([0.5, 0.99, 0.0])
    for away in (1e11, 1e15):  # where float64 tells rows apart, and where it does not
        queries = Oracle(bank, engine=exact).queries(torch.full((3, 3), away), t)
        expected = exact.posterior(bank, queries).mean
        assert torch.equal(expected.isnan().all(1), (t > 0) & (away > 1e12))
        for post in (
            fused.posterior(bank, queries, 1, 40),
            all_rows.posterior(bank, queries, 1, 1e-4),
        ):
            torch.testing.assert_close(post.mean, expected, equal_nan=True, rtol=1e-6, atol=1e-6)
    for dim, spread in product((2, 17), (0.0, 1e-5)):
        x = torch.randn(107, dim, generator=generator)
        x[20:60] = x[20] + spread * torch.randn(40, dim, generator=generator)
        bank = LatentBank(x)
        x1 = bank.take(torch.arange(20, 32))
        t = torch.tensor([1 - 1e-5, 1.0], dtype=torch.float64).repeat(6)
        xt = t[:, None] * x1 + (1 - t[:, None]) * torch.randn(x1.shape, generator=generator)
        queries = Oracle(bank, engine=exact).queries(xt, t)
        expected, post = exact.posterior(bank, queries), all_rows.posterior(bank, queries, 1, 1e-4)
        torch.testing.assert_close(post.mean, expected.mean, rtol=0, atol=1e-4 * spread + 1e-7)
        torch.testing.assert_close(post.ess, expected.ess, rtol=1e-4, atol=0)


def along_paths():
    """The coefficients of each path, in one launch, to the last digits."""
    t = torch.rand(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.cat([torch.tensor([0, 1, 1e-9, 1 - 1e-9, 1 - 1e-5]).double(), t])
    paths = [LinearPath(), CosinePath(), VPPath(), VPPath(0.01, 2000), VPPath(1e-5, 1)]
    for path in (*paths, EDMPath(), EDMPath(1e-4, 1, 3.5)):
        for times in (t, t.float(), t[:1].bfloat16(), t[None].expand(2, -1).T[:, 0]):
            settings = fused_path._settings(path)
            found = fused_path._launched(times, settings, 1e-6)
            expected = torch.stack([*path(times.double()).floored(1e-6)])
            torch.testing.assert_close(found, expected, rtol=3e-13, atol=0)


@pytest.fixture(scope="module")
def interpreted():
    """`errors` of all cases, with the kernels run on the CPU, for which Triton asks at import."""
    run = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_pull_against_float64(interpreted, way):
    cases = [case for case in interpreted if case.endswith(f" {way}")]
    assert len(cases) == 2 * len(DTYPES)
    for case, t in product(cases, map(str, TIMES)):
        pull, weights, missed = interpreted[case][t]
        # Logits of rows that do not lead are those of a product, which an `rtol` of 1e-4 allows.
        by_product = way in ("all", "all_class")
        assert pull <= (1.5e-4 if by_product else 2e-6), (case, t)
        assert weights <= (1e-5 if by_product else 2e-6), (case, t)
        assert missed == 0, (case, t)


@pytest.mark.parametrize(
    ("dim", "dtype", "reads", "capability"),
    [
        # The widest rows on each card, and each way to read on one.
        *((8192, "fp32", "ends", capability) for capability in (80, 90, 100)),
        *((8192, "fp32", "table", 80), (8192, "fp32", "chosen", 90)),
        *((4096, "bf16", "ends", 90), (4096, "bf16", "table", 100), (4096, "bf16", "chosen", 80)),
        *((8192, "fp16", "ends", 100), (4096, "fp32", "ends", 90), (768, "bf16", "ends", 80)),
    ],
)
def test_compiles_without_spills(assembled, dim, dtype, reads, capability):
    """By the report of the assembler, and with loads of 16 bytes."""
    size = 4 if dtype == "fp32" else 2
    block, at_once, warps = kernels.shape_of(dim, size)
    names = kernels.pull.arg_names
    kinds = dict.fromkeys(names[:10], "*fp32") | {"rows": f"*{dtype}", "order": "*i32"}
    kinds |= {"factors": "*fp64", "ends": "*i64", "best": "*i64"}
    kinds |= dict.fromkeys(("width", "held", "split"), "i32")
    fixed = {"dim": dim, "block": block, "at_once": at_once, "listed": reads == "table"}
    fixed |= {"tabled": reads == "table", "chosen": reads == "chosen"}
    ptx, spilled = assembled(kernels.pull, kinds, fixed, capability, warps)
    wide = len(re.findall(r"ld\.global[.\w:]*\.v4\.b32", ptx)) * 16 * 32 * warps
    assert wide >= 2 * at_once * block * size  # rows, before the loop and in it
    assert spilled == ["0", "0"]


def test_what_a_kernel_reads_counts_as_untouched():
    """Otherwise a sample that autograd has saved could not be asked for."""
    arguments = torch.ops.stagewise.launch.default._schema.arguments
    changed = [each.name for each in arguments if each.alias_info and each.alias_info.is_write]
    assert changed == ["written"]


AROUND = {  # what is no pointer to float64, and what is fixed
    "prepare": (
        dict.fromkeys(("query", "origin"), "*fp32") | dict.fromkeys(("far", "slight"), "fp32"),
        {"dim": 4096, "block": 4096},
    ),
    "merge": (
        {"sums": "*fp32", "best": "*i64", "pulls": "*fp32", "rows": "*i64", "order": "*i32"}
        | dict.fromkeys(("queries", "parts", "dim"), "i32"),
        {"block": 512, "chosen": True},
    ),
    "project": ({"query": "*bf16"}, {"dim": 4096, "block": 4096, "halves": True}),
    "weigh": (
        {"logits": "*fp32", "ends": "*i64", "width": "i32"},
        {"block": 1024, "halves": True},
    ),
    "tail_sums": (dict.fromkeys(("logits", "peaks", "parts"), "*fp32") | {"width": "i32"},)
    + ({"block": 4096},),
    "tail_weights": (
        {"logits": "*fp32", "peaks": "*fp32", "ends": "*i64", "weights": "*bf16"}
        | {"width": "i32", "padded": "i32"},
        {"block": 1024, "halves": False},
    ),
    "tail_part": (
        dict.fromkeys(("averaged", "peaks", "origin", "sums", "pulls"), "*fp32")
        | dict.fromkeys(("ends", "columns", "best"), "*i64")
        | dict.fromkeys(("width", "parts", "dim", "listed"), "i32"),
        {"block": 512},
    ),
    "along_path": (
        {"count": "i32"} | dict.fromkeys(("least", "first", "second", "third"), "i64"),
        {"kind": 1, "block": 256},
    ),
    "scale": ({"value": "*fp32", "dim": "i32", "rounding": "fp32"}, {"block": 1024}),
    "judge": (
        {"peaks": "*fp32", "columns": "*i64", "order": "*i32"}
        | dict.fromkeys(("width", "dim", "listed"), "i32")
        | dict.fromkeys(("rtol", "unit", "growth", "rounded", "reach"), "fp32"),
        {"block": 4096},
    ),
}


@pytest.mark.parametrize(("name", "capability"), zip(AROUND, cycle([80, 90, 100]), strict=False))
def test_the_others_compile(assembled, name, capability):
    kernel = kernels._KERNELS[name]
    kinds, fixed = AROUND[name]
    kinds = {each: "*fp64" for each in kernel.arg_names if each not in fixed} | kinds
    assert set(assembled(kernel, kinds, fixed, capability, 8)[1]) == {"0"}


@pytest.fixture
def a_card(monkeypatch):
    """Nothing was said yet, and whatever device is named is taken for one that kernels run on."""
    monkeypatch.setattr(fused, "_said", set())
    monkeypatch.setattr(fused, "serves", lambda bank, device: not fused._said)


@pytest.mark.usefixtures("a_card")
def test_a_kernel_that_does_not_compile_is_told_once_and_products_answer():
    """On a CPU no kernel runs, as on a card for which it does not compile."""
    bank = LatentBank(torch.randn(40, 6, dtype=torch.float64).float())
    oracle, reference = (Oracle(bank, engine=Exact(way)) for way in ("auto", "float64"))
    xt, t = torch.randn(4, 6), torch.full((4,), 0.5)
    with pytest.warns(UserWarning, match="products are used instead: .*Error: ") as said:
        found = [oracle.posterior(xt, t).mean for _ in range(2)]
    assert len(said) == 1
    for mean in found:
        torch.testing.assert_close(mean, reference.posterior(xt, t).mean, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("a_card")
@pytest.mark.parametrize("target", [Mix("boundary"), ReferenceSet(4)], ids=repr)
@pytest.mark.parametrize("class_wise", [True, False])
def test_a_step_without_kernels_is_told_once_and_right(monkeypatch, target, class_wise):
    labels, x0 = torch.arange(40) // 10, torch.randn(8, 6)
    oracle = Oracle(LatentBank(torch.randn(40, 6), labels), engine=Exact())
    x1, t = oracle.bank.take(torch.arange(0, 40, 5)).float(), torch.linspace(0.05, 0.9, 8)
    given = {"xt": LinearPath().interpolate(x0, x1, t), "t": t, "x1": x1, "labels": labels[::5]}

    def step():
        scheme = Scheme(oracle, target=target, boundary=0.4, class_wise=class_wise)
        return scheme(x1 - x0, **given)[0]

    with pytest.warns(UserWarning, match="products are used instead") as said:
        found = step()
    assert len(said) == 1
    monkeypatch.undo()
    assert torch.equal(found, step())


@pytest.mark.usefixtures("a_card")
@pytest.mark.parametrize("kind", [ValueError, TypeError, RuntimeError, torch.OutOfMemoryError])
def test_an_error_that_is_not_of_a_kernel_reaches_the_user(recwarn, kind):
    """And kernels still answer the next call."""

    def wrong():
        raise kind("Expected something else.")

    with pytest.raises(kind, match="something else"):
        fused.runs(wrong)
    assert not fused._said
    assert not recwarn.list


@pytest.mark.usefixtures("a_card")
def test_a_class_wise_target_of_a_bank_without_classes_is_refused_and_no_more():
    oracle, x = Oracle(LatentBank(torch.randn(40, 6))), torch.randn(4, 6)
    batch = correction.Batch(
        *(x, torch.rand(4), x, Prediction("velocity"), Random(0)), class_wise=True
    )
    oracle.path = type("Other", (LinearPath,), {})()
    with pytest.raises(ValueError, match="needs a bank with labels"):
        correction.by_kernel(Mix(), oracle, batch)
    assert not fused._said


def test_kernels_start_on_the_device_of_their_tensors(monkeypatch):
    """Not on the current one; and tensors on two devices are not taken for a broken kernel."""
    entered, at = [], torch.cuda.device_of

    def device_of(tensor):
        entered.append(tensor)
        return at(tensor)

    class Kernel:
        def __getitem__(self, grid):
            def start(*arguments, num_warps):
                entered.append("started")
                raise failure

            return start

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setitem(kernels._KERNELS, "broken", Kernel())
    x, failure = torch.zeros(3), ValueError("Pointer argument cannot be accessed")
    with pytest.raises(kernels.KernelError, match="ValueError: Pointer"):
        kernels.launch("broken", [1], [x], [x.clone()], [])
    assert entered[0] is x
    assert entered[1:] == ["started"]
    y = torch.zeros(3, device="meta")
    with pytest.raises(ValueError, match="on one device, got cpu and meta"):
        kernels.launch._init_fn("broken", [1], [x], [y], [])
    failure = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        kernels.launch("broken", [1], [x], [x.clone()], [])


@pytest.mark.parametrize(
    ("version", "reason"), [(None, "Triton is not installed"), ("2.1.0", "2.1.0 is too old")]
)
def test_without_triton_it_is_said_once(monkeypatch, version, reason):
    monkeypatch.setattr(fused, "_said", set())
    library = None if version is None else type("triton", (), {"__version__": version})
    monkeypatch.setattr(kernels, "triton", library)
    bank = LatentBank(torch.randn(40, 6))
    there = type("", (), {"device": torch.device("cuda"), "dtype": bank.dtype, "rows": bank.rows})
    there.dim = 6
    assert not fused.serves(bank, torch.device("cpu"))
    with pytest.warns(UserWarning, match=f"{reason}.*pip install") as said:
        assert [fused.serves(there, torch.device("cuda")) for _ in range(3)] == [False] * 3
    assert len(said) == 1


if __name__ == "__main__":
    gc.disable()  # a tenth of the time
    torch.set_num_threads(1)
    all_rows.LEADING, products._LONG = 16, 32
    corners()
    along_paths()
    # With small and with large dimensions, each pair of dimension, dtype and way once.
    found = {}
    for dims in (DIMS[:2], DIMS[2:]):
        for turn, (i, j) in enumerate(product(range(len(DTYPES)), range(len(WAYS)))):
            case = dims[(i + j) % len(dims)], DTYPES[i], WAYS[j]
            found["{} {} {}".format(*case)] = errors(*case, turn)
    print(json.dumps(found))
