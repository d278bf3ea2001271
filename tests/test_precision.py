"""Training in fewer digits than the bank has: its rows are found, and the targets are the same."""

import pytest
import torch

from stagewise import LatentBank, LinearPath, Mix, Oracle, Scheme

DTYPES = {torch.bfloat16: 2**-7, torch.float16: 2**-9}


def mixed(bank, x1, x, t):
    """`m` as a scheme's target has it, and which samples joined the rows."""
    path, generator = LinearPath(), torch.Generator().manual_seed(1)
    x0 = torch.randn(x.shape, generator=generator)
    xt = path.interpolate(x0, x, t)
    scheme = Scheme(Oracle(bank, path), target=Mix())
    scheme._fits = True  # x_1 is rounded or resampled after x_t is made
    target, _ = scheme((x - x0), xt=xt, t=t, x1=x1)
    return xt + (1 - t[:, None]) * target, scheme.last.inserted


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", [torch.float32, torch.float64])
def test_five_rows_asked_in_16_bits(stored, dtype):
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    bank, t = LatentBank(x.to(stored)), torch.tensor([0.0, 0.05, 0.2, 0.5, 0.9])
    want, joined = mixed(bank, x, x, t)
    assert not joined.any()
    got, joined = mixed(bank, x.to(dtype), x, t)
    assert not joined.any()
    error = (got - want).norm(dim=1) / want.norm(dim=1)
    assert (error < DTYPES[dtype]).all()


def test_what_is_no_row_in_16_bits_still_joins():
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    resampled = (
        x + 0.1 * torch.randn(5, 12, generator=torch.Generator().manual_seed(2))
    ).bfloat16()
    _, joined = mixed(LatentBank(x), resampled, x, torch.full((5,), 0.3))
    assert joined.all()
