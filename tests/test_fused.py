"""The kernel of the exact engine on CUDA, without a card: run by Triton's interpreter, compiled."""

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from stagewise.engines import fused

triton = pytest.importorskip("triton")

DIMS, DTYPES = (3, 64, 768, 1024), ("float32", "bfloat16", "float16")
TIMES = (0, 0.001, 0.01, 0.03, 0.1, 0.5, 0.9, 0.999, 1)
ENDS = (0, 1, 31, 101)  # of classes; a program reads 64 rows
SOURCES, CLASSES = (0, 20, 80), (0, 1, 2)


def errors(dim, dtype):
    """Of `pulled`, at each time: of m - r, of weights and statistics; and rows that are wrong."""
    generator = torch.Generator().manual_seed(dim)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    offset = normal(dim).float().double() if dtype != "float32" else torch.zeros(dim).double()
    rows = normal(ENDS[-1], dim).to(getattr(torch, dtype))
    rows[85] = rows[80]  # a duplicate, and a near one
    rows[90] = (rows[80].double() + 0.01 * normal(dim)).to(rows.dtype)
    classes, source = torch.tensor(CLASSES), torch.tensor(SOURCES)
    ends = torch.tensor(ENDS)[torch.stack([classes, classes + 1], 1)].repeat(len(TIMES), 1)
    x1 = (rows[source].double() + offset).repeat(len(TIMES), 1)
    alpha = torch.tensor(TIMES, dtype=torch.float64).repeat_interleave(len(SOURCES))
    sigma = (1 - alpha).clamp_min(1.5e-6 * dim**0.5)
    xt = alpha[:, None] * x1 + sigma[:, None] * normal(*x1.shape)
    width = int(torch.tensor(ENDS).diff().max())
    mean, told, row, logits = fused.pulled(rows, offset, xt, x1, alpha, sigma, ends, width, True)
    worst = {t: [0.0, 0.0, 0.0] for t in TIMES}
    for b, t in enumerate(alpha.tolist()):
        first, stop = ends[b].tolist()
        own = rows[first:stop].double() + offset
        exact = -(xt[b] - t * own).square().sum(1) / (2 * sigma[b] ** 2)
        weights = exact.softmax(0)
        expected = weights @ (own - x1[b])
        pull = mean[b] - x1[b]
        # What is left of m once r is subtracted again has the digits of r.
        wrong = (pull - expected).norm() / expected.norm().clamp_min(1e-8)
        entropy = -torch.special.xlogy(weights, weights).sum()
        log_evidence = exact.logsumexp(0)
        sums = torch.stack([1 / weights.square().sum(), weights.max(), log_evidence])
        off = max(
            (torch.stack([*told[b][2:4], told[b][0]]) / sums - 1).abs().max(),
            (told[b][1] - entropy).abs(),
            (logits[b, : len(own)].double().softmax(0) - weights).abs().max(),
        )
        beyond = (logits[b, len(own) :] != -torch.inf).sum()
        beyond += weights[row[b] - first] < weights.max() * (1 - 1e-5)
        figures = map(float, (wrong, off, beyond))
        worst[t] = [max(pair) for pair in zip(worst[t], figures, strict=True)]
    return worst


@pytest.fixture(scope="module", params=[DIMS[:2], pytest.param(DIMS[2:], marks=pytest.mark.slow)])
def interpreted(request):
    """`errors` with the kernels run on the CPU, which Triton must know before it is imported."""
    run = subprocess.run(
        [sys.executable, __file__, *map(str, request.param)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pull_against_float64(interpreted, dtype, t):
    assert len(interpreted) == 2 * len(DTYPES)
    for case, found in interpreted.items():
        if case.endswith(f" {dtype}"):
            pull, weights, beyond = found[str(t)]
            assert pull <= 2e-6, case
            assert weights <= 2e-6, case
            assert beyond == 0, case


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("dim", "dtype"),
    [(4096, "bf16"), (8192, "fp16"), (4096, "fp32"), (8192, "fp32"), (768, "bf16")],
)
def test_compiles_without_spills(tmp_path, capability, dim, dtype):
    """By the report of the assembler, and with loads of 16 bytes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    size = 4 if dtype == "fp32" else 2
    block, at_once, warps = fused.shape_of(dim, size)
    names = fused.pull.arg_names
    kinds = dict.fromkeys(names[:9], "*fp32") | {"rows": f"*{dtype}", "width": "i32"}
    kinds |= {"factors": "*fp64", "ends": "*i64", "best": "*i64"}
    fixed = {"dim": dim, "block": block, "split": 64, "at_once": at_once, "listed": False}
    kernel = triton.compile(
        ASTSource(
            fused.pull,
            kinds | dict.fromkeys(fixed, "constexpr"),
            {(names.index(name),): value for name, value in fixed.items()},
            {(at,): [["tt.divisibility", 16]] for at in range(9)},
        ),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps},
    )
    ptx = kernel.asm["ptx"]
    wide = len(re.findall(r"ld\.global[.\w:]*\.v4\.b32", ptx)) * 16 * 32 * warps
    assert wide >= 2 * at_once * block * size  # rows, before the loop and in it
    (tmp_path / "kernel.ptx").write_text(ptx)
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    assembler = folder / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    architecture = re.search(r"\.target (\w+)", ptx)[1]
    report = subprocess.run(
        [assembler, "-v", f"--gpu-name={architecture}", "kernel.ptx", "-o", "kernel.bin"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert re.findall(r"(\d+) bytes spill", report) == ["0", "0"], report


if __name__ == "__main__":
    dims = map(int, sys.argv[1:])
    found = {f"{dim} {dtype}": errors(dim, dtype) for dim, dtype in product(dims, DTYPES)}
    print(json.dumps(found))
