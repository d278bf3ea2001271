import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import unfold

from stagewise.recipes.sit import SiT, _sinusoids


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


def test_traces_into_one_graph():
    model = build()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x, t, labels = batch()
    model.eval()
    torch.testing.assert_close(compiled(x, t, labels), model(x, t, labels))
    model.train()
    assert compiled(x, t, labels).shape == x.shape


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
