"""The ImageNet recipes on made latents: trained, killed, resumed, on one process and on two."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

import stagewise.recipes.conf
from stagewise.latents import make_latents, open_latents
from stagewise.recipes import resume, sample
from stagewise.recipes.latents import LatentsData
from stagewise.recipes.module import FlowMatchingModule
from stagewise.recipes.train import train

FOLDER = Path(stagewise.recipes.conf.__file__).parent
EXPERIMENTS = sorted(file.stem for file in (FOLDER / "experiment").glob("imagenet*.yaml"))

SMALL_NET = ["net.hidden_size=32", "net.depth=1", "net.num_heads=2"]
SMALL = [
    "data.num_classes=10",
    "data.held_out=40",
    "data.batch_size=4",
    "data.num_workers=0",
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.enable_progress_bar=false",
    "~callbacks.progress",
    "trainer.log_every_n_steps=1",
    "evaluation.queries=16",
    "evaluation.samples_per_class=1",
    "evaluation.steps=1",
]
WATCHED = [
    *(f"+callbacks.{part}.figures=0" for part in ("monitor", "errors", "memorization")),
    *("callbacks.monitor.strata=4", "callbacks.errors.strata=4"),
    "callbacks.monitor.queries=4",
    "callbacks.errors.queries=2",
    "callbacks.memorization.samples=2",
    "callbacks.memorization.steps=2",
    "callbacks.memorization.t_switch=[0.0,0.1]",
    "callbacks.memorization.t_resume=[0.5]",
]


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return make_latents(tmp_path_factory.mktemp("latents") / "made", 400, (4, 32, 32), 10)


def composed(*overrides):
    with initialize_config_module("stagewise.recipes.conf", version_base="1.3"):
        return compose("train", list(overrides))


def configuration(latents, run_dir, *overrides, experiment="imagenet256_sdvae_sit_s"):
    places = [
        f"experiment={experiment}",
        "name=test",
        f"run_dir={run_dir}",
        f"data.latents.path={latents}",
    ]
    return composed(*places, *SMALL, *SMALL_NET, *overrides)


# -- configurations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experiment", "callbacks"),
    # All of them are composed and counted in test_bench_recipes.py.
    [(EXPERIMENTS[0], "steer"), (EXPERIMENTS[-1], "steer")]
    + [("imagenet256_sdvae_sit_s", name) for name in ("plain", "watch", "steer_only")],
)
def test_every_recipe_is_instantiated(tmp_path, latents, experiment, callbacks):
    config = composed(
        f"experiment={experiment}",
        "name=test",
        f"run_dir={tmp_path}",
        f"data.latents.path={latents}",
        f"callbacks={callbacks}",
    )
    with torch.device("meta"):
        net = instantiate(config.net)
        module = instantiate(config.module, net=net, objective=instantiate(config.objective))
    assert all(weight.device.type == "meta" for weight in module.parameters())
    data = instantiate(config.data)
    assert data.num_classes == net.num_classes == 1000
    assert net.input_shape == ((4, 32, 32) if "sdvae" in experiment else (32, 16, 16))
    made = {
        name: instantiate(part) for name, part in config.callbacks.items() if "_target_" in part
    }
    assert ("steer" in made) == callbacks.startswith("steer")
    assert ("monitor" in made) == (callbacks in ("watch", "steer"))
    assert (
        made["checkpoint"]._every_n_train_steps == config.callbacks.checkpoint.every_n_train_steps
    )
    x = torch.zeros(2, *net.input_shape, device="meta")
    assert (
        net(x, torch.zeros(2, device="meta"), torch.zeros(2, device="meta").long()).shape == x.shape
    )


CHOICES = {
    group: sorted(file.stem for file in (FOLDER / group).glob("*.yaml"))
    for group in ("engine", "scheme", "ema", "precision", "strategy", "compile", "logger")
}


@pytest.mark.parametrize("turn", range(max(map(len, CHOICES.values()))))
def test_every_choice_composes(tmp_path, turn):
    """One of each group at a time, until all were chosen."""
    chosen = {group: names[turn % len(names)] for group, names in CHOICES.items()}
    choices = [f"{group}={choice}" for group, choice in chosen.items()]
    config = composed(*choices, "callbacks=steer_only", "name=x", f"run_dir={tmp_path}")
    config = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    for part in config.callbacks.values():
        instantiate(part)
    steered = instantiate(config.callbacks.steer)
    assert (steered._parts == {}) == (chosen["scheme"] in ("plain", "phases", "two_stage"))
    assert config.trainer.precision
    assert config.trainer.strategy


def test_latents_have_to_be_named(tmp_path):
    config = composed("experiment=imagenet256_sdvae_sit_s", "name=x", f"run_dir={tmp_path}")
    with pytest.raises(ValueError, match=r"Expected data\.latents\.path="):
        train(config)


def test_a_wrong_choice_is_refused(tmp_path):
    with pytest.raises(HydraException, match="mixx"):
        composed("scheme=mixx")


PUBLISHED = Path("docs/imagenet.md").read_text() if Path("docs/imagenet.md").exists() else ""


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_plain_is_the_published_training(tmp_path, experiment):
    """The tables of docs/imagenet.md, read from the resolved configuration."""
    table = PUBLISHED.partition(
        "| LightningDiT | public" if "vavae" in experiment else "| SiT | public"
    )
    rows = table[2].partition("\n\n")[0].splitlines()[2:]
    said = [one for row in rows for one in re.findall(r"`([\w.]+)=(\S+?)`", row)]
    assert len(said) >= len(rows) >= 12
    places = [f"experiment={experiment}", "name=x", f"run_dir={tmp_path}", "data.latents.path=x"]
    config = composed(*places, "callbacks=plain")
    for key, value in said:
        found = OmegaConf.select(config, key, throw_on_missing=True)
        assert found == OmegaConf.create(f"x: {value}").x, key


@pytest.mark.usefixtures("unevaluated")
def test_the_average_begins_at_the_initial_weights(tmp_path, latents):
    steps = ["callbacks=plain", "logger=csv", "trainer.max_steps=1", "module.lr=0.1"]
    config = configuration(latents, tmp_path, *steps)
    train(config)
    last = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    for name, after in last["current_model_state"].items():
        if "final_layer.linear.weight" in name:  # zero at first
            torch.testing.assert_close(last["state_dict"][name], after * 1e-4)
            assert after.abs().max() > 0


# -- training -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_three_steps_with_all_callbacks_then_two_more(tmp_path, latents, capsys, request):
    all_of_them = ["callbacks=steer", *WATCHED]
    steps = ["trainer.max_steps=3", "callbacks.checkpoint.every_n_train_steps=1"]
    results = train(configuration(latents, tmp_path, *all_of_them, *steps))
    assert np.isfinite(results["train_loss"])
    assert np.isfinite(results["held_out_loss"])
    assert results["stages"][-1]["stage"] == "all t"
    assert np.asarray(Image.open(tmp_path / "samples.png")).std() > 5
    for part in ("stages", "errors", "memorization", "scheme", "transitions"):
        assert (tmp_path / part / "stages.jsonl").exists(), part
    assert f"stagewise sample {tmp_path}" in capsys.readouterr().out
    last = tmp_path / "checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 3

    more = configuration(latents, tmp_path, *all_of_them, "trainer.max_steps=5")
    with pytest.raises(FileExistsError, match="holds a run. Continue it with resume=true"):
        train(more)
    assert torch.load(last, weights_only=True)["global_step"] == 3
    more.resume = True
    changed = OmegaConf.merge(more, {"data": {"held_out": 20}, "module": {"lr": 1.0}})
    with pytest.raises(ValueError, match=r"lr=1.0 \(was 0.0001\), data.held_out=20 \(was 40\)"):
        train(changed)
    request.getfixturevalue("quick_figures")
    train(more)
    assert torch.load(last, weights_only=True)["global_step"] == 5


@pytest.mark.parametrize(
    "format",
    # The other tests train on LightningDiT's; all are read in those of `LatentsData`.
    [
        "repa",
        "plain",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("fast-dit", "edm2", "mar")),
    ],
)
def test_every_format_is_trained_on(tmp_path, format):
    name = "made.safetensors" if format == "plain" else "made"
    path = make_latents(tmp_path / name, 60, (4, 32, 32), 10, format)
    results = train(
        configuration(
            path,
            tmp_path / "run",
            "callbacks=steer_only",
            "ema=none",
            "logger=csv",
            "trainer.max_steps=2",
            "data.held_out=8",
            "data.latents.flips=none",
            f"data.latents.autoencoder={'null' if format in ('edm2', 'mar') else 'sd-vae'}",
            f"data.latents.format={format if format in ('repa', 'edm2') else 'null'}",
            "scheme.boundary=0.1",
        )
    )
    assert np.isfinite(results["train_loss"])


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["data.num_classes=7"], ValueError, r"labels in 0 to 6, got 7|num_classes"),
        (["net.num_classes=5"], ValueError, "as many classes in the network as in the data, got 5"),
        (["net.in_channels=3"], ValueError, r"shape \(3, 32, 32\).*got \(4, 32, 32\)"),
        (["data.held_out=400"], ValueError, "fewer held-out rows than the 400"),
        (["data.batch_size=999"], ValueError, "at least one batch of training samples"),
        (["resume=true", "ckpt_path=x.ckpt"], ValueError, "`resume` or `ckpt_path`"),
        (["ckpt_path=nothing.ckpt"], FileNotFoundError, "no checkpoint nothing.ckpt"),
        (["weights=nothing.pt"], FileNotFoundError, "no file of weights nothing.pt"),
        (
            ["data.latents.normalize=false", "data.latents.multiplier=7"],
            ValueError,
            "got both. Leave the first out: autoencoder=None",
        ),
        (
            [
                "data.latents.autoencoder=null",
                "data.latents.normalize=false",
                "data.latents.multiplier=7",
            ],
            ValueError,
            "standard deviation about 1",
        ),
        (["engine=sharded", "callbacks=steer"], Exception, "Sharded"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(
    tmp_path, latents, overrides, error, message
):
    with pytest.raises(error, match=message):
        train(configuration(latents, tmp_path, "callbacks=plain", *overrides))
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.usefixtures("unevaluated")
def test_a_checkpoint_of_another_model_is_refused(tmp_path, latents):
    steps = ["trainer.max_steps=1", "callbacks=plain", "logger=csv"]
    train(configuration(latents, tmp_path / "one", *steps))
    last = tmp_path / "one/checkpoints/last.ckpt"
    other = configuration(latents, tmp_path / "two", *steps, f"ckpt_path={last}", "net.depth=2")
    with pytest.raises(ValueError, match=r"another model(?s:.*)net\.blocks\.1"):
        train(other)
    begun = configuration(latents, tmp_path / "three", *steps, f"weights={last}")
    train(begun)
    # It begins at step 0, with those weights and a rate of its own.
    after = torch.load(tmp_path / "three/checkpoints/last.ckpt", weights_only=True)
    assert after["global_step"] == 1
    assert (tmp_path / "three/config.yaml").exists()


@pytest.mark.parametrize(
    ("channels", "right", "wrong", "cure"),
    [
        (4, {"autoencoder": "sd-vae"}, {}, "Use data.latents.autoencoder=sd-vae"),
        (32, {}, {"autoencoder": "sd-vae"}, "Use data.latents.autoencoder=null"),
    ],
)
def test_public_weights_want_the_scale_they_were_trained_at(
    tmp_path, monkeypatch, channels, right, wrong, cure
):
    path = make_latents(tmp_path / "made", 300, (channels, 8, 8), 10)
    (tmp_path / "public.pt").touch()
    monkeypatch.setattr(resume, "load_public_weights", lambda *_: None)
    module = SimpleNamespace(net=None)
    data = [LatentsData(open_latents(path, **options), 10) for options in (right, wrong)]
    resume.begin_with(module, tmp_path / "public.pt", data[0])
    with pytest.raises(ValueError, match=cure):
        resume.begin_with(module, tmp_path / "public.pt", data[1])


@pytest.mark.usefixtures("unevaluated")
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, latents, monkeypatch):
    steps = ["callbacks=plain", "callbacks.checkpoint.every_n_train_steps=1", "logger=csv"]
    train(configuration(latents, tmp_path, *steps, "trainer.max_steps=1"))
    last = tmp_path / "checkpoints/last.ckpt"
    before = last.read_bytes()
    save = torch.save

    def full(value, file, *rest):
        save(value, file, *rest)
        with open(file, "r+b") as half:
            half.truncate(1000)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    more = configuration(latents, tmp_path, *steps, "trainer.max_steps=2", "resume=true")
    with pytest.raises(OSError, match=r"step=2\.ckpt could not be written"):
        train(more)
    assert last.read_bytes() == before
    assert not list(tmp_path.rglob("*.partial"))


# -- killed ---------------------------------------------------------------------------------------


def _trained_until(step, config):
    def kill(module, optimizer):
        if module.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    FlowMatchingModule.on_before_optimizer_step = kill  # in a process of its own
    train(config)


def _killed_and_resumed(forked, tmp_path, latents, net, steps, killed_at, every):
    options = [
        *("experiment=imagenet256_sdvae_sit_s", f"data.latents.path={latents}", "name=test"),
        *("callbacks=steer", *SMALL, *WATCHED, *net, f"trainer.max_steps={steps}"),
        *("data.num_workers=1", f"callbacks.checkpoint.every_n_train_steps={every}"),
    ]

    def run(name, *more, until=None):
        config = composed(*options, f"run_dir={tmp_path / name}", *more)
        process = forked(_trained_until, until, config)
        process.join()
        return process.exitcode

    assert run("whole") == 0
    assert run("cut", until=killed_at) == -signal.SIGKILL
    last = tmp_path / "cut/checkpoints/last.ckpt"
    step = torch.load(last, weights_only=True)["global_step"]
    assert 0 < step <= killed_at
    assert killed_at - step < every
    assert run("cut", "resume=true") == 0
    one, other = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)
        for name in ("whole", "cut")
    )
    assert one["global_step"] == other["global_step"] == steps
    for weights in ("state_dict", "current_model_state"):
        for name, value in one[weights].items():
            assert torch.equal(value, other[weights][name]), name
    moments = [run["optimizer_states"][0]["state"] for run in (one, other)]
    for key, state in moments[0].items():
        assert torch.equal(state["exp_avg_sq"], moments[1][key]["exp_avg_sq"])
    probes = [
        [
            {k: v for k, v in json.loads(line).items() if "second" not in k and "share" not in k}
            for line in (tmp_path / name / part / "stages.jsonl").open()
        ]
        for part in ("stages", "errors", "scheme")
        for name in ("whole", "cut")
    ]
    for first, second in zip(probes[::2], probes[1::2], strict=True):
        assert first == second


@pytest.mark.slow
@pytest.mark.usefixtures("unevaluated")
def test_killed_in_the_middle_of_an_epoch_and_resumed(tmp_path, latents, forked):
    # 15 batches an epoch: the run is in its second one, and in workers, when it is killed.
    few = [*SMALL_NET, "data.held_out=340"]
    _killed_and_resumed(forked, tmp_path, latents, few, 26, 23, 4)


@pytest.mark.slow
@pytest.mark.usefixtures("unevaluated")
def test_blocks_of_sit_s_are_killed_resumed_and_sampled(tmp_path, forked):
    # All its widths; the next block is like the one before. `make demo-latents` trains all twelve.
    latents = make_latents(tmp_path / "made", 400, (4, 32, 32), 10)
    _killed_and_resumed(forked, tmp_path, latents, ["net.depth=2"], 3, 2, 1)
    places = [str(tmp_path / "cut"), "--out", str(tmp_path / "samples")]
    sample.run(sample.parse([*places, "--count", "20", "--steps", "2"]))
    with np.load(tmp_path / "samples/latents.npz", allow_pickle=False) as made:
        assert made["arr_0"].shape == (20, 4, 32, 32)
        assert np.isfinite(made["arr_0"]).all()
        assert set(made["arr_1"].tolist()) == set(range(10))
    assert list((tmp_path / "samples").glob("*.png"))


# -- two processes --------------------------------------------------------------------------------

TWO_RANKS = """
import os
import sys

import torch
from hydra import compose, initialize_config_module

from stagewise.recipes.train import train

folder, ranks = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
with initialize_config_module("stagewise.recipes.conf", version_base="1.3"):
    config = compose("train", OVERRIDES + [
        f"run_dir={folder}/run", f"data.batch_size={8 // ranks}", f"trainer.devices={ranks}",
        # One process is not made a group, which would outlive its training.
        "strategy=" + ("ddp" if ranks > 1 else "auto"),
    ])
train(config)
"""


@pytest.mark.slow
def test_two_ranks_with_a_sharded_bank_train_as_one(latents, on_one_and_two_ranks):
    overrides = [
        *("experiment=imagenet256_sdvae_sit_s", "name=x", f"data.latents.path={latents}", *SMALL),
        *(*SMALL_NET, "net.class_dropout=0.0", "module.lr=1e-3", "logger=csv"),
        *("callbacks=steer_only", "engine=sharded", "scheme.boundary=0.3"),
        "trainer.max_steps=6",
    ]
    folders = on_one_and_two_ranks(TWO_RANKS.replace("OVERRIDES", repr(overrides)))
    losses, weights = [], []
    for folder in folders:
        rows = (folder / "run/csv/version_0/metrics.csv").read_text().splitlines()
        columns = rows[0].split(",")
        found = [dict(zip(columns, row.split(","), strict=True)) for row in rows[1:]]
        losses.append([float(row["train/loss"]) for row in found if row.get("train/loss")])
        state = torch.load(folder / "run/checkpoints/last.ckpt", weights_only=True)
        weights.append(state["current_model_state"])
    assert len(losses[0]) == len(losses[1]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] != pytest.approx(losses[0][1], rel=1e-3)
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=0, atol=2e-5)


# -- options --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unevaluated")
def test_an_average_that_has_not_begun_is_not_taken(tmp_path, latents):
    # `ema=short` begins at step 100: until then the average is the untrained network.
    options = ["ema=short", "callbacks=plain", "logger=csv", "trainer.max_steps=3", "module.lr=0.1"]
    train(configuration(latents, tmp_path, *options, "trainer.val_check_interval=2"))
    last = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert int(last["averaging_state"]["n_averaged"]) == 0
    moved = [
        not torch.equal(value, last["state_dict"][name])
        for name, value in last["current_model_state"].items()
        if value.is_floating_point()
    ]
    assert any(moved)
    rows = list(csv.DictReader((tmp_path / "csv/version_0/metrics.csv").open()))
    losses = [float(row["val/loss"]) for row in rows if row["val/loss"]]
    # The untrained network answers 0 and has a loss of 2.
    assert losses
    assert all(abs(loss - 2) > 0.05 for loss in losses)


@pytest.mark.usefixtures("unevaluated")
def test_the_last_step_is_kept(tmp_path, latents):
    options = ["callbacks=plain", "callbacks.checkpoint.every_n_train_steps=2", "logger=csv"]
    train(configuration(latents, tmp_path, *options, "trainer.max_steps=3"))
    last = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 3
    # The averaged weights are no others' in it.
    assert not all(
        torch.equal(value, last["state_dict"][name])
        for name, value in last["current_model_state"].items()
    )


def test_shards_and_their_engine_go_together(tmp_path, latents):
    for choice in (["data.sharded=true"], ["engine=sharded", "data.sharded=false"]):
        config = configuration(latents, tmp_path, "callbacks=steer_only", *choice)
        with pytest.raises(ValueError, match="engine=sharded, which sets both"):
            train(config)


@pytest.mark.slow
def test_compiled_blocks_are_watched_and_averaged(tmp_path, latents):
    options = ["compile=inductor", "callbacks=steer", *WATCHED, "trainer.max_steps=3"]
    results = train(configuration(latents, tmp_path, *options))
    assert np.isfinite(results["train_loss"])
    plain = configuration(latents, tmp_path / "plain", *options, "compile=eager")
    assert train(plain)["train_loss"] == pytest.approx(results["train_loss"], rel=1e-3)
    keys = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["state_dict"].keys()
    assert not [key for key in keys if "_orig_mod" in key]


@pytest.mark.slow
def test_the_command_starts_the_processes_of_several_devices(tmp_path, latents):
    command = Path(sys.executable).with_name("stagewise")
    options = [*SMALL, *SMALL_NET, "callbacks=steer", *WATCHED, "trainer.max_steps=2"]
    places = [f"data.latents.path={latents}", f"run_dir={tmp_path / 'run'}", "logger=csv"]
    done = subprocess.run(
        [
            *(command, "train", "experiment=imagenet256_sdvae_sit_s", *places, *options),
            *("strategy=ddp", "trainer.devices=2", f"data.bank_dir={tmp_path / 'bank'}"),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MEMBER: 2/2" in done.stderr
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    assert len(list((tmp_path / "bank").iterdir())) == 1


@pytest.mark.parametrize("channels", [1, 2])
def test_latents_of_few_channels_have_their_picture(tmp_path, channels):
    path = make_latents(tmp_path / "made", 60, (channels, 32, 32), 10)
    options = ["callbacks=plain", "ema=none", "logger=csv", "trainer.max_steps=1"]
    sizes = [f"net.in_channels={channels}", "data.held_out=8"]
    train(configuration(path, tmp_path / "run", *options, *sizes))
    assert np.asarray(Image.open(tmp_path / "run/samples.png")).std() > 5
