"""Profiles against direct computations, the command with good and with bad input."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from stagewise import LatentBank
from stagewise.latents import make_latents, open_latents, write_latents
from stagewise.profile import Profile, count_duplicates
from stagewise.recipes import cli
from stagewise.recipes import profile as command
from stagewise.recipes.make_latents import main as make_main
from stagewise.recipes.profile import rows_within

SHAPE = (4, 4, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Made latents that no test changes: shards, and means with another spectrum."""
    root = tmp_path_factory.mktemp("sets")
    make_latents(root / "vae", 120, SHAPE, 3, seed=1, duplicates=7, shard_size=50)
    make_latents(root / "rough", 90, (2, 4, 4), 3, "repa", exponent=0.5)
    return root


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `stagewise` with arguments: exit code, output, errors."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["stagewise", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as error:
            code = error.code
            if isinstance(code, str):  # what the interpreter does with it
                print(code, file=sys.stderr)
                code = 1
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture
def quick(monkeypatch):
    """Pictures stay empty; drawing them would take most of the time."""
    monkeypatch.setattr(command, "render", lambda _: np.zeros((2, 3, 3), dtype=np.uint8))


def strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def gaussian(n=300, *shape, seed=0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


# The profile.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_against_a_direct_computation(dtype):
    scale = torch.tensor([1.0, 2.0, 0.5])[:, None, None]
    x = gaussian(300, 3, 4, 4) * scale + scale
    labels = torch.arange(300) % 3
    bank = LatentBank(x, labels, dtype=dtype)
    stored = bank.take(torch.arange(300)).view(300, 3, 4, 4)
    found = Profile.measure(bank, queries=4)
    assert (found.rows, found.dim, found.shape, found.classes) == (300, 48, (3, 4, 4), 3)
    assert found.class_rows == (100, 100, 100)
    assert found.class_wise
    assert found.mean == pytest.approx(float(stored.mean()), rel=1e-9)
    assert found.std == pytest.approx(float(stored.std(correction=0)), rel=1e-9)
    assert found.std == pytest.approx(bank.std, rel=1e-9)
    by_channel = stored.movedim(1, 0).flatten(1)
    assert found.channel_mean == pytest.approx(by_channel.mean(1).tolist(), rel=1e-9)
    assert found.channel_std == pytest.approx(by_channel.std(1, correction=0).tolist(), rel=1e-9)

    rows = stored.flatten(1)[bank.segment(1)]  # of three classes of one size the second
    variances = torch.linalg.eigvalsh(torch.cov(rows.T, correction=0)).flip(0)
    torch.testing.assert_close(found.eigenvalues, variances, rtol=1e-6, atol=1e-9)
    assert found.effective_dim == pytest.approx(
        float(variances.sum() ** 2 / variances.square().sum()), rel=1e-6
    )
    # The predicted boundary is where the information of classes reaches log N.
    nats = found.information(torch.tensor([found.predicted]).double())
    assert float(nats) == pytest.approx(math.log(100), rel=0.1)


def test_the_curve_against_a_brute_force_posterior():
    x = gaussian(200, 24)
    bank = LatentBank(x)
    found = Profile.measure(bank, queries=64, strata=8, seed=3)
    for stratum in (1, 3, 5):
        t = found.curve.t[stratum]
        draws = torch.Generator().manual_seed(9)
        rows = torch.randint(200, (2000,), generator=draws)
        times = t[torch.randint(len(t), (2000,), generator=draws)][:, None]
        noise = torch.randn(2000, 24, generator=draws, dtype=torch.float64)
        xt = times * x[rows].double() + (1 - times) * noise
        square = (xt[:, None] - times[..., None] * x.double()).square().sum(-1)
        weights = torch.softmax(-square / (2 * (1 - times) ** 2), dim=1)
        top1, ess = weights.amax(1), 1 / weights.square().sum(1)
        for name, value in (("top1", top1), ("ess", ess)):
            error = float(value.std()) / 64**0.5  # of the profile's 64 queries
            assert abs(float(found.curve.mean(name)[stratum] - value.mean())) < 4 * error + 1e-3
    difference = found.curve.mean("target_difference")
    assert found.removable == pytest.approx(
        sum(float(d) * float(w) for d, w in zip(difference, found.edges.diff(), strict=True))
    )


def test_profile_is_that_of_the_seed_and_leaves_the_generators_alone():
    bank = LatentBank(gaussian(100, 8))
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, two, other = (Profile.measure(bank, queries=4, seed=seed) for seed in (0, 0, 1))
    assert one.as_dict() == two.as_dict() != other.as_dict()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_duplicates_are_counted_exactly(dtype):
    x = gaussian(50, 6)
    labels = torch.arange(50) % 5
    copies = torch.tensor([3, 3, 3, 10, 11])
    labels = torch.cat([labels, labels[copies]])
    labels[-1] = (labels[-1] + 1) % 5
    x = torch.cat([x, x[copies]])
    x[-2] = -0.0 + x[-2]
    assert count_duplicates(LatentBank(x, dtype=dtype)) == (5, 0)
    assert count_duplicates(LatentBank(x, labels, dtype=dtype)) == (5, 1)
    near = x.clone()
    near[-1, 0] = torch.nextafter(near[-1, 0], torch.tensor(9.0))
    assert count_duplicates(LatentBank(near)) == (4, 0)
    zeros = torch.cat([torch.zeros(1, 6), -torch.zeros(1, 6), x[:5]])
    assert count_duplicates(LatentBank(zeros)) == (1, 0)


def test_a_bank_of_equal_rows_says_nothing_and_does_not_fail():
    found = Profile.measure(LatentBank(torch.ones(10, 4)), queries=2)
    assert math.isnan(found.predicted)
    assert found.duplicates == 9
    text = json.dumps(found.as_dict(), allow_nan=False)
    assert strict(text)["predicted"] is None


# Limits.


def test_limits_keep_classes_whole():
    labels = torch.arange(100) % 10
    chosen = rows_within(35, 100, labels)
    assert len(chosen) == 30
    assert len(labels[chosen].unique()) == 3
    assert torch.equal(chosen, chosen.sort().values)
    uneven = torch.tensor([0] * 50 + [1] * 5 + [2] * 5)
    assert len(rows_within(12, 60, uneven)) == 50  # one class at least
    assert rows_within(4, 100, None).tolist() == [0, 25, 50, 75]


# The command.


def test_one_set(folder, run, tmp_path):
    code, out, _ = run("profile", folder / "vae", "--queries", 8, "--output", tmp_path)
    assert code == 0
    assert max(map(len, out.splitlines())) <= max(100, len(f"         {tmp_path}/vae.png"))
    assert "7 rows equal an earlier one" in out
    assert "LightningDiT latents" in out
    (held,) = strict((tmp_path / "profile.json").read_text())
    latents = open_latents(folder / "vae")
    bank = latents.bank()
    direct = Profile.measure(bank, queries=8)
    assert held["duplicates"] == direct.duplicates == 7
    assert held["boundary"]["midpoint"] == direct.boundary.midpoint
    assert held["curve"]["ess"] == direct.curve.mean("ess").tolist()
    # Copies never let it collapse.
    assert "oracle targets at all t remove the floor from the loss" in out
    assert "docs/latents.md" in out
    picture = np.asarray(Image.open(tmp_path / "vae.png"))
    assert picture.shape[2] == 3
    assert picture.std() > 10
    assert not (tmp_path / "comparison.png").exists()


def test_two_sets(folder, run, quick, tmp_path):
    sets = (folder / "vae", folder / "rough")
    arguments = ("--format", "auto", "repa", "--queries", 8, "--no-class-wise")
    code, out, _ = run("profile", *sets, *arguments, "--output", tmp_path)
    assert code == 0
    assert "== side by side" in out
    one, two = strict((tmp_path / "profile.json").read_text())
    assert (one["name"], two["name"]) == ("vae", "rough")
    assert (one["dim"], two["dim"]) == (64, 32)
    assert not one["class_wise"]
    assert {file.name for file in tmp_path.glob("*.png")} == {
        *("vae.png", "rough.png", "comparison.png")
    }


def test_sets_of_the_same_name_have_pictures_of_their_own(folder, run, quick, tmp_path):
    make_latents(tmp_path / "other/vae", 60, SHAPE, 2, seed=2)
    code, _, _ = run(
        *("profile", folder / "vae", tmp_path / "other/vae", "--queries", 2, "--output", tmp_path)
    )
    assert code == 0
    assert (tmp_path / "other_vae.png").exists()
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_a_corrupt_shard_is_named_and_the_rest_profiled(folder, run, quick, tmp_path):
    copy = make_latents(tmp_path / "vae", 120, SHAPE, 3, seed=1, shard_size=50)
    file = copy / "latents_rank00_shard001.safetensors"
    file.write_bytes(file.read_bytes()[:3000])
    code, out, _ = run("profile", copy, "--queries", 2, "--output", tmp_path / "out")
    assert code == 0
    assert "left out" in out
    assert "latents_rank00_shard001.safetensors" in out
    (held,) = strict((tmp_path / "out/profile.json").read_text())
    assert held["rows"] == 70
    assert len(held["left_out"]) == 1


def test_a_limit_is_said(folder, run, quick, tmp_path):
    arguments = ("--queries", 2, "--limit", 45, "--output", tmp_path)
    code, out, _ = run("profile", folder / "vae", *arguments)
    assert code == 0
    assert "41 of 120 rows: whole classes" in out
    assert "120 rows of 64 numbers" in out
    code, out, _ = run("profile", folder / "vae", *arguments, "--no-class-wise")
    assert "45 of 120 rows, evenly spaced: with all rows the boundary is later" in " ".join(
        out.split()
    )


def test_scales_are_said_for_each_set(run, quick, tmp_path):
    raw = gaussian(60, *SHAPE) / 0.18215
    write_latents(tmp_path / "sd", [(raw, torch.arange(60) % 2)], stats=False)
    make_latents(tmp_path / "va", 60, SHAPE, 2)
    arguments = ("--queries", 2, "--output", tmp_path / "out")
    sets = (tmp_path / "va", tmp_path / "sd")
    code, _, err = run("profile", *sets, *arguments)
    assert code == 1
    assert "latents_stats.pt" in err
    code, _, _ = run("profile", *sets, *arguments, "--scale", "stats", 0.18215)
    assert code == 0
    one, two = strict((tmp_path / "out/profile.json").read_text())
    assert one["std"] == pytest.approx(1, abs=1e-3)
    assert two["std"] == pytest.approx(1, abs=0.05)


def test_bad_input_is_one_message_and_exit_code_one(folder, run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    mixed = make_latents(tmp_path / "mixed", 40, SHAPE, 2, shard_size=20)
    file = mixed / "latents_rank00_shard001.safetensors"
    held = load_file(file)
    save_file({k: v if k == "labels" else v[:, :2].clone() for k, v in held.items()}, file)
    twice = tmp_path / "twice.npy"
    np.save(twice, gaussian(40, *SHAPE).numpy() * 0.18215)
    bare = tmp_path / "bare.npy"
    np.save(bare, gaussian(40, *SHAPE).numpy())
    nan = tmp_path / "nan.npy"
    np.save(nan, np.full((40, 3), np.nan, np.float32))
    cases = [
        ((tmp_path / "nowhere",), "no such path"),
        ((empty,), "What is looked for:\n  LightningDiT"),
        ((mixed,), "Keep latents of each shape in a folder|put each into its own folder"),
        ((folder / "rough",), 'Say which: format="repa"'),
        ((twice,), "scaled twice"),
        ((bare, "--class-wise"), "--no-class-wise"),
        ((nan,), "NaN or Inf in 40 of 40"),
        ((bare, bare, bare), "one or two sets"),
        ((bare, "--limit", 1), "--limit of at least 2"),
        ((bare, "--queries", 1), "--queries of at least 2"),
        ((bare, "--scale", "large"), "auto, stats or a number"),
        ((bare, "--scale", "auto", "auto"), "one for each of 1 sets"),
    ]
    for arguments, message in cases:
        code, _, err = run("profile", *arguments, "--output", tmp_path / "out")
        assert code == 1, arguments
        assert err.startswith("stagewise profile: ")
        assert err.startswith("stagewise profile: ")
        assert any(part in err for part in message.split("|")), err
    assert not (tmp_path / "out").exists()


def test_make_latents_as_a_command(run, tmp_path):
    arguments = ("--rows", 30, "--shape", 2, 4, 4, "--classes", 3, "--duplicates", 4)
    code, out, _ = run("make-latents", tmp_path / "x.npy", *arguments, "--format", "plain")
    assert code == 0
    assert "30 rows of (2, 4, 4), plain" in out
    assert count_duplicates(open_latents(tmp_path / "x.npy").bank())[0] == 4
    code, _, err = run("make-latents", tmp_path / "x.npy", *arguments, "--format", "plain")
    assert code == 1
    assert "new or empty place" in err
    assert make_main.__module__ == "stagewise.recipes.make_latents"


def test_help_names_every_option(run):
    code, out, _ = run("profile", "--help")
    assert code == 0
    for option in ("--output", "--no-class-wise", "--limit", "--format", "--scale", "--queries"):
        assert option in out
    assert command.parser().parse_args(["x"]).queries == 64
    assert run("make-latents", "--help")[0] == 0
