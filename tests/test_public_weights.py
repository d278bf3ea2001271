"""The public layout is built here anew, from its formulas, and must answer as our network does."""

import argparse
import math
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.nn.functional import conv2d, gelu, silu

from stagewise.recipes import public_weights
from stagewise.recipes.public_weights import load_public_weights
from stagewise.recipes.sit import SiT

SIZES = {"input_size": 6, "in_channels": 3, "patch_size": 2, "hidden_size": 16, "num_heads": 2}
PUBLIC = {"num_classes": 5, "depth": 2, "time_embedding": "unit", "position_embedding": "dit"}
SIT = SIZES | PUBLIC | {"learn_sigma": True}
LIGHTNING = SIZES | PUBLIC | {"rms_norm": True, "swiglu": True, "rotary": True}
WIDTH, TOKENS, CLASSES, PIXELS = 16, 9, 5, 12


def shapes(lightning=False, qk_norm=False, depth=2):
    """Names and shapes of the entries, those of fixed embeddings aside."""
    d, out = WIDTH, PIXELS if lightning else 2 * PIXELS

    def linear(name, rows, columns):
        return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}

    table = {"x_embedder.proj.weight": (d, 3, 2, 2), "x_embedder.proj.bias": (d,)}
    table |= linear("t_embedder.mlp.0", d, 256) | linear("t_embedder.mlp.2", d, d)
    table |= {"y_embedder.embedding_table.weight": (CLASSES + 1, d)}
    for i in range(depth):
        block = f"blocks.{i}"
        table |= linear(f"{block}.attn.qkv", 3 * d, d) | linear(f"{block}.attn.proj", d, d)
        if lightning:
            hidden = int(2 / 3 * 4 * d)
            table |= linear(f"{block}.mlp.w12", 2 * hidden, d)
            table |= linear(f"{block}.mlp.w3", d, hidden)
            table |= {f"{block}.norm1.weight": (d,), f"{block}.norm2.weight": (d,)}
        else:
            table |= linear(f"{block}.mlp.fc1", 4 * d, d) | linear(f"{block}.mlp.fc2", d, 4 * d)
        if qk_norm:
            table |= {f"{block}.attn.{x}_norm.weight": (d // 2,) for x in "qk"}
        table |= linear(f"{block}.adaLN_modulation.1", 6 * d, d)
    table |= linear("final_layer.linear", out, d)
    table |= linear("final_layer.adaLN_modulation.1", 2 * d, d)
    return table | ({"final_layer.norm_final.weight": (d,)} if lightning else {})


def positions():
    """Sine and cosine of the column, then of the row."""
    omega = [1e4 ** (-i / 4) for i in range(4)]
    table = [
        [f(place * w) for place in (column, row) for f in (math.sin, math.cos) for w in omega]
        for row in range(3)
        for column in range(3)
    ]
    return torch.tensor(table, dtype=torch.double)


def angles():
    """Of the four pairs of numbers in a head of 8: two by the row, two by the column."""
    omega = [1e4 ** (-i / 2) for i in range(2)]
    table = [
        [p * w for p in (row, column) for w in omega] for row in range(3) for column in range(3)
    ]
    return torch.tensor(table, dtype=torch.double)


def checkpoint(lightning=False, **options):
    g = torch.Generator().manual_seed(3)
    weights = {
        name: 0.3 * torch.randn(shape, generator=g, dtype=torch.double)
        for name, shape in shapes(lightning, **options).items()
    }
    weights["pos_embed"] = positions()[None]
    if lightning:
        turns = angles().repeat_interleave(2, -1)
        weights |= {"feat_rope.freqs_cos": turns.cos(), "feat_rope.freqs_sin": turns.sin()}
    return weights


def rms(x, weight):
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def standardised(x):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def reference(w, x, t, labels):
    """The public models as a function of their weights: `(B, 3, 6, 6) -> (B, 3, 6, 6)`."""
    lightning = "blocks.0.mlp.w12.weight" in w

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        return rms(x, w[f"{name}.weight"]) if lightning else standardised(x)

    def attention(name, x):
        q, k, v = linear(f"{name}.qkv", x).reshape(len(x), TOKENS, 3, 2, 8).unbind(2)
        if f"{name}.q_norm.weight" in w:
            q, k = rms(q, w[f"{name}.q_norm.weight"]), rms(k, w[f"{name}.k_norm.weight"])
        if lightning:
            turn = torch.polar(torch.ones_like(angles()), angles())[:, None]
            pairs = [torch.view_as_complex(y.unflatten(-1, (4, 2))) * turn for y in (q, k)]
            q, k = (torch.view_as_real(y).flatten(-2) for y in pairs)
        score = torch.einsum("bqhc,bkhc->bhqk", q, k) / math.sqrt(8)
        mixed = torch.einsum("bhqk,bkhc->bqhc", score.softmax(-1), v)
        return linear(f"{name}.proj", mixed.flatten(2))

    def mlp(name, x):
        if lightning:
            gate, value = linear(f"{name}.w12", x).chunk(2, -1)
            return linear(f"{name}.w3", silu(gate) * value)
        return linear(f"{name}.fc2", gelu(linear(f"{name}.fc1", x), approximate="tanh"))

    omega = torch.tensor([math.exp(-math.log(1e4) * i / 128) for i in range(128)])
    angle = t[:, None] * omega.double()
    time = linear("t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()], -1))
    c = linear("t_embedder.mlp.2", silu(time)) + w["y_embedder.embedding_table.weight"][labels]
    h = conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=2)
    h = h.flatten(2).mT + positions()
    for i in range(2):
        b = f"blocks.{i}"
        parts = linear(f"{b}.adaLN_modulation.1", silu(c))[:, None].split(WIDTH, -1)
        shift, scale, gate = parts[:3]
        h = h + gate * attention(f"{b}.attn", norm(f"{b}.norm1", h) * (1 + scale) + shift)
        shift, scale, gate = parts[3:]
        h = h + gate * mlp(f"{b}.mlp", norm(f"{b}.norm2", h) * (1 + scale) + shift)
    shift, scale = linear("final_layer.adaLN_modulation.1", silu(c))[:, None].split(WIDTH, -1)
    h = linear("final_layer.linear", norm("final_layer.norm_final", h) * (1 + scale) + shift)
    channels = h.shape[-1] // 4
    answer = x.new_zeros(x.shape)
    for row in range(6):
        for column in range(6):
            token = h[:, row // 2 * 3 + column // 2]
            place = (row % 2 * 2 + column % 2) * channels
            answer[:, :, row, column] = token[:, place : place + 3]
    return answer


def batch():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 6, 6, generator=g, dtype=torch.double)
    return x, torch.rand(4, generator=g, dtype=torch.double), torch.tensor([0, 3, 5, 2])


def saved(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


CASES = [
    pytest.param(SIT, {}, id="sit"),
    pytest.param(LIGHTNING, {"lightning": True}, id="lightningdit"),
    pytest.param(LIGHTNING | {"qk_norm": True}, {"lightning": True, "qk_norm": True}, id="qk-norm"),
]


@pytest.mark.parametrize(("options", "layout"), CASES)
def test_network_answers_as_the_public_model(tmp_path, options, layout):
    weights = checkpoint(**layout)
    net = SiT(**options).double().eval()
    assert load_public_weights(net, saved(tmp_path, weights)) is net
    x, t, labels = batch()
    expected = reference(weights, x, t, labels)
    assert expected.std() > 0.5
    torch.testing.assert_close(net(x, t, labels), expected, atol=1e-5, rtol=1e-5)
    # A single row of the output layer, one time or one row of positions would show.
    for name in ("final_layer.linear.weight", "t_embedder.mlp.0.weight", "x_embedder.proj.bias"):
        other = weights | {name: weights[name].flip(0)}
        assert (reference(other, x, t, labels) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("wrap", ["ema", "model", "both"])
def test_weights_of_training_checkpoints(tmp_path, wrap):
    weights = checkpoint()
    other = {name: value + 1 for name, value in weights.items()}
    content = {"model": other, "ema": weights} if wrap == "both" else {wrap: weights}
    content |= {"opt": {"state": {}}, "args": argparse.Namespace(model="SiT-XL/2")}
    net = load_public_weights(SiT(**SIT), saved(tmp_path, content))
    bias = weights["blocks.1.adaLN_modulation.1.bias"].float()
    assert torch.equal(net.blocks[1].modulation.linear.bias, bias)
    assert net.blocks[1].modulation.linear.bias.requires_grad
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())


def refused(tmp_path, content, match, **options):
    net = SiT(**SIT | options)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=match) as error:
        load_public_weights(net, saved(tmp_path, content))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    return str(error.value)


def test_another_model_is_refused_with_what_differs(tmp_path):
    weights = checkpoint()
    del weights["t_embedder.mlp.2.bias"]
    weights["projectors.0.weight"] = torch.zeros(3, 4)
    weights["blocks.1.mlp.fc1.bias"] = torch.zeros(7)
    text = refused(tmp_path, weights, "3 entries differ")
    assert "\n  t_embedder.mlp.2.bias: (16,), got no such entry\n" in text
    assert "\n  blocks.1.mlp.fc1.bias: (64,), got (7,)\n" in text
    assert "\n  projectors.0.weight: no such entry, got (3, 4)\n" in text
    assert "more" not in text


def test_the_first_ten_differences_are_listed(tmp_path):
    text = refused(tmp_path, checkpoint(depth=4), "20 entries differ")
    assert text.count("no such entry") == 10
    assert "\n  and 10 more\n" in text
    refused(tmp_path, checkpoint(lightning=True), "mlp.fc1.weight")
    refused(tmp_path, checkpoint(), r"final_layer.linear.weight: \(12, 16\)", learn_sigma=False)


def test_another_embedding_is_refused(tmp_path):
    refused(
        tmp_path, checkpoint(), "`pos_embed` .* position_embedding='dit'", position_embedding="timm"
    )
    refused(tmp_path, checkpoint(), "with time_embedding='unit'", time_embedding="thousand")
    weights = checkpoint()
    weights["pos_embed"][0, 0, 0] = math.nan
    refused(tmp_path, weights, "`pos_embed`")
    weights = checkpoint(lightning=True)
    weights["feat_rope.freqs_sin"] = weights["feat_rope.freqs_sin"].flip(-1)
    switches = {name: LIGHTNING[name] for name in ("rms_norm", "swiglu", "rotary")}
    refused(tmp_path, weights, "`feat_rope.freqs_sin`", learn_sigma=False, **switches)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([torch.zeros(2)], "dictionary of tensors .* got list"),
        ({"opt": {}, "steps": 3}, r"dictionary of tensors .* got \['opt', 'steps'\]"),
        ({}, r"dictionary of tensors .* got \[\]"),
        ({"ema": nn.Linear(2, 2)}, "no whole checkpoint of tensors and plain values"),
    ],
)
def test_files_without_weights_are_refused(tmp_path, content, match):
    refused(tmp_path, content, match)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*none.pt"):
        load_public_weights(SiT(**SIT), tmp_path / "none.pt")
    (tmp_path / "weights.pt").write_bytes(b"PK" * 9)
    with pytest.raises(ValueError, match="weights.pt is no whole checkpoint"):
        load_public_weights(SiT(**SIT), tmp_path / "weights.pt")


@pytest.mark.parametrize(("name", "entries"), [("sit_xl_2", 292), ("lightningdit_xl_1", 351)])
def test_recipes_have_the_entries_of_the_public_checkpoints(name, entries):
    nets = Path(public_weights.__file__).parent / "conf/net"
    config = OmegaConf.merge(
        {"net": OmegaConf.load(nets / f"{name}.yaml")}, {"data": {"num_classes": 1000}}
    )
    with torch.device("meta"):
        net = instantiate(config.net)
    names = {public_weights._public_name(own, net.swiglu) for own in net.state_dict()}
    names |= set(public_weights._fixed(net))
    assert len(names) == entries
    assert names == set(shapes(net.swiglu, depth=28)) | set(public_weights._fixed(net))
