import math

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from timm.layers import apply_rot_embed_cat
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import unfold
from torch.utils.flop_counter import FlopCounterMode

from stagewise.recipes.sit import SiT, _sinusoids

PUBLIC = {"time_embedding": "unit", "position_embedding": "dit"}
LIGHTNING = PUBLIC | {"rms_norm": True, "swiglu": True, "rotary": True}
VARIANTS = [
    PUBLIC | {"learn_sigma": True},
    LIGHTNING,
    LIGHTNING | {"qk_norm": True},
    {"rms_norm": True},
    {"swiglu": True},
    {"rotary": True},
    {"qk_norm": True},
    {"rms_norm": True, "qk_norm": True},
    {"rotary": True, "qk_norm": True},
]


def build(seed=0, **options):
    """A small model with every weight random, since a fresh one answers zero."""
    torch.manual_seed(seed)
    options = {"num_classes": 5, "hidden_size": 32, "depth": 2} | options
    model = SiT(**options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def batch(n=6, channels=3, size=16):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, channels, size, size, generator=g)
    return x, torch.rand(n, generator=g), torch.arange(n) % 5


@pytest.mark.parametrize(
    ("channels", "size", "patch"), [(3, 16, 4), (4, 8, 2), (1, 12, 3), (2, 8, 1), (3, 8, 8)]
)
def test_output_has_the_shape_of_the_input(channels, size, patch):
    model = build(in_channels=channels, input_size=size, patch_size=patch)
    x, t, labels = batch(channels=channels, size=size)
    assert model(x, t, labels).shape == x.shape


def test_a_fresh_model_answers_zero_and_its_blocks_are_the_identity():
    model = SiT(num_classes=5, hidden_size=32, depth=2)
    assert not model(*batch()).any()
    tokens, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    assert torch.equal(model.blocks[0](tokens, c), tokens)


@pytest.mark.parametrize(("channels", "size", "patch"), [(3, 16, 4), (2, 6, 3)])
def test_unpatchify_inverts_the_order_of_the_patch_embedding(channels, size, patch):
    dim = channels * patch**2
    hidden = -(-dim // 4) * 4
    sizes = {"in_channels": channels, "input_size": size, "patch_size": patch}
    model = build(**sizes, hidden_size=hidden, num_heads=1)
    x = torch.arange(2.0 * channels * size**2).reshape(2, channels, size, size)
    assert torch.equal(model.unpatchify(unfold(x, patch, stride=patch).mT), x)
    # An embedding that copies the pixels of its patch must be undone as well.
    with torch.no_grad():
        model.x_embedder.proj.bias.zero_()
        model.x_embedder.proj.weight.copy_(
            torch.eye(hidden, dim).reshape(hidden, channels, patch, patch)
        )
        assert torch.equal(model.unpatchify(model.x_embedder(x)[..., :dim]), x)


def test_position_time_and_class_all_matter():
    model = build().eval()
    x, t, labels = batch()
    out = model(x, t, labels)
    assert not torch.allclose(out, model(x, t, (labels + 1) % 5), atol=1e-4)
    assert not torch.allclose(out, model(x, 1 - t, labels), atol=1e-4)
    # Without a position embedding, moving the patches would only move the answer.
    moved = model(x.roll(4, -1), t, labels).roll(-4, -1)
    assert not torch.allclose(out, moved, atol=1e-4)
    model.pos_embed.zero_()
    moved = model(x.roll(4, -1), t, labels).roll(-4, -1)
    torch.testing.assert_close(model(x, t, labels), moved, atol=1e-5, rtol=1e-5)


def test_time_embedding_tells_close_times_apart_and_keeps_them_close():
    t = torch.linspace(0, 1, 201)
    features = _sinusoids(t, 128)
    similarity = torch.nn.functional.cosine_similarity(features[1:], features[:-1])
    assert similarity.max() < 0.999
    assert similarity.min() > 0.5
    assert torch.equal(_sinusoids(t.double(), 128), features)


def test_no_labels_means_the_null_class():
    model = build().eval()
    x, t, labels = batch()
    out = model(x, t)
    assert torch.equal(out, model(x, t, torch.full_like(labels, 5)))
    assert not torch.allclose(out, model(x, t, labels), atol=1e-4)


def test_labels_are_dropped_in_training_only():
    model = build(class_dropout=1.0)
    x, t, labels = batch()
    assert torch.equal(model.train()(x, t, labels), model.eval()(x, t))
    before = torch.get_rng_state()
    assert not torch.allclose(model(x, t, labels), model(x, t), atol=1e-4)
    assert torch.equal(torch.get_rng_state(), before)


def test_share_of_dropped_labels():
    model = build(class_dropout=0.3)
    labels = torch.zeros(4000, dtype=torch.long)
    null = model.y_embedder.weight[5]
    torch.manual_seed(0)
    share = (model._embed(labels) == null).all(-1).double().mean().item()
    assert share == pytest.approx(0.3, abs=0.03)


def test_without_dropout_training_draws_nothing():
    model = build(class_dropout=0.0)
    x, t, labels = batch()
    before = torch.get_rng_state()
    assert torch.equal(model.train()(x, t, labels), model.eval()(x, t, labels))
    assert torch.equal(torch.get_rng_state(), before)


def test_unconditional_model():
    x, t, _ = batch()
    assert build(num_classes=0)(x, t).shape == x.shape


def test_parameter_count():
    d, depth, classes, pixels = 128, 4, 7, 48
    block = (3 * d * d + 3 * d) + (d * d + d) + (8 * d * d + 5 * d) + (6 * d * d + 6 * d)
    embed = (pixels * d + d) + (256 * d + d + d * d + d) + (classes + 1) * d
    final = (2 * d * d + 2 * d) + (d * pixels + pixels)
    count = sum(p.numel() for p in SiT(num_classes=classes).parameters())
    assert count == depth * block + embed + final
    assert count == 1_283_248


def test_every_parameter_learns():
    model = build()
    model(*batch()).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_fixed_embeddings_are_in_no_checkpoint_and_survive_a_round_trip():
    model, other = build(seed=0).eval(), build(seed=1).eval()
    state = model.state_dict()
    assert set(state) == {name for name, _ in model.named_parameters()}
    other.load_state_dict(state)
    assert torch.equal(model(*batch()), other(*batch()))


def test_bfloat16_module_and_autocast():
    model = build().eval()
    x, t, labels = batch()
    expected = model(x, t, labels)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x, t, labels).float(), expected, atol=0.2, rtol=0.1)
    assert model.bfloat16()(x.bfloat16(), t, labels).dtype == torch.bfloat16


def test_fake_tensors_on_cuda():
    with FakeTensorMode(), torch.device("cuda"):
        model = SiT(num_classes=5, hidden_size=32, depth=2)
        x, t = torch.randn(6, 3, 16, 16), torch.rand(6)
        labels = torch.randint(5, (6,))
        for out in (model(x, t, labels), model(x, t)):
            assert out.device.type == "cuda"
            assert out.shape == x.shape


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"input_size": 15}, "`input_size` divisible by `patch_size`, got 15 and 4"),
        ({"hidden_size": 36, "num_heads": 8}, "`hidden_size` divisible by `num_heads`"),
        ({"hidden_size": 30, "num_heads": 2}, "and by 4"),
        ({"num_classes": -1}, "`num_classes` of at least 0"),
        ({"class_dropout": 1.5}, r"`class_dropout` in \[0, 1\]"),
        ({"time_embedding": "x"}, "`time_embedding` 'thousand' or 'unit', got 'x'"),
        ({"position_embedding": "x"}, "`position_embedding` 'timm' or 'dit', got 'x'"),
        (
            {"hidden_size": 24, "num_heads": 4, "rotary": True},
            "`hidden_size / num_heads` divisible by 4 with `rotary`",
        ),
    ],
)
def test_arguments_are_validated(options, match):
    with pytest.raises(ValueError, match=match):
        SiT(**{"num_classes": 5} | options)


def test_inputs_are_validated():
    model = build()
    x, t, labels = batch()
    with pytest.raises(ValueError, match=r"Expected `xt` with shape \(B, 3, 16, 16\), got"):
        model(x[:, :2], t, labels)
    with pytest.raises(ValueError, match=r"Expected `t` with shape \(6,\), got \(6, 1\)"):
        model(x, t[:, None], labels)
    with pytest.raises(ValueError, match=r"Expected `labels` with shape \(6,\), got \(5,\)"):
        model(x, t, labels[:5])
    for bad in (-1, 6):
        with pytest.raises(IndexError, match=r"Expected `labels` in \[0, 5\]"):
            model.eval()(x, t, torch.full_like(labels, bad))


# Recorded results were trained from these draws: the numbers are those of the first release.
def test_defaults_draw_and_answer_as_they_always_did():
    torch.manual_seed(0)
    model = SiT(num_classes=7)
    assert torch.rand(2).tolist() == pytest.approx([0.9089363813, 0.2162349820])
    for name, size in {
        "x_embedder.proj.weight": 562.0469724560,
        "y_embedder.weight": 15.8263468879,
        "blocks.3.mlp.fc2.weight": 3185.0676159736,
    }.items():
        assert model.get_parameter(name).double().abs().sum().item() == pytest.approx(size)
    out = build().eval()(*batch())
    assert out.double().abs().sum().item() == pytest.approx(2254.0130252, rel=1e-5)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_variants_start_at_zero_learn_and_reload(options):
    fresh = SiT(num_classes=5, hidden_size=32, depth=2, **options)
    x, t, labels = batch()
    assert not fresh(x, t, labels).any()
    tokens, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    assert torch.equal(fresh.blocks[0](tokens, c, fresh.rope), tokens)
    model = build(**options)
    model(x, t, labels).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.any(), name
    state = model.state_dict()
    assert set(state) == {name for name, _ in model.named_parameters()}
    other = build(seed=1, **options)
    other.load_state_dict(state)
    assert torch.equal(other.eval()(x, t, labels), model.eval()(x, t, labels))
    assert not torch.allclose(model(x, t), model(x, t, labels), atol=1e-4)


# torch tells that it has no fused kernel for an RMSNorm with weights of another type.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_variants_under_autocast_and_in_bfloat16(options):
    model = build(**options).eval()
    x, t, labels = batch()
    expected = model(x, t, labels)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x, t, labels).float(), expected, atol=0.2, rtol=0.1)
    out = model.bfloat16()(x.bfloat16(), t, labels)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.3, rtol=0.1)


@pytest.mark.parametrize("options", [{}, VARIANTS[2]], ids=["sit", "lightningdit"])
def test_they_trace_into_one_graph(options):
    model = build(**options)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x, t, labels = batch()
    model.eval()
    torch.testing.assert_close(compiled(x, t, labels), model(x, t, labels))
    model.train()
    assert compiled(x, t, labels).shape == x.shape


def test_learned_variance_is_the_second_half_of_the_output_layer():
    plain, doubled = build(), build(learn_sigma=True)
    state = doubled.state_dict()
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        assert len(state[name]) == 2 * 3 * 4 * 4
        state[name] = state[name][: 3 * 4 * 4]
    plain.load_state_dict(state)
    args = batch()
    torch.testing.assert_close(doubled.eval()(*args), plain.eval()(*args), atol=1e-6, rtol=1e-6)


def test_unit_time_embedding():
    t = torch.tensor([0.0, 0.3, 1.0])
    expected = [
        [f(time * 1e4 ** (-i / 128)) for f in (math.cos, math.sin) for i in range(128)]
        for time in t.double().tolist()
    ]
    torch.testing.assert_close(_sinusoids(t, 128, "unit"), torch.tensor(expected))


def test_thousand_time_embedding():
    t = torch.tensor([0.0, 0.3, 1.0])
    expected = [
        [f(time * 1000 * 1e4 ** (-i / 127)) for f in (math.cos, math.sin) for i in range(128)]
        for time in t.double().tolist()
    ]
    # 1000 radians in float32 are known to some 1e-4.
    torch.testing.assert_close(_sinusoids(t, 128), torch.tensor(expected), atol=5e-4, rtol=0)


@pytest.mark.parametrize(
    ("order", "parts"),
    [
        ("timm", [(math.sin, 0), (math.sin, 1), (math.cos, 0), (math.cos, 1)]),
        ("dit", [(math.sin, 1), (math.cos, 1), (math.sin, 0), (math.cos, 0)]),
    ],
)
def test_position_embedding(order, parts):
    model = SiT(num_classes=1, input_size=16, patch_size=2, position_embedding=order)
    expected = [
        [f((row, column)[axis] * 1e4 ** (-i / 32)) for f, axis in parts for i in range(32)]
        for row in range(8)
        for column in range(8)
    ]
    torch.testing.assert_close(model.pos_embed, torch.tensor(expected), atol=2e-6, rtol=0)


def test_rotations_see_differences_of_positions_only():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 32, generator=g, dtype=torch.double)
    rope = SiT(num_classes=1, hidden_size=128, num_heads=4, rotary=True).rope.double()

    def score(a, b):
        turned = apply_rot_embed_cat(q, rope[a[0] * 4 + a[1]])
        return turned @ apply_rot_embed_cat(k, rope[b[0] * 4 + b[1]])

    assert score((0, 0), (0, 0)).item() == pytest.approx((q @ k).item())
    shifted = score((0, 1), (2, 2)).item()
    assert score((1, 0), (3, 1)).item() == pytest.approx(shifted, abs=1e-5)
    for other in (((1, 0), (3, 3)), ((1, 0), (2, 1)), ((0, 2), (2, 1))):
        assert abs(score(*other).item() - shifted) > 1e-2


def test_rotary_attention_depends_on_positions_without_the_fixed_embedding():
    model = build(rotary=True, input_size=16, patch_size=4).eval()
    model.pos_embed.zero_()
    x, t, labels = batch()
    moved = model(x.roll(4, -1), t, labels).roll(-4, -1)
    assert not torch.allclose(model(x, t, labels), moved, atol=1e-4)


def recipe(name):
    with initialize_config_module("stagewise.recipes.conf", version_base="1.3"):
        config = compose("train", [f"net={name}", "data=imagenet256_sdvae"])
    with torch.device("meta"):
        return instantiate(config.net)


# The published sizes in millions, and the exact numbers that training with the public codes logs,
# where there are any; those count the fixed embedding of positions. Published are multiply-adds.
@pytest.mark.parametrize(
    ("name", "shape", "millions", "logged", "published"),
    [
        ("sit_s_2", (4, 32, 32), 33, None, 6.06),
        ("sit_b_2", (4, 32, 32), 130, None, 23.01),
        ("sit_l_2", (4, 32, 32), 458, None, 80.71),
        ("sit_xl_2", (4, 32, 32), 675, "675.129632", 118.64),
        ("lightningdit_s_1", (32, 16, 16), 33, None, None),
        ("lightningdit_b_1", (32, 16, 16), 130, None, None),
        ("lightningdit_xl_1", (32, 16, 16), 675, "675.26", None),
    ],
)
def test_recipes_have_the_published_size(name, shape, millions, logged, published):
    net = recipe(name).eval()
    assert net.input_shape == shape
    assert net.class_dropout == 0.1
    count = sum(p.numel() for p in net.parameters())
    assert round(count / 1e6) == millions
    if logged:
        digits = len(logged.split(".")[1])
        assert f"{(count + net.pos_embed.numel()) / 1e6:.{digits}f}" == logged
    x, t = torch.empty(1, *shape, device="meta"), torch.empty(1, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert net(x, t, torch.empty(1, dtype=torch.long, device="meta")).shape == x.shape
    if published:
        # torch counts two operations per multiply-add, and matrix products alone. The published
        # numbers are met to the last digit with one more for every element that a LayerNorm sees.
        norms = sum(isinstance(module, torch.nn.LayerNorm) for module in net.modules())
        normed = norms * net.pos_embed.numel()
        assert f"{(counter.get_total_flops() / 2 + normed) / 1e9:.2f}" == f"{published:.2f}"


def test_swiglu_has_two_thirds_of_the_width_in_one_draw():
    model = SiT(num_classes=5, hidden_size=96, num_heads=4, swiglu=True)
    assert model.blocks[0].mlp.fc1.weight.shape == (2 * 256, 96)
    assert model.blocks[0].mlp.fc2.weight.shape == (96, 256)
    bound = math.sqrt(6 / (96 + 2 * 256))
    assert 0.99 * bound < model.blocks[0].mlp.fc1.weight.abs().max() <= bound
