"""What a class-wise `Mix` adds on CUDA, by Triton's interpreter, against the plain way."""

import gc
import json
import os
import re
import subprocess
import sys
from random import Random

import pytest
import torch

from stagewise import Concentration, LatentBank, LinearPath, Mix, Oracle, ReferenceSet, VPPath
from stagewise.bank.row_classes import KNOWN, NO_LABEL, NO_SOURCE, NO_TIME
from stagewise.engines import Exact, fused, fused_lookup, fused_mix, kernels
from stagewise.engines.fused_lookup import ends_of, placed
from stagewise.paths import Prediction
from stagewise.schemes import correction

triton = pytest.importorskip("triton")

SHAPES = ((3, "float32"), (24, "bfloat16"))
TIMES = (0.0, 0.3, 0.999)
CASES = (
    (Mix(), "velocity", False, True, None),
    (Mix("boundary"), "noise", True, False, None),
    (Mix(Concentration()), "velocity", True, True, None),
    (Mix(), "data", False, False, None),
    (Mix(Concentration()), "velocity", True, None, None),
    (ReferenceSet(4), "velocity", True, True, None),
    (ReferenceSet(32, shared=True), "velocity", False, True, None),
    (Mix(), "velocity", False, True, torch.bfloat16),
    (ReferenceSet(3), "velocity", False, None, None),
)
"""Target, prediction, whether a source is told, whether labels decide (None: all rows are read),
and a type that x_1 is cast to."""


class Read(Exact):
    """Reads rows by the kernels, which elsewhere only a CUDA device does."""

    def posterior(self, bank, queries, k=1):
        return fused.posterior(bank, queries, k, int(queries.ends.diff(dim=1).max()))


def ends(bank, labels):
    """First row and end of some classes."""
    return torch.tensor([(bank.segment(y).start, bank.segment(y).stop) for y in labels.tolist()])


def batch(dim, dtype, turn=0):
    """A bank of unequal classes, and x_1 of every kind, each at one time: another one each turn."""
    generator = torch.Generator().manual_seed(dim)
    labels = torch.tensor([7] * 6 + [-3] * 20 + [40] + [9] * 5)
    x = 2 + torch.randn(32, dim, generator=generator)
    x[5, :2] = torch.tensor([-0.0, 0.0])
    x[10] = x[11]  # twice in its class
    x[[12, 27, 28]] = x[3].clone()  # in three classes
    bank = LatentBank(x, labels, dtype=getattr(torch, dtype))
    at = bank.index.argsort()
    noise = 0.05 * torch.randn(32, dim, generator=generator)
    # Rows; -0 and 0; one of two; one of none; resampled from one; from one of another class; a row
    # that is said to be from another class.
    kinds = [3, 5, 10, 26, 2, 15, 20, 4, 8]
    x1, y = x[kinds].clone(), labels[kinds].clone()
    x1[1, :2] = torch.tensor([0.0, -0.0])
    x1[4:7] += noise[4:7]
    source = torch.full((9,), -1)
    source[5], source[6], source[8] = at[15], at[0], at[30]
    y[7] = 9  # a row, but of another class
    t = torch.tensor([TIMES[(k + turn) % len(TIMES)] for k in range(9)])
    x0 = torch.randn(x1.shape, generator=generator)
    return bank, LinearPath().interpolate(x0, x1, t), t, x1, y, source


def errors(dim, dtype):
    """How far targets by kernels are from those by the exact engine, as a share of them."""
    worst = {}
    shape = SHAPES.index((dim, dtype))
    cases = CASES[1:6] if shape else CASES
    for turn, (what, kind, told, named, cast) in enumerate(cases, shape):
        bank, xt, t, x1, labels, source = batch(dim, dtype, turn)
        oracle, by_kernels = (Oracle(bank, engine=engine) for engine in (Exact("float64"), Read()))
        if cast:
            # The interpreter compares bfloat16 by bits, and would tell -0 from 0.
            xt, x1 = xt + t[:, None] * (x1.to(cast) - x1), x1.to(cast) + 0
        given = {"xt": xt, "t": t, "x1": x1, "prediction": Prediction(kind), "boundary": 0.4}
        given |= {"source": source if told else None, "on_missing": "insert"}
        given |= {"class_wise": named is not None}
        if named is False:  # a class is that of its row, or else what is said
            row = bank.find(x1)
            row = row.where(source < 0, source) if told else row
            known = torch.tensor(bank.labels_of(row.clamp_min(0).tolist()))
            labels = known.where(row >= 0, labels)
        asked = labels if named is not None else None
        given["draws"] = Random(0)
        expected = correction.correct(what, oracle, correction.Batch(labels=asked, **given))
        said = {"labels": asked} if named else {"labels_of": labels.clone}
        given["draws"] = Random(0)
        found = correction.by_kernel(what, by_kernels, correction.Batch(**said, **given))
        path = oracle.path(t.double()).floored(oracle.engine.sigma_floor(bank))
        x1 = x1.double()
        target = given["prediction"].target(path, (xt - t[:, None] * x1) / (1 - t)[:, None], x1)
        size = (target + expected.value).norm(dim=1)
        off = (found.value - expected.value).norm(dim=1) / size
        mixed = expected.lam > 0
        worst[f"{what} {kind} {told} {named} {cast}"] = [
            float(off.max()),
            float((found.lam - expected.lam).abs().max()),
            int(((found.inserted != expected.inserted) & mixed).sum()),
        ]
    # The row that it finds is the bank's own answer, and the class's ends are.
    labels = batch(dim, dtype)[4]
    found = placed(bank, x1, t, labels, None, True)
    segments = ends(bank, labels)
    assert torch.equal(ends_of(bank, t, labels)[0], segments)
    assert torch.equal(ends_of(bank, t, None)[0], torch.tensor([[0, len(bank)]]).expand(9, 2))
    expected = bank.find(x1, first=segments[:, 0])
    inside = (expected >= segments[:, 0]) & (expected < segments[:, 1])
    assert torch.equal(found.row >= 0, inside)  # of equal rows of the class it may be any
    assert torch.equal(bank.take(found.row[inside]), bank.take(expected[inside]))
    assert (found.row[inside] >= segments[inside, 0]).all()
    assert (found.row[inside] < segments[inside, 1]).all()
    assert torch.equal(found.missing, ~inside)
    assert torch.equal(found.ends, segments)
    assert (found.wrong == KNOWN).all()
    expected = bank.find(x1)  # of whatever class
    dropped = placed(bank, x1, t, labels.where(expected < 0, 5), None, True)
    known = torch.tensor(bank.labels_of(expected.clamp_min(0).tolist()))
    once = torch.tensor([len((bank.rows == bank.rows[i]).all(1).nonzero()) for i in expected]) == 1
    some = (expected >= 0) & once
    assert some.any()
    assert torch.equal(dropped.ends[some], ends(bank, known[some]))
    assert torch.equal(dropped.row[some], expected[some])
    assert (dropped.wrong == KNOWN).all()
    stored = bank.take(expected.clamp_min(0)).where(expected[:, None] >= 0, x1.double())
    assert torch.equal(found.near, stored)
    if not shape:  # for the others it is the same, and takes seconds
        refusals(bank, x1, t, labels)
        corners(bank, xt, x1, labels)
    return worst


def corners(bank, xt, x1, labels):
    """Samples that must be rows, infinite factors, and numbers that lie in another order."""
    t, found = torch.full((len(x1),), 0.5), bank.find(x1, first=ends(bank, labels)[:, 0])
    row = (found >= ends(bank, labels)[:, 0]) & (found < ends(bank, labels)[:, 1])
    assert row.any()
    assert not row.all()
    given = {"x1": x1, "prediction": Prediction("velocity"), "labels": labels, "class_wise": True}
    given |= {"on_missing": "error", "draws": Random(0)}
    oracle = Oracle(bank, engine=Read())
    correction.by_kernel(Mix(), oracle, correction.Batch(xt=xt, t=t, only=row, **given))
    with pytest.raises(ValueError, match="to be a row of the bank"):
        correction.by_kernel(Mix(), oracle, correction.Batch(xt=xt, t=t, **given))
    beyond = t.where(row, 1.5)  # refused for its time, in the next call
    correction.by_kernel(Mix(), oracle, correction.Batch(xt=xt, t=beyond, **given))
    with pytest.raises(ValueError, match="`t` in"):
        bank.report(torch.full((1,), KNOWN))
    bank._unknown.clear()
    given["on_missing"] = "insert"
    clean = Oracle(bank, VPPath(), Read())  # whose velocity is infinite at t = 1
    value = correction.by_kernel(Mix(), clean, correction.Batch(xt=x1, t=t + 0.5, **given)).value
    assert (value[row] == 0).all()
    turned = torch.randn(5, 3, dtype=torch.float64).T
    scaled = fused_mix._scaled(turned, torch.arange(1.0, 4.0).double(), 0.0, torch.float64)
    torch.testing.assert_close(scaled, turned * torch.arange(1.0, 4.0)[:, None], rtol=0, atol=0)


def refusals(bank, x1, t, labels):
    """What no row is placed by is noted in `wrong`, and said once."""
    nan, beyond = t * torch.nan, torch.full((len(t),), len(bank))
    for given, error, said in (
        ((t + 1.5, labels, None, True), NO_TIME, "`t` in"),
        ((nan, labels, None, True), NO_TIME, "`t` in"),
        ((t, labels, beyond, True), NO_SOURCE, "`source` below"),
        ((t, torch.full_like(labels, 5), None, True), 5, "Class 5 is not in the bank"),
        ((t, None, None, False), NO_LABEL, "cannot be looked up"),  # some are no rows
    ):
        found = placed(bank, x1, *given)
        assert found.wrong.max() == error
        assert (found.ends[:, 0] == found.ends[:, 1])[found.wrong != KNOWN].all()
        assert torch.equal(found.near.isnan().any(1), found.wrong != KNOWN)
        bank.report(found.wrong)
        with pytest.raises(ValueError, match=said):
            bank.report(found.wrong)
        bank._unknown.clear()
    for given, said in (
        ((nan, labels), "`t` in"),
        ((t, torch.full_like(labels, 8)), "Class 8 is not in the bank"),
    ):
        found, wrong = ends_of(bank, *given)
        assert (found[:, 0] == found[:, 1]).all()
        bank.report(wrong)
        with pytest.raises(ValueError, match=said):
            bank.report(torch.full((1,), KNOWN))


@pytest.fixture(scope="module")
def interpreted():
    """`errors` of each shape with the kernels run on the CPU."""
    run = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [0, 1])
def test_as_the_exact_engine(interpreted, shape):
    found = interpreted[shape]
    assert len(found) == (len(CASES), 5)[shape]
    for case, (value, lam, inserted) in found.items():
        assert value < 1e-6, case
        assert lam < 1e-6, case
        assert inserted == 0, case


def test_samples_of_another_shape_reach_no_kernel():
    """Which would read and write beyond its tensors."""
    x = torch.randn(6, 3)
    given = {"prediction": Prediction("velocity"), "draws": Random(0), "t": torch.rand(2)}
    for xt, x1, name in ((x[:2, :2], x[:2], "xt"), (x[:2], x[:2, :2], "x1")):
        batch = correction.Batch(xt=xt, x1=x1, **given)
        with pytest.raises(ValueError, match=rf"`{name}` with shape \('B', 3\)"):
            correction.by_kernel(Mix(), Oracle(LatentBank(x)), batch)


@pytest.mark.parametrize(
    ("dim", "dtype", "given", "looks", "capability"),
    [
        *((8192, "fp32", "fp32", (True, False), capability) for capability in (80, 90, 100)),
        (4096, "bf16", "fp32", (True, False), 90),
        *((4096, "bf16", "bf16", (True, True), capability) for capability in (80, 100)),
    ],
)
def test_compiles_without_spills(assembled, dim, dtype, given, looks, capability):
    """With rows and samples, or parts of them, loaded 16 bytes at a time."""
    kinds = dict.fromkeys(fused_lookup.place.arg_names, "*i64")
    kinds |= {"x1": f"*{given}", "t": "*fp32", "rows": f"*{dtype}", "missing": "*i1"}
    kinds |= dict.fromkeys(("offset", "near"), "*fp64")
    kinds |= dict.fromkeys(("count", "classes", "steps"), "i32")
    fixed = {"dim": dim, "block": kernels.part_of(dim), "exact": looks[0], "rounded": looks[1]}
    fixed |= dict.fromkeys(("told", "labelled", "named", "classed"), True)
    ptx, spilled = assembled(fused_lookup.place, kinds, fixed, capability)
    assert spilled == ["0", "0"]
    wide = len(re.findall(r"ld\.global[.\w:]*\.v4\.b32", ptx)) * 16 * 32 * 4
    sizes = {"fp32": 4, "bf16": 2}  # the key; both ends of equal keys, compared; r
    least = sum(looks) * (2 * sizes[given] + sizes[dtype]) + sizes[given] + sizes[dtype]
    assert wide >= least * fixed["block"]
    kinds = dict.fromkeys(fused_mix.settle.arg_names, "*fp64")
    kinds |= dict.fromkeys(("x1", "value"), "*fp32") | {"rows": f"*{dtype}", "rounding": "fp32"}
    kinds |= dict.fromkeys(("row_of", "listed"), "*i64")
    kinds |= dict.fromkeys(("missing", "inserted"), "*i1")
    for weighed in (True, False):
        fixed = {"dim": dim, "block": kernels.part_of(dim), "weighed": weighed}
        assert assembled(fused_mix.settle, kinds, fixed, capability)[1] == ["0", "0"]
    kinds = dict.fromkeys(fused_lookup.classify.arg_names, "*i64") | {"t": "*fp32"}
    kinds |= dict.fromkeys(("count", "classes", "steps"), "i32")
    fixed = {"labelled": True}
    assert assembled(fused_lookup.classify, kinds, fixed, capability)[1] == ["0", "0"]


if __name__ == "__main__":
    gc.disable()  # a tenth of the time
    kernels._PART = 16  # more than one part of a sample
    print(json.dumps([errors(*shape) for shape in SHAPES]))
