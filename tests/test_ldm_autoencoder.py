"""A checkpoint of latent diffusion's layout: its formulas, and pictures to pictures."""

import sys

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from PIL import Image
from torch.nn import functional as F

from stagewise.latents import open_latents
from stagewise.recipes import encode as command
from stagewise.recipes.autoencoder import decode, encode, find_vae, load_vae
from stagewise.recipes.sample import parse, run
from stagewise.recipes.train import train

CHANNELS, LATENT, BLOCKS, TOP = (32, 32, 64), 6, 2, 2  # attention at the coarsest level


def written(path, seed=0):
    """Random weights under the public names, with what a training leaves beside them."""
    g, weights = torch.Generator().manual_seed(seed), {}

    def layer(name, out, inside=None, size=3):
        if inside is None:  # a norm
            weights[f"{name}.weight"] = 1 + 0.2 * torch.randn(out, generator=g)
        else:
            scale = (inside * size**2) ** -0.5
            weights[f"{name}.weight"] = scale * torch.randn(out, inside, size, size, generator=g)
        weights[f"{name}.bias"] = 0.1 * torch.randn(out, generator=g)

    def resnet(name, inside, out):
        layer(f"{name}.norm1", inside)
        layer(f"{name}.conv1", out, inside)
        layer(f"{name}.norm2", out)
        layer(f"{name}.conv2", out, out)
        if inside != out:
            layer(f"{name}.nin_shortcut", out, inside, 1)

    def attention(name, width):
        layer(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}.{part}", width, width, 1)

    def middle(name, width):
        resnet(f"{name}.mid.block_1", width, width)
        attention(f"{name}.mid.attn_1", width)
        resnet(f"{name}.mid.block_2", width, width)

    layer("encoder.conv_in", CHANNELS[0], 3)
    before = CHANNELS[0]
    for level, width in enumerate(CHANNELS):
        for block in range(BLOCKS):
            resnet(f"encoder.down.{level}.block.{block}", before, width)
            before = width
            if level == TOP:
                attention(f"encoder.down.{level}.attn.{block}", width)
        if level < TOP:
            layer(f"encoder.down.{level}.downsample.conv", width, width)
    middle("encoder", before)
    layer("encoder.norm_out", before)
    layer("encoder.conv_out", 2 * LATENT, before)
    layer("quant_conv", 2 * LATENT, 2 * LATENT, 1)
    weights["quant_conv.bias"][LATENT:] -= 9  # narrow posteriors, as trained ones are
    layer("post_quant_conv", LATENT, LATENT, 1)
    layer("decoder.conv_in", before, LATENT)
    middle("decoder", before)
    for level in reversed(range(TOP + 1)):
        for block in range(BLOCKS + 1):
            resnet(f"decoder.up.{level}.block.{block}", before, CHANNELS[level])
            before = CHANNELS[level]
            if level == TOP:
                attention(f"decoder.up.{level}.attn.{block}", before)
        if level:
            layer(f"decoder.up.{level}.upsample.conv", before, before)
    layer("decoder.norm_out", before)
    layer("decoder.conv_out", 3, before)
    beside = {"loss.logvar": torch.zeros(1), "linear_proj.weight": torch.zeros(2, 2)}
    torch.save({"state_dict": weights | beside, "global_step": 3}, path)
    return {name: value.double() for name, value in weights.items()}


class Formulas:
    """The published network, from its description."""

    def __init__(self, weights):
        self.weights = weights

    def conv(self, name, x, padding=1, stride=1):
        w, b = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.conv2d(x, w, b, padding=padding if w.shape[-1] == 3 else 0, stride=stride)

    def norm(self, name, x):
        return F.group_norm(
            x, 32, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps=1e-6
        )

    def resnet(self, name, x):
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)))
        short = f"{name}.nin_shortcut"
        return h + (self.conv(short, x) if f"{short}.weight" in self.weights else x)

    def attention(self, name, x):
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")
        weights = (torch.einsum("bci,bcj->bij", q, k) * q.shape[1] ** -0.5).softmax(-1)
        return x + self.conv(
            f"{name}.proj_out", torch.einsum("bij,bcj->bci", weights, v).view_as(x)
        )

    def blocks(self, name, x, count):
        for block in range(count):
            x = self.resnet(f"{name}.block.{block}", x)
            if f"{name}.attn.{block}.q.weight" in self.weights:
                x = self.attention(f"{name}.attn.{block}", x)
        return x

    def ends(self, name, x):
        x = self.resnet(f"{name}.mid.block_1", x)
        return self.resnet(f"{name}.mid.block_2", self.attention(f"{name}.mid.attn_1", x))

    def moments(self, x):
        x = self.conv("encoder.conv_in", x)
        for level in range(TOP + 1):
            x = self.blocks(f"encoder.down.{level}", x, BLOCKS)
            if level < TOP:  # one pixel of padding, at the right and below
                x = self.conv(f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), 0, 2)
        x = F.silu(self.norm("encoder.norm_out", self.ends("encoder", x)))
        mean, logvar = self.conv("quant_conv", self.conv("encoder.conv_out", x)).chunk(2, 1)
        return mean, (0.5 * logvar.clamp(-30, 20)).exp()

    def pictures(self, z):
        x = self.ends("decoder", self.conv("decoder.conv_in", self.conv("post_quant_conv", z)))
        for level in reversed(range(TOP + 1)):
            x = self.blocks(f"decoder.up.{level}", x, BLOCKS + 1)
            if level:
                x = self.conv(
                    f"decoder.up.{level}.upsample.conv", F.interpolate(x, scale_factor=2.0)
                )
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)))


def test_moments_and_pictures_are_those_of_the_formulas(tmp_path):
    pytest.importorskip("diffusers")
    public = Formulas(written(tmp_path / "vavae.pt"))
    found, vae = find_vae(tmp_path / "vavae.pt"), load_vae(tmp_path / "vavae.pt")
    assert (found.channels, found.factor) == (LATENT, 4)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    for ours, theirs in zip(encode(vae, pixels), public.moments(pixels.double()), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
    z = torch.randn(2, LATENT, 4, 4)
    wanted = public.pictures(z.double())
    torch.testing.assert_close(vae.decode(z).sample.double(), wanted, rtol=1e-4, atol=1e-5)
    bytes_ = ((wanted + 1) * 127.5).round().clamp(0, 255)
    assert (decode(vae, z).double() - bytes_).abs().max() <= 1


def test_what_is_no_such_autoencoder_is_named(tmp_path):
    pytest.importorskip("diffusers")
    (tmp_path / "torn.pt").write_bytes(b"no zip")
    torch.save({"state_dict": {"net.weight": torch.zeros(2)}}, tmp_path / "other.pt")
    weights = written(tmp_path / "part.pt")
    del weights["decoder.mid.block_1.conv1.weight"]
    torch.save({name: value.float() for name, value in weights.items()}, tmp_path / "part.pt")
    for name, message in (
        ("torn", "torn.pt is no whole checkpoint"),
        ("other", "encoder.conv_in.weight' is not there"),
        ("part", "decoder.mid_block.resnets.0.conv1.weight"),
    ):
        with pytest.raises(ValueError, match=message):
            load_vae(tmp_path / f"{name}.pt")


SMALL = [
    *("name=x", "data.num_classes=2", "data.num_workers=0", "logger=csv"),
    *("callbacks=plain", "~callbacks.progress", "trainer.enable_progress_bar=false"),
    *("trainer.accelerator=cpu", "trainer.devices=1", "precision=fp32", "module.lr=2e-3"),
    *("evaluation.queries=8", "evaluation.samples_per_class=1", "evaluation.steps=1"),
]


def encoded(tmp_path, monkeypatch, vae, copies):
    """Latents of four pictures in two classes, each as often as said."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for index in range(4 * copies):
        folder = tmp_path / "pictures" / str(index % 2)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index % 4).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03d}.png")
    latents = tmp_path / "latents"
    folders = [tmp_path / "pictures", latents, "--vae", vae, "--size", 16, "--num-workers", 0]
    arguments = ["stagewise encode", *folders, "--device", "cpu"]
    arguments += ["--no-flips"] * (copies > 1)
    monkeypatch.setattr(sys, "argv", [str(value) for value in arguments])
    command.main()
    return latents


def trained(run_dir, latents, kind, *overrides):
    """A recipe with a small network, trained on them."""
    model = "sit_s" if kind == "sdvae" else "lightningdit_s"
    small = [
        *(f"experiment=imagenet256_{kind}_{model}", f"data.latents.path={latents}", *SMALL),
        *(f"run_dir={run_dir}", "net.in_channels=6", "net.input_size=4", "net.patch_size=1"),
        *("net.num_heads=4", "net.hidden_size=64", "net.depth=2", "net.class_dropout=0.0"),
    ]
    with initialize_config_module("stagewise.recipes.conf", version_base="1.3"):
        train(compose("train", [*small, *overrides]))


def come_back(run_dir, latents, vae, *options):
    """How far the pictures of samples are from the nearest ones stored: all, and which."""
    options = [*options, "--count", 8, "--steps", 100, "--method", "euler", "--vae", vae]
    file = run(parse([str(part) for part in (run_dir, *options, "--device", "cpu")]))
    with np.load(file, allow_pickle=False) as arrays:
        pictures, labels = torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2), arrays["arr_1"]
    stored = open_latents(latents, normalize=False, multiplier=1.0, flips="both")
    wanted = decode(load_vae(vae), stored.rows(0, len(stored)))
    apart = (pictures[:, None].int() - wanted[None].int()).abs().flatten(2)
    nearest = apart.float().mean(2).argmin(1)
    assert stored.labels[nearest].tolist() == labels.tolist()
    assert len(wanted[nearest].unique(dim=0)) > 2
    return apart[torch.arange(8), nearest], wanted


@pytest.mark.parametrize("kind", ["sdvae", "vavae"])
@pytest.mark.slow
def test_the_pictures_of_a_repeated_training_set_come_back(tmp_path, monkeypatch, kind):
    pytest.importorskip("diffusers")
    vae, run_dir = tmp_path / "vae.pt", tmp_path / "run"
    written(vae)
    latents = encoded(tmp_path, monkeypatch, vae, 1)
    scale = {"autoencoder": "sd-vae"} if kind == "sdvae" else {}
    std = open_latents(latents, **scale).statistics().overall()[1]
    about = (f"data.latents.expected_std={std}", "data.batch_size=4", "trainer.max_steps=1")
    trained(run_dir, latents, kind, *about, "ema=none")
    # With the velocity of a model that repeats its training set.
    apart, _ = come_back(run_dir, latents, vae, "--oracle-until", 1)
    assert apart.max() <= 2  # of the 255 levels: the solver takes 100 steps


def calm(path):
    """The same with a decoder that is as calm as trained ones, and latents without noise.

    Of latents that are 1 % off the pictures are off by half a level of 255, not by almost two.
    """
    written(path)
    held = torch.load(path)
    weights = held["state_dict"]
    weights["quant_conv.bias"][LATENT:] -= 15
    for part in ("weight", "bias"):
        weights[f"quant_conv.{part}"][:LATENT] *= 50
    weights["post_quant_conv.weight"] /= 50
    weights["decoder.conv_out.weight"] *= 0.3
    torch.save(held, path)


@pytest.mark.slow
def test_a_model_that_was_trained_on_four_pictures_repeats_them(tmp_path, monkeypatch):
    """To within 2 % of the latents, which are 5 times as wide as the noise."""
    pytest.importorskip("diffusers")
    vae, more = tmp_path / "vae.pt", ()
    calm(vae)
    latents = encoded(tmp_path, monkeypatch, vae, 128)
    about = ["objective.prediction=data", "objective.cosine=false", "ema=short"]
    about += ["data.batch_size=32", "data.latents.expected_std=5.0", "precision=fp32"]
    about += ["data.latents.multiplier=5.0"]
    for rate, steps in ((2e-3, 1500), (3e-4, 500)):
        run_dir = tmp_path / f"run{rate}"
        rest = (f"module.lr={rate}", f"trainer.max_steps={steps}", *more)
        trained(run_dir, latents, "vavae", *about, *rest)
        more = (f"weights={run_dir / 'checkpoints/last.ckpt'}",)
    apart, wanted = come_back(run_dir, latents, vae)
    assert wanted.float().std() > 20
    assert apart.max() <= 8  # of 255
    assert apart.float().mean() <= 1
