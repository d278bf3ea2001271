"""`stagewise sample`: from a trained run to samples, by any number of ranks, and after a stop."""

import copy as copying
import dataclasses
import errno
import io
import json
import os
import shutil
import sys
import types
from datetime import timedelta

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from stagewise import CosinePath, LatentBank, LinearPath, Oracle
from stagewise.recipes import sample as command
from stagewise.recipes import sample_files
from stagewise.recipes.checkpoints import find_checkpoint, load_module, run_config
from stagewise.recipes.sample import parse, run
from stagewise.recipes.sample_files import Ranks, SampleFolder, group_of_ranks
from stagewise.recipes.sampler import Sampler, noise_of, require_alike

QUICK = ["--count", "12", "--batch-size", "5", "--steps", "3", "--method", "euler"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, train_tiny):
    """A run of three steps, without probes."""
    return train_tiny(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def module(trained):
    """Its module, with averaged weights."""
    return load_module(run_config(trained), find_checkpoint(trained))[0]


@pytest.fixture
def probed(trained, tmp_path):
    """`probed(midpoint, collapsed)`: the same run with this boundary in its last probe."""

    def make(midpoint, collapsed):
        folder = tmp_path / "probed"
        shutil.copytree(trained, folder)
        probes = [
            {"event": "probe", "step": step, "t": [], "top1": [], "midpoint": m, "collapsed": c}
            for step, m, c in ((0, 0.9, 0.95), (3, midpoint, collapsed))
        ]
        (folder / "stages").mkdir()
        text = "".join(json.dumps(probe) + "\n" for probe in probes)
        (folder / "stages/stages.jsonl").write_text(text)
        return folder

    return make


def made(folder, *arguments):
    """The arrays of a call, by name."""
    file = run(parse([str(folder), *QUICK, *map(str, arguments)]))
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def sampler_of(trained, module, *arguments):
    options = parse([str(trained), *QUICK, *arguments])
    return Sampler(module, options, (3, 8, 8), 7)


# -- what is written --------------------------------------------------------------------------


def test_samples_are_what_the_suite_reads(trained, module, tmp_path, capsys):
    out = tmp_path / "out"
    arrays = made(trained, "--out", out)
    assert list(arrays) == ["arr_0", "arr_1"]
    pictures, labels = arrays["arr_0"], arrays["arr_1"]
    assert (pictures.dtype, pictures.shape) == (np.uint8, (12, 8, 8, 3))
    assert labels.dtype == np.int64
    assert labels.tolist() == [i % 7 for i in range(12)]
    # Euler's three steps by hand, all samples in one batch.
    x = torch.stack([noise_of(0, i, (3, 8, 8)) for i in range(12)])
    with torch.no_grad():
        for step in range(3):
            x = x + module.net(x, torch.full((12,), step / 3), torch.from_numpy(labels)) / 3
    expected = ((x.double() + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(pictures - expected).max() <= 0.5 + 1e-3
    assert pictures.std() > 5
    # Byte by byte the file that numpy would have written.
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    assert (out / "samples.npz").read_bytes() == buffer.getvalue()
    assert sorted(file.name for file in out.iterdir()) == [
        "grid.png",
        "samples.npz",
        "settings.json",
    ]
    grid = np.asarray(Image.open(out / "grid.png"))
    assert grid.shape == (3 * 9 + 1, 4 * 9 + 1, 3)
    assert (grid[1:9, 10:18] == pictures[1]).all()
    assert (grid[19:27, 28:36] == pictures[11]).all()
    said = capsys.readouterr().out
    assert "last.ckpt, step 3, averaged weights" in said
    assert f"{out / 'samples.npz'}; {out / 'grid.png'} shows the first 12 samples" in said


def test_the_folder_is_named_after_the_settings(trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    made(copy, "--grid", 0)
    made(copy, "--shift", 0.5, "--coarse", 0.25, "--cfg-scale", 2, "--cfg-interval", 0.1, 0.6)
    made(copy, "--cfg-scale", 2, "--cfg-channels", 1, "--seed", 3, "--weights", "current")
    assert sorted(folder.name for folder in (copy / "samples").iterdir()) == [
        "step3_averaged_euler3_seed0_n12",
        "step3_averaged_euler3_shift0.5_coarse0.25_cfg2_from0.1to0.6_seed0_n12",
        "step3_current_euler3_cfg2_channels1_seed3_n12",
    ]
    assert not (copy / "samples/step3_averaged_euler3_seed0_n12/grid.png").exists()
    options = parse([str(copy), "--method", "dopri5", "--oracle-until", "0.25", "--vae", "x"])
    loaded = load_module(run_config(copy), find_checkpoint(copy))[1]
    assert options.folder(loaded).name == "step3_averaged_dopri5_oracle0.25_decoded_seed0_n64"


def test_settings_change_samples(trained, tmp_path):
    one = made(trained, "--out", tmp_path / "one")["arr_0"]
    for name, arguments in {
        "weights": ["--weights", "current"],
        "seed": ["--seed", "1"],
        "shift": ["--shift", "0.1"],
        "coarse": ["--coarse", "0.7"],
        "scale": ["--cfg-scale", "8"],
        "method": ["--method", "heun2"],
        "oracle": ["--oracle-until", "0.7"],
    }.items():
        other = made(trained, "--out", tmp_path / name, *arguments)["arr_0"]
        assert (other != one).any(), name
    whole = made(trained, "--out", tmp_path / "a", "--cfg-scale", 8)["arr_0"]
    part = made(trained, "--out", tmp_path / "b", "--cfg-scale", 8, "--cfg-channels", 1)["arr_0"]
    assert (whole != part).any()


def test_labels_are_taken_in_turn(trained, tmp_path):
    labels = made(trained, "--out", tmp_path / "o", "--labels", "3,0,3,6")["arr_1"]
    assert labels.tolist() == 3 * [3, 0, 3, 6]


def test_bf16_is_near(trained, tmp_path):
    wide = made(trained, "--out", tmp_path / "a")["arr_0"].astype(float)
    narrow = made(trained, "--out", tmp_path / "b", "--precision", "bf16")["arr_0"]
    assert 0 < np.abs(wide - narrow).mean() < 2


# -- noise, batches and ranks -----------------------------------------------------------------


def test_noise_depends_on_seed_and_index_alone():
    assert torch.equal(noise_of(2, 5, (3, 4)), noise_of(2, 5, (3, 4)))
    seen = [noise_of(seed, i, (3, 4)) for seed in (0, 1) for i in (0, 1, 2)]
    assert len({float(noise.sum()) for noise in seen}) == 6
    # A seed alone, as data and training take it, gives other numbers, also for sample 0.
    for seed in (0, 1):
        trained_with = np.random.SeedSequence((seed, 0, 0, 0)).generate_state(1, np.uint64)[0]
        draws = torch.Generator().manual_seed(int(trained_with) >> 1)
        assert not torch.equal(torch.randn(3, 4, generator=draws), noise_of(seed, 0, (3, 4)))
    many = torch.stack([noise_of(0, i, (4,)) for i in range(4000)])
    assert many.mean().abs() < 0.04
    assert (many.std() - 1).abs() < 0.02
    assert torch.corrcoef(many.T).fill_diagonal_(0).abs().max() < 0.06


def test_batch_size_changes_rounding_only(trained, tmp_path):
    one = made(trained, "--out", tmp_path / "a", "--batch-size", 12)["arr_0"].astype(int)
    other = made(trained, "--out", tmp_path / "b", "--batch-size", 1)["arr_0"]
    assert np.abs(one - other).max() <= 1
    assert (one == other).mean() > 0.99


ADAPTIVE = ["--count", "12", "--batch-size", "5", "--method", "dopri5"]


def test_two_ranks_give_the_file_of_one(trained, module, tmp_path):
    # The second rank first, and the solver is one whose steps depend on the batch.
    one = run(parse([str(trained), *ADAPTIVE, "--out", str(tmp_path / "one")]))
    folder = SampleFolder(tmp_path / "two", "pictures", 12, 5)
    folder.start({}, resume=False)
    sampler = Sampler(module, parse([str(trained), *ADAPTIVE]), (3, 8, 8), 7)
    finish = command.finisher(None, sampler.options, (3, 8, 8), torch.device("cpu"), True)
    counts = [command._make(folder, sampler, finish, Ranks(rank, 2)) for rank in (1, 0)]
    assert counts == [5, 7]
    folder.join()
    assert folder.file.read_bytes() == one.read_bytes()


@pytest.mark.slow
def test_two_processes_give_the_file_of_one(trained, on_one_and_two_ranks):
    # The group is that of the scripts before, and is left to those after.
    folders = on_one_and_two_ranks(
        f"""
import os
import sys
import torch
from stagewise.recipes.sample import main

dist = torch.distributed
join, leave = dist.init_process_group, dist.destroy_process_group
dist.init_process_group = lambda *a, **k: None if dist.is_initialized() else join(*a, **k)
dist.destroy_process_group = lambda: None
out = sys.argv[1] + "/samples"
sys.argv = ["stagewise sample", {str(trained)!r}, "--out", out, *{[*ADAPTIVE, "--cfg-scale", "2"]}]
main()
dist.init_process_group, dist.destroy_process_group = join, leave
"""
    )
    one, two = ({f.name: f.read_bytes() for f in (d / "samples").iterdir()} for d in folders)
    assert one.keys() == two.keys() == {"grid.png", "samples.npz", "settings.json"}
    assert one == two


def test_ranks_that_do_not_come_are_named(monkeypatch):
    monkeypatch.setattr(sample_files.dist, "broadcast_object_list", lambda told, src: None)

    def full():
        raise OSError("no room")

    with pytest.raises(ValueError, match="no room"):
        Ranks(0, 2).first(full)
    assert Ranks(0, 2).first(lambda: None) is None

    def late(timeout, wait_all_ranks):
        assert timeout == timedelta(minutes=2)
        raise RuntimeError("Ranks 1 failed to pass monitoredBarrier")

    monkeypatch.setattr(sample_files.dist, "monitored_barrier", late)
    with pytest.raises(
        TimeoutError, match=r"Rank 0 waited for the others, 2 minutes at most: Ranks 1 .*--resume"
    ):
        Ranks(0, 2, 2.0).wait()
    assert Ranks().wait() is None


def test_a_rank_that_finds_no_others_says_so(monkeypatch):
    def alone(backend, timeout):
        assert backend == "gloo"
        raise RuntimeError("nobody there")

    for key, value in {"WORLD_SIZE": "3", "RANK": "1"}.items():
        monkeypatch.setitem(os.environ, key, value)
    monkeypatch.setattr(sample_files.dist, "init_process_group", alone)
    with (
        pytest.raises(TimeoutError, match="Rank 1 did not find the other 2: nobody there"),
        group_of_ranks(1.0),
    ):
        pass


# -- stop and resume --------------------------------------------------------------------------


def test_resuming_is_not_stopping(trained, tmp_path, monkeypatch, power_cut, capsys):
    arguments = ["--out", tmp_path / "stopped", "--cfg-scale", 2]
    whole = made(trained, "--out", tmp_path / "whole", "--cfg-scale", 2)
    ask, asked = Sampler.__call__, []

    def cut(self, indices):
        asked.append(indices)
        if len(asked) == 2:
            raise power_cut
        return ask(self, indices)

    monkeypatch.setattr(Sampler, "__call__", cut)
    with pytest.raises(power_cut):
        made(trained, *arguments)
    assert [file.name for file in (tmp_path / "stopped/parts").iterdir()] == ["000000.npz"]
    with pytest.raises(ValueError, match="holds samples already .*parts.*--resume"):
        made(trained, *arguments)
    with pytest.raises(ValueError, match="shift: 1.0 there, 0.5 now; seed: 0 there, 1 now. Use"):
        made(trained, *arguments, "--resume", "--seed", 1, "--shift", 0.5)
    again = made(trained, *arguments, "--resume")
    assert asked[2:] == [range(5, 10), range(10, 12)]
    for name in whole:
        assert np.array_equal(again[name], whole[name])
    one, other = (tmp_path / name / "samples.npz" for name in ("whole", "stopped"))
    assert one.read_bytes() == other.read_bytes()
    # Of a folder that is whole nothing is made, but a picture that is missing.
    (tmp_path / "stopped/grid.png").unlink()
    capsys.readouterr()
    made(trained, *arguments, "--resume")
    assert len(asked) == 4
    assert "all made before" in capsys.readouterr().out
    assert (tmp_path / "stopped/grid.png").exists()


def test_damaged_samples_are_made_again(trained, tmp_path, monkeypatch, power_cut, capsys):
    """A part of which a bit was flipped, one cut short, one of no bytes; and the joined file."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    made(trained, "--out", whole, "--batch-size", 2)
    with monkeypatch.context() as patch:
        patch.setattr(SampleFolder, "join", lambda self: (_ for _ in ()).throw(power_cut))
        with pytest.raises(power_cut):
            made(trained, "--out", out, "--batch-size", 2)
    parts = sorted((out / "parts").iterdir())
    flipped = bytearray(parts[0].read_bytes())
    flipped[200] ^= 1
    for part, data in zip(parts, (flipped, parts[1].read_bytes()[:-40], b""), strict=False):
        part.write_bytes(data)
    kept = parts[3].stat().st_mtime_ns
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(SampleFolder, "join", lambda self: (_ for _ in ()).throw(power_cut))
        with pytest.raises(power_cut):
            made(trained, "--out", out, "--batch-size", 2, "--resume")
    said = capsys.readouterr().out
    assert [f"{part} is damaged: its samples are made again." in said for part in parts] == [
        True,
        True,
        True,
        *[False] * 3,
    ]
    assert parts[3].stat().st_mtime_ns == kept
    made(trained, "--out", out, "--batch-size", 2, "--resume")
    file = out / "samples.npz"
    assert file.read_bytes() == (whole / "samples.npz").read_bytes()
    data = bytearray(file.read_bytes())
    data[400] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"samples.npz is damaged. Delete it, and repeat the comm"):
        made(trained, "--out", out, "--batch-size", 2, "--resume")
    file.unlink()
    made(trained, "--out", out, "--batch-size", 2, "--resume")
    assert file.read_bytes() == (whole / "samples.npz").read_bytes()


def test_a_full_disk_keeps_what_is_made(trained, tmp_path, monkeypatch):
    save, calls = np.savez, []

    def full(file, **arrays):
        calls.append(file)
        if len(calls) == 2:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(file, **arrays)

    monkeypatch.setattr(sample_files.np, "savez", full)
    with pytest.raises(OSError, match=r"000001.npz .*kept. To continue, .*--resume"):
        made(trained, "--out", tmp_path / "out")
    assert [file.name for file in (tmp_path / "out/parts").iterdir()] == ["000000.npz"]
    again = made(trained, "--out", tmp_path / "out", "--resume")
    assert np.array_equal(again["arr_0"], made(trained, "--out", tmp_path / "whole")["arr_0"])


@pytest.mark.skipif(os.name != "posix", reason="rights of files")
def test_samples_have_the_rights_that_the_mask_gives(trained, tmp_path):
    before = os.umask(0o027)
    try:
        made(trained, "--out", tmp_path / "out")
    finally:
        os.umask(before)
    rights = {f.name: oct(f.stat().st_mode & 0o777) for f in (tmp_path / "out").iterdir()}
    assert rights == {name: "0o640" for name in ("samples.npz", "settings.json", "grid.png")}


def test_a_configuration_that_cannot_be_made_is_named(trained, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    file = copy / "config.yaml"
    file.write_text(file.read_text().replace("warmup_steps", "w!rmup_steps"))
    monkeypatch.setattr(sys, "argv", ["stagewise sample", str(copy), *QUICK])
    with pytest.raises(SystemExit, match=r"copy/config.yaml cannot be used: (.|\n)*w!rmup_steps"):
        command.main()


def test_a_folder_of_others_is_refused(trained, tmp_path):
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros(3))
    with pytest.raises(ValueError, match=r"holds samples already \(samples.npz\)"):
        made(trained, "--out", tmp_path)
    with pytest.raises(ValueError, match=r"Expected settings.json beside the samples"):
        made(trained, "--out", tmp_path, "--resume")
    assert os.listdir(tmp_path) == ["samples.npz"]


def test_a_killed_join_goes_on(trained, tmp_path, monkeypatch, power_cut):
    whole = made(trained, "--out", tmp_path / "whole")

    def cut(*_):
        raise power_cut

    with monkeypatch.context() as patch:
        # Between the joined file and the end of its parts.
        patch.setattr(sample_files.shutil, "rmtree", cut)
        with pytest.raises(power_cut):
            made(trained, "--out", tmp_path / "cut")
    assert (tmp_path / "cut/parts").exists()
    again = made(trained, "--out", tmp_path / "cut", "--resume")
    assert not (tmp_path / "cut/parts").exists()
    assert np.array_equal(again["arr_0"], whole["arr_0"])


def test_parts_that_are_missing_or_others_are_named(tmp_path):
    folder = SampleFolder(tmp_path, "pictures", 5, 2)
    folder.start({"seed": 1}, resume=False)
    assert folder.batches == [range(0, 2), range(2, 4), range(4, 5)]
    x = torch.arange(5 * 12, dtype=torch.uint8).reshape(5, 2, 2, 3)
    folder.write(0, x[:2], torch.arange(2))
    folder.write(2, x[4:], torch.arange(4, 5))
    with pytest.raises(ValueError, match=r"Expected 3 batches in .*missing: 1\. Make them"):
        folder.join()
    folder.write(1, x[2:3], torch.arange(2, 3))
    with pytest.raises(ValueError, match=r"uint8 of shape \(2, 2, 2, 3\) as arr_0 in .*000001"):
        folder.join()
    assert not folder.file.exists()
    folder.write(1, x[2:4], torch.arange(2, 4))
    folder.join()
    with np.load(folder.file) as arrays:
        assert np.array_equal(arrays["arr_0"], x)
        assert arrays["arr_1"].tolist() == [0, 1, 2, 3, 4]
    assert sorted(os.listdir(tmp_path)) == ["samples.npz", "settings.json"]


def test_settings_without_samples_are_written_anew(trained, tmp_path):
    # As when the autoencoder was not found: nothing was made, so there is nothing to resume.
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "parts").mkdir()
    made(trained, "--out", tmp_path)
    assert json.loads((tmp_path / "settings.json").read_text())["count"] == 12


# -- guidance, oracle, boundary ---------------------------------------------------------------


class Recorded(nn.Module):
    """The network, and when it was asked with and without a label."""

    def __init__(self, net):
        super().__init__()
        self.net, self.asked = net, {True: [], False: []}

    def forward(self, xt, t, labels):
        self.asked[labels is not None].append(round(float(t[0]), 6))
        return self.net(xt, t, labels)


def test_guidance_asks_in_its_interval_only(trained, module):
    module.net = Recorded(module.net)
    arguments = ["--steps", "10", "--cfg-scale", "3", "--cfg-interval", "0.25", "0.65"]
    guided = sampler_of(trained, module, *arguments)(range(4))
    times = [i / 10 for i in range(10)]
    assert module.net.asked == {True: times, False: [0.3, 0.4, 0.5, 0.6]}
    everywhere = sampler_of(trained, module, "--steps", "10", "--cfg-scale", "3")(range(4))
    plain = sampler_of(trained, module, "--steps", "10")(range(4))
    assert len({float(x.sum()) for x in (guided, everywhere, plain)}) == 3


def test_the_grid_is_shifted_and_coarse(trained, module):
    module.net = Recorded(module.net)
    sampler_of(trained, module, "--steps", "4", "--shift", "0.5", "--coarse", "0.2")(range(2))
    s = 0.5
    v = np.linspace(0.2 / (s + (1 - s) * 0.2), 1, 4)
    expected = [0.0, *(s * v / (1 + (s - 1) * v))[:-1]]
    assert module.net.asked[True] == pytest.approx(expected, abs=1e-6)


def test_the_oracle_leads_to_copies(trained, tmp_path):
    arguments = ["--out", tmp_path / "o", "--oracle-until", 1, "--steps", 40, "--count", 28]
    arrays = made(trained, *arguments)
    data = instantiate(run_config(trained).data)
    data.setup()
    x1, labels = data.train.tensors
    rows = ((x1 + 1) * 127.5).round().permute(0, 2, 3, 1).numpy().astype(np.uint8)
    found = set()
    for picture, label in zip(arrays["arr_0"], arrays["arr_1"], strict=True):
        same = (rows == picture).all((1, 2, 3)).nonzero()[0]
        assert len(same) == 1
        assert labels[same[0]] == label
        found.add(int(same[0]))
    assert len(found) > 10


def test_the_oracle_leads_and_the_network_follows(trained, module):
    data = instantiate(run_config(trained).data)
    data.setup()
    module.net = Recorded(module.net)
    sampler = sampler_of(trained, module, "--steps", "5", "--oracle-until", "0.5")
    sampler.oracle = Oracle(LatentBank(*data.train.tensors))
    sampler(range(3))
    assert module.net.asked == {True: [0.5, 0.6, 0.8], False: []}


def test_measured_times_are_those_of_the_last_probe(probed, tmp_path, capsys):
    folder = probed(0.3, 0.4)
    flags = ["--oracle-until", "measured", "--coarse", "measured", "--cfg-scale", "2"]
    made(folder, *flags, "--cfg-interval", "measured", "--out", tmp_path / "out")
    settings = json.loads((tmp_path / "out/settings.json").read_text())
    assert (settings["oracle_until"], settings["coarse"]) == (0.3, 0.3)
    assert settings["cfg_interval"] == [0.4, 0.6]
    assert "Measured in this run, used for coarse: 0.3." in capsys.readouterr().out


def test_what_was_not_measured_is_said_before_anything_is_loaded(
    trained, probed, tmp_path, monkeypatch
):
    monkeypatch.setattr(command, "load_module", None)
    monkeypatch.setattr(command, "instantiate", None)
    for flags in (
        ["--oracle-until", "measured"],
        ["--coarse", "measured"],
        ["--cfg-scale", 2, "--cfg-interval", "measured"],
    ):
        with pytest.raises(ValueError, match=f"stage boundary in .* for {flags[-2]}, found none"):
            made(trained, *flags)
    folder = probed(None, 0.7)
    with pytest.raises(ValueError, match="No interval follows .*0.7.*before 0.5"):
        made(folder, "--cfg-scale", 2, "--cfg-interval", "measured")
    with pytest.raises(ValueError, match="midpoint between 0 and 1 for --coarse, got nan"):
        made(folder, "--coarse", "measured")


def test_guided_channels_are_those_of_the_recipe(trained, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    config = run_config(copy)
    config.evaluation.cfg_channels = 2
    OmegaConf.save(config, copy / "config.yaml")
    flags = {"own": [], "two": ["--cfg-channels", 2], "all": ["--cfg-channels", "all"]}
    found = {}
    for name, more in flags.items():
        found[name] = made(copy, "--cfg-scale", 8, "--out", tmp_path / name, *more)["arr_0"]
        said = "Guides the first 2 channels (evaluation.cfg_channels" in capsys.readouterr().out
        assert said == (name == "own")
    assert np.array_equal(found["own"], found["two"])
    assert (found["own"] != found["all"]).any()
    made(copy, "--out", tmp_path / "plain")  # no guidance, so nothing to say
    assert json.loads((tmp_path / "plain/settings.json").read_text())["cfg_channels"] is None


@pytest.mark.parametrize("method", ["euler", "sde-euler"])
def test_two_networks_in_one_trajectory(trained, module, tmp_path, method):
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    flags = ["--method", method, "--steps", 5, "--then", other, "--then-at", 0.5]
    whole = made(trained, *flags[:4], "--out", tmp_path / "whole")["arr_0"]
    # The same network twice: what changes is that 0.5 is among the times.
    again = made(trained, *flags, "--out", tmp_path / "again")["arr_0"]
    assert not np.array_equal(whole, again)
    settings = json.loads((tmp_path / "again/settings.json").read_text())
    assert settings["then_at"] == 0.5
    assert settings["then"] == settings["fingerprint"]
    sampler = sampler_of(trained, module, *map(str, flags))
    module.net = Recorded(module.net)
    sampler.then = load_module(run_config(other), find_checkpoint(other))[0]
    sampler.then.net = Recorded(sampler.then.net)
    x = sampler(range(3))
    grid = np.linspace(0, 1, 6) if method == "euler" else [*np.linspace(0, 0.96, 5), 1]
    early, late = ([t for t in grid[:-1] if (t < 0.5) == is_early] for is_early in (True, False))
    assert module.net.asked[True] == pytest.approx(early, abs=1e-6)
    assert sampler.then.net.asked[True] == pytest.approx([0.5, *late], abs=1e-6)
    assert torch.equal(sampler(range(3)), x)  # noise depends on seed, sample and step alone


def test_another_network_for_other_samples_is_refused(trained, module):
    config = run_config(trained)
    other, then = run_config(trained), copying.deepcopy(module)
    require_alike(config, module, other, then)
    then.net.input_shape = (3, 4, 4)
    with pytest.raises(
        ValueError, match=r"samples of shape \(3, 8, 8\) in the first run and \(3, 4"
    ):
        require_alike(config, module, other, then)
    then.net.input_shape = module.net.input_shape
    then.objective.path = CosinePath()
    with pytest.raises(ValueError, match=r"the path LinearPath\(\) .* CosinePath"):
        require_alike(config, module, other, then)
    then.objective.path = LinearPath()
    other.data.latents = {"multiplier": 0.18215}
    with pytest.raises(ValueError, match="latents scaled by .*0.18215.* in the second"):
        require_alike(config, module, other, then)


# -- latents ----------------------------------------------------------------------------------


class Latents:
    """Data that are latents, as far as sampling asks: stored as 2 x + 1."""

    shape, num_classes = (3, 8, 8), 7

    def to_stored(self, x):
        return 2 * x + 1


@pytest.fixture
def latents(monkeypatch):
    """The run's data are latents."""
    monkeypatch.setattr(command, "instantiate", lambda _: Latents())


@pytest.fixture
def vae(monkeypatch):
    """An autoencoder whose pictures are the latents twice as large; what it was asked for."""
    asked = {}

    def decode(vae, z, batch, low=-1.0):
        asked.setdefault("z", []).append(z)
        asked["batch"] = batch
        x = z.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return (x * 20 + 100).clamp(0, 255).to(torch.uint8)

    def load_vae(name, device, dtype=torch.float32):
        asked["loaded"] = (name, str(device), dtype)

    stand_in = types.ModuleType("stagewise.recipes.autoencoder")
    stand_in.decode, stand_in.load_vae = decode, load_vae
    channels = {"wide": 4}
    stand_in.find_vae = lambda name: types.SimpleNamespace(channels=channels.get(name, 3))
    monkeypatch.setitem(sys.modules, "stagewise.recipes.autoencoder", stand_in)
    return asked


def test_latents_are_stored_as_training_has_them(trained, module, tmp_path, latents, capsys):
    arrays = made(trained, "--out", tmp_path)
    assert arrays["arr_0"].dtype == np.float32
    expected = sampler_of(trained, module)(range(5))
    assert torch.equal(torch.from_numpy(arrays["arr_0"][:5]), expected)
    assert arrays["arr_1"].dtype == np.int64
    said = capsys.readouterr().out
    assert "an evaluation suite needs pictures. Decode them with --vae." in said
    assert "grid_latent_channels.png shows the first 12 samples as latents" in said
    grid = np.asarray(Image.open(tmp_path / "grid_latent_channels.png"))
    inside = grid[1:9, 1:9].astype(float) / 255
    x = arrays["arr_0"]
    low, high = x.min((0, 2, 3)), x.max((0, 2, 3))
    shown = (x[0] - low[:, None, None]) / (high - low)[:, None, None]
    assert np.abs(inside - shown.transpose(1, 2, 0)).max() < 0.51 / 255
    assert (tmp_path / "latents.npz").exists()


def test_latents_are_decoded_as_they_were_stored(trained, module, tmp_path, latents, vae, capsys):
    arrays = made(trained, "--out", tmp_path, "--vae", "some/vae")
    assert arrays["arr_0"].shape == (12, 16, 16, 3)
    assert arrays["arr_0"].dtype == np.uint8
    assert vae["loaded"] == ("some/vae", "cpu", torch.float32)
    assert vae["batch"] == 5
    assert [len(z) for z in vae["z"]] == [5, 5, 2]
    x = sampler_of(trained, module)(range(5))
    torch.testing.assert_close(vae["z"][0], 2 * x + 1)
    expected = ((2 * x + 1) * 20 + 100).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert np.array_equal(arrays["arr_0"][:5, ::2, ::2], expected.numpy())
    assert "--vae" not in capsys.readouterr().out


def test_an_autoencoder_of_other_latents_is_refused(trained, tmp_path, latents, vae):
    with pytest.raises(ValueError, match="--vae with 3 channels, .* got 4 in wide"):
        made(trained, "--out", tmp_path, "--vae", "wide")
    assert not list((tmp_path / "parts").iterdir())


def test_photos_need_no_autoencoder(trained, tmp_path):
    with pytest.raises(ValueError, match="Expected no --vae, got some/vae"):
        made(trained, "--out", tmp_path / "o", "--vae", "some/vae")
    assert not (tmp_path / "o").exists()


# -- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--count 0", "--count of at least 1, got 0"),
        ("--batch-size 0", "--batch-size of at least 1"),
        ("--steps 0", "--steps of at least 1"),
        ("--seed -1", "--seed of at least 0"),
        ("--grid -1", "--grid of at least 0"),
        ("--shift 0", "--shift above 0"),
        ("--shift nan", "--shift above 0"),
        ("--timeout 0", "--timeout above 0"),
        ("--cfg-scale inf", "finite --cfg-scale"),
        ("--cfg-interval 0.1 0.6", "--cfg-scale other than 1 with --cfg-interval"),
        ("--cfg-interval measured", "--cfg-scale other than 1 with --cfg-interval"),
        ("--cfg-channels 2", "--cfg-scale other than 1 with --cfg-channels"),
        ("--method sde-euler --diffusion-norm -1", "--diffusion-norm above 0"),
        ("--method dopri5 --rtol 0", "--rtol above 0, got 0"),
        ("--rtol 1e-3", "no --rtol with --method euler; the solvers with it are dopri5"),
        ("--last-step mean", "no --last-step with --method euler; .* are sde-euler, sde-heun"),
        ("--method sde-euler --coarse 0.5", "no --coarse with --method sde-euler"),
        ("--method sde-heun --oracle-until 0.5", "no --oracle-until with --method sde-heun"),
        ("--method sde-euler --steps 1", "`steps` of at least 2"),
        ("--method sde-euler --last-step-size 1", "`last_size` between 0 and 1"),
        ("--method sde-heun --last-step none", "score at t = 1"),
        ("--then other", "--then RUN and --then-at T together"),
        ("--then-at 0.5", "--then RUN and --then-at T together"),
        ("--then other --then-at 1", "--then-at between 0 and 1"),
        ("--then other --then-at 0.5 --oracle-until 0.1", "--then or --oracle-until, got both"),
        ("--then other --then-at 0.98 --method sde-euler", "last step, which begins at 0.96"),
        ("--then other --then-at 0.5", "no folder other"),
        ("--cfg-scale 2 --cfg-channels 4", "--cfg-channels of at most 3"),
        ("--cfg-scale 2 --cfg-interval 0.6 0.1", "0 <= LOW < HIGH <= 1, got 0.6 and 0.1"),
        ("--cfg-scale 2 --cfg-interval 0.6", "LOW HIGH or measured, got 0.6"),
        ("--cfg-scale 2 --cfg-interval a b", "LOW HIGH or measured, got a b"),
        ("--oracle-until 1.5", "--oracle-until from 0 to 1, got 1.5"),
        ("--oracle-until 1 --method heun2", "euler or midpoint with --oracle-until 1.0, got heun2"),
        ("--coarse 1", "--coarse between 0 and 1"),
        ("--coarse 0.5 --steps 1", "at least 2 with `coarse`"),
        ("--method dopri5", "no --steps with --method dopri5"),
        ("--labels 0,7", r"--labels from 0 to 6, got \[7\]"),
        ("--labels a", "all, or numbers such as 0,3,7, got 'a'"),
        ("--device nothing", "Expected --device cpu, cuda"),
        ("--device cuda:99", "CUDA device"),
        ("--checkpoint none.ckpt", "no checkpoint none.ckpt"),
    ],
)
def test_bad_arguments(trained, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        made(trained, "--out", tmp_path / "out", *flags.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--shift 0.5", "--coarse 0.5", "--coarse measured"])
def test_solvers_that_choose_their_steps_are_given_none(trained, flag):
    with pytest.raises(ValueError, match=f"no {flag.split()[0]} with --method dopri5"):
        parse([str(trained), "--method", "dopri5", *flag.split()])


def test_guidance_needs_what_it_compares_with(trained, monkeypatch, tmp_path):
    config = run_config(trained)
    config.net.class_dropout = 0.0
    monkeypatch.setattr(command, "run_config", lambda *_: config)
    with pytest.raises(ValueError, match="class_dropout = 0"):
        made(trained, "--out", tmp_path / "o", "--cfg-scale", 2)
    data = types.SimpleNamespace(shape=(3, 8, 8), num_classes=0)
    monkeypatch.setattr(command, "instantiate", lambda _: data)
    with pytest.raises(ValueError, match="no classes to guide"):
        made(trained, "--out", tmp_path / "o", "--cfg-scale", 2)
    with pytest.raises(ValueError, match="--labels none: the run has no classes"):
        made(trained, "--out", tmp_path / "o", "--labels", "0")
    arrays = made(trained, "--out", tmp_path / "o")
    assert list(arrays) == ["arr_0"]


def test_a_class_without_rows_is_refused(trained, module):
    sampler = sampler_of(trained, module, "--oracle-until", "0.5")
    rows = torch.utils.data.TensorDataset(torch.randn(6, 3, 8, 8), torch.arange(6))
    data = types.SimpleNamespace(setup=lambda: None, train=rows)
    with pytest.raises(ValueError, match=r"classes with training rows .* got \[6\]"):
        command.bank_of(data, sampler.options, sampler)
    bank = LatentBank(*rows.tensors)
    latents = types.SimpleNamespace(setup=lambda: None, latent_bank=lambda: bank)
    sampler.options = dataclasses.replace(sampler.options, labels=(1, 2))
    assert command.bank_of(latents, sampler.options, sampler) is bank


def test_a_network_that_cannot_begin_with_the_oracle(trained, module):
    module.objective.prediction = type(module.objective.prediction).of("noise")
    with pytest.raises(ValueError, match="--oracle-until of at least 0.02, where .* the noise"):
        sampler_of(trained, module, "--oracle-until", "0.01")
    sampler = sampler_of(trained, module, "--oracle-until", "0.02")
    assert (sampler.start, sampler.end) == (0.0, 0.999)
    assert sampler_of(trained, module).start == 0.02
    assert sampler_of(trained, module, "--oracle-until", "1").end == 1.0


def test_samples_that_are_not_finite_are_not_written(trained, monkeypatch, tmp_path):
    def broken(config, path, weights):
        module, loaded = load_module(config, path, weights)
        module.net.final_layer.linear.bias.data[0] = torch.nan
        return module, loaded

    monkeypatch.setattr(command, "load_module", broken)
    with pytest.raises(ValueError, match="5 of the samples 0 to 4 are not finite"):
        made(trained, "--out", tmp_path)
    assert not list((tmp_path / "parts").iterdir())


def test_the_command_says_what_is_wrong(trained, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["stagewise sample", str(trained / "none")])
    with pytest.raises(SystemExit, match=r"^stagewise sample: There is no folder .*none"):
        command.main()
    monkeypatch.setattr(sys, "argv", ["stagewise sample", str(trained), "--coarse", "soon"])
    with pytest.raises(SystemExit):
        command.main()
    assert "expected a time in t or measured, got 'soon'" in capsys.readouterr().err
