# ruff: noqa: ANN001 (what Triton compiles is annotated for Triton)
"""The kernels around the two products of `stagewise.engines.all_rows`, which has the formulas."""

from __future__ import annotations

from stagewise.engines.kernels import kernel, tl

__all__ = ["judge", "project", "tail_part", "tail_sums", "tail_weights", "weigh"]


@kernel
def project(
    xt,
    centre,
    shift,
    mean_norm,
    alpha,
    sigma,
    query,
    figures,
    dim: tl.constexpr,
    block: tl.constexpr,
    halves: tl.constexpr,
) -> None:
    """The left factor of the logits; its scale, `a^2/2s^2`, the shared term, and `|y|`."""
    b, count = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    at = tl.arange(0, block)
    inside = at < dim
    a, s = tl.load(alpha + b), tl.load(sigma + b)
    c = tl.load(centre + at, mask=inside, other=0.0)
    y = tl.load(xt + b * dim + at, mask=inside, other=0.0) - a * c
    q = y * (a / (s * s))
    squares, half = tl.sum(y * y, axis=0), a * a / (2 * s * s)
    shared = tl.sum(q * tl.load(shift + at, mask=inside, other=0.0), axis=0)
    shared += half * tl.load(mean_norm) + squares / (2 * s * s)
    scale = tl.full((), 1.0, tl.float64)
    if halves:  # a query divided by its largest number fits any type
        scale = tl.maximum(tl.max(tl.abs(q), axis=0), 1e-38)
    kind = query.dtype.element_ty
    q = (q / scale).to(tl.float32)
    high = q.to(kind)
    tl.store(query + b * dim + at, high, mask=inside)
    if halves:
        low = (q - high.to(tl.float32)).to(kind)
        tl.store(query + (count + b) * dim + at, low, mask=inside)
    tl.store(figures + 4 * b, scale)
    tl.store(figures + 4 * b + 1, half)
    tl.store(figures + 4 * b + 2, shared)
    tl.store(figures + 4 * b + 3, tl.sqrt(squares))


@kernel
def weigh(
    figures,
    norms,
    mean_norm,
    ends,
    logits,
    width,
    block: tl.constexpr,
    halves: tl.constexpr,
) -> None:
    """Log-weights from products, in place; -inf for rows of other classes."""
    b, count = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < width
    product = tl.load(logits + b * width + at, mask=inside, other=0.0)
    if halves:
        product += tl.load(logits + (count + b) * width + at, mask=inside, other=0.0)
    norm = tl.load(norms + at, mask=inside, other=0.0) - tl.load(mean_norm)
    scale, half = tl.load(figures + 4 * b), tl.load(figures + 4 * b + 1)
    found = product * scale.to(tl.float32) - norm.to(tl.float32) * half.to(tl.float32)
    looked = (at >= tl.load(ends + 2 * b)) & (at < tl.load(ends + 2 * b + 1))
    found = tl.where(looked, found, float("-inf"))
    tl.store(logits + b * width + at, found, mask=inside)


@kernel
def tail_sums(logits, peaks, parts, width, block: tl.constexpr) -> None:
    """Sums of `w`, `w^2` and `w l` over some rows, with `w = exp(l - peak)`."""
    part, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = part * block + tl.arange(0, block)
    peak = tl.load(peaks + b)
    found = tl.load(logits + b * width + at, mask=at < width, other=float("-inf"))
    there = found > float("-inf")
    lower = tl.where(there, found - peak, 0.0)
    weight = tl.where(there, tl.exp(lower), 0.0)
    place = parts + 3 * (b * tl.num_programs(0) + part)
    tl.store(place, tl.sum(weight, axis=0))
    tl.store(place + 1, tl.sum(weight * weight, axis=0))
    tl.store(place + 2, tl.sum(weight * lower, axis=0))


@kernel
def tail_weights(
    logits,
    peaks,
    totals,
    ends,
    weights,
    width,
    padded,
    block: tl.constexpr,
    halves: tl.constexpr,
) -> None:
    """`2^14 (w - level)`, the left factor of the second product: high parts, then low parts."""
    b, count = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    at = tl.program_id(0) * block + tl.arange(0, block)
    found = tl.load(logits + b * width + at, mask=at < width, other=float("-inf"))
    weight = tl.where(found > float("-inf"), tl.exp(found - tl.load(peaks + b)), 0.0)
    whole = tl.load(ends + 2 * b + 1) - tl.load(ends + 2 * b) == width
    level = tl.where(whole, tl.load(totals + 3 * b) / width, 0.0).to(tl.float32)
    weight = tl.where(at < width, 16384 * (weight - level), 0.0)
    kind = weights.dtype.element_ty
    high = weight.to(kind)
    tl.store(weights + b * padded + at, high, mask=at < padded)
    if halves:
        low = (weight - high.to(tl.float32)).to(kind)
        tl.store(weights + (count + b) * padded + at, low, mask=at < padded)


@kernel
def tail_part(
    averaged,
    peaks,
    totals,
    ends,
    columns,
    figures,
    factors,
    shift,
    origin,
    sums,
    best,
    pulls,
    width,
    parts,
    dim,
    listed,
    block: tl.constexpr,
) -> None:
    """All rows that do not lead as the last part of the input of `merge`."""
    b = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < dim
    z = tl.load(totals + 3 * b)
    whole = tl.load(ends + 2 * b + 1) - tl.load(ends + 2 * b) == width
    # With the rounding of its subtraction.
    level = tl.where(whole, z / width, 0.0).to(tl.float32).to(tl.float64)
    total = tl.load(averaged + b * dim + at, mask=inside, other=0.0).to(tl.float64) / 16384
    total += level * width * tl.load(shift + at, mask=inside, other=0.0)
    total -= z * tl.load(origin + b * dim + at, mask=inside, other=0.0)
    place = b * parts + parts - 1
    tl.store(pulls + place * dim + at, total.to(tl.float32), mask=inside)
    if tl.program_id(1) == 0:
        peak = tl.load(peaks + b) - tl.load(figures + 4 * b + 2) + tl.load(factors + 2 * b + 1)
        peak = tl.where(z > 0, peak, float("-inf"))
        tl.store(sums + 4 * place, peak.to(tl.float32))
        tl.store(sums + 4 * place + 1, z.to(tl.float32))
        tl.store(sums + 4 * place + 2, tl.load(totals + 3 * b + 2).to(tl.float32))
        tl.store(sums + 4 * place + 3, tl.load(totals + 3 * b + 1).to(tl.float32))
        tl.store(best + place, tl.load(columns + b * listed + listed - 1))


@kernel
def judge(
    mean,
    near,
    told,
    peaks,
    totals,
    columns,
    norms,
    mean_norm,
    figures,
    factors,
    alpha,
    sigma,
    order,
    width,
    dim,
    listed,
    block: tl.constexpr,
    rtol,
    unit,
    growth,
    rounded,
    reach,
) -> None:
    """Appends a query to `order` whose estimated error is above `rtol`."""
    b = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    gap = tl.load(mean + b * dim + at, mask=at < dim, other=0.0)
    gap -= tl.load(near + b * dim + at, mask=at < dim, other=0.0)
    a, s = tl.load(alpha + b), tl.load(sigma + b)
    peak, average = tl.load(peaks + b).to(tl.float64), tl.load(mean_norm)
    norm = tl.load(norms + tl.load(columns + b * listed + listed - 1)) - average
    product = peak + tl.load(figures + 4 * b + 1) * norm
    delta = unit * tl.load(figures + 4 * b + 3) * a / (s * s) * reach
    delta += growth * tl.abs(product)
    after = peak - tl.load(figures + 4 * b + 2) + tl.load(factors + 2 * b + 1)
    after -= tl.load(told + 4 * tl.num_programs(0) + b)
    root = tl.sqrt(tl.load(totals + 3 * b + 1))
    # Either the logits of the tail are nearly right, or they are too small to matter. One
    # exponential: the weights alone may be 0 where the logits are wrong by thousands.
    error = tl.minimum(delta * root, width) * tl.exp(tl.minimum(after + 16 * delta, 600.0))
    # Not 0 for a bank of equal rows, whose mean is right and whose other numbers are not.
    error = tl.sqrt(tl.maximum(average, 1e-30)) * error + rounded * reach * root * tl.exp(after)
    wrong = (error > rtol * tl.sqrt(tl.sum(gap * gap, axis=0))) & (tl.load(totals + 3 * b) > 0)
    if wrong:
        place = tl.atomic_add(order, 1)
        tl.store(order + 1 + place, b.to(tl.int32))
