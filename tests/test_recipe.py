"""The photos recipe, composed as the command composes it and trained for a few steps."""

import json

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from hydra.utils import instantiate
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from stagewise.latents import make_latents
from stagewise.recipes import evaluate
from stagewise.recipes.conclusion import conclusion
from stagewise.recipes.evaluate import loss_by_time
from stagewise.recipes.train import train

SMALL = [
    "experiment=photos",
    "name=test",
    "data.train_size=280",
    "data.held_out_size=70",
    "data.batch_size=32",
    "net.hidden_size=32",
    "net.depth=1",
    "trainer.max_steps=6",
    "trainer.val_check_interval=3",
    "trainer.log_every_n_steps=2",
    "trainer.enable_progress_bar=false",
    "~callbacks.progress",
    "callbacks.monitor.every_n_steps=3",
    "callbacks.monitor.queries=8",
    "callbacks.ema.update_starting_at_step=0",
    "evaluation.queries=128",
    "evaluation.samples_per_class=2",
    "evaluation.steps=2",
]


def configuration(run_dir, *overrides):
    with initialize_config_module("stagewise.recipes.conf", version_base="1.3"):
        return compose("train", [*SMALL, f"run_dir={run_dir}", *overrides])


@pytest.mark.slow
def test_recipe_trains_reports_and_writes(tmp_path, capsys):
    # Drawn in test_monitors_together.py and test_imagenet_recipe.py.
    less = ["+callbacks.errors.figures=0", "+callbacks.memorization.figures=0"]
    less += ["callbacks.errors.queries=8", "callbacks.memorization.samples=8"]
    results = train(configuration(tmp_path, *less, "callbacks.memorization.steps=4"))
    out = capsys.readouterr().out
    for text in ("predicted from spectrum", "midpoint", "collapsed", "held out", "floor"):
        assert text in out
    assert str(tmp_path) in out
    assert out.rstrip().endswith(conclusion(results["stages"]))
    assert results["stages"][-1]["stage"] == "all t"
    assert 0.5 < results["train_loss"] < 3
    for name in ("loss_by_t", "samples", "stages/concentration", "stages/heatmap"):
        picture = np.asarray(Image.open(tmp_path / f"{name}.png"))
        assert picture.std() > 5, name
        assert min(picture.shape[:2]) > 300, name
    lines = [json.loads(line) for line in (tmp_path / "stages/stages.jsonl").open()]
    assert [line.get("step") for line in lines] == [None, 0, 3]
    assert lines[0]["rows"] == 280
    assert lines[0]["class_wise"]
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "val/loss", "stagewise/midpoint"} <= set(tags["scalars"])
    (loss,) = events.Scalars("evaluation/held_out_loss")
    assert (loss.step, loss.value) == (6, pytest.approx(results["held_out_loss"], rel=1e-6))
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    told = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert told["net/depth"].number_value == 1
    assert told["net/_target_"].string_value == "SiT"
    assert told["trainer/max_steps"].number_value == 6
    assert not any("callbacks" in key or "run_dir" in key for key in told)
    assert {"evaluation/samples", "evaluation/loss_by_t"} <= set(tags["images"])
    assert (tmp_path / "checkpoints/last.ckpt").exists()
    assert (tmp_path / "config.yaml").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("quick_figures")
def test_the_recipe_is_steered(tmp_path):
    train(configuration(tmp_path, "callbacks=steer"))
    (header,) = [json.loads(line) for line in (tmp_path / "scheme/stages.jsonl").open()]
    assert header["maker"].startswith("module.objective")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "stages/stages.jsonl").open()]
    # The boundary is the monitor's first; TensorBoard keeps float32.
    boundary = [event.value for event in events.Scalars("stagewise_scheme/boundary")]
    assert boundary == pytest.approx(3 * [lines[1]["midpoint"]], rel=1e-6)
    share = [event.value for event in events.Scalars("stagewise_scheme/lambda")]
    assert share == [event.value for event in events.Scalars("stagewise_scheme/navigation_share")]
    assert 0 < min(share) <= max(share) < 1


@pytest.mark.slow
@pytest.mark.usefixtures("quick_figures")
@pytest.mark.parametrize("kind", ["data", "noise"])
def test_other_predictions_have_their_floor_and_samples(tmp_path, kind, monkeypatch):
    drawn = []
    grid = evaluate.sample_grid
    monkeypatch.setattr(evaluate, "sample_grid", lambda *a: drawn.append(a[1]) or grid(*a))
    more = ["trainer.max_steps=60", "trainer.val_check_interval=60", "module.lr=3e-3"]
    more += ["~callbacks.errors", "~callbacks.memorization", "~callbacks.transitions"]
    results = train(configuration(tmp_path, f"objective.prediction={kind}", *more))
    assert drawn[0].isfinite().all()
    stage = results["stages"][0]
    # The floor is a part of the loss: a floor in units of the velocity would be above it.
    assert 0 < stage["floor"] < stage["train"] < 1.5


def test_recipe_without_monitor_ema_and_logger(tmp_path, capsys):
    off = ["~callbacks.monitor", "~callbacks.ema", "~logger"]
    off += ["~callbacks.errors", "~callbacks.memorization", "~callbacks.transitions"]
    results = train(configuration(tmp_path, *off))
    assert results["stages"] == []
    assert (tmp_path / "loss_by_t.png").exists()
    assert "stage boundary" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("quick_figures")
def test_finished_or_killed_in_its_evaluation_it_is_evaluated_again(
    tmp_path, monkeypatch, capsys, lightning_log
):
    few = ["~callbacks.errors", "~callbacks.memorization", "~callbacks.transitions"]
    few += ["callbacks.monitor.every_n_steps=5", "callbacks.ema.decay=0.5"]

    def boundary():
        out = capsys.readouterr().out
        assert "gap, 2 standard errors" in out
        return out[out.index("stage boundary") : out.index("loss by stage")]

    whole = train(configuration(tmp_path / "whole", *few))
    said = boundary()

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("stagewise.recipes.train.evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            train(configuration(tmp_path / "cut", *few))
    assert not (tmp_path / "cut/samples.png").exists()
    before = (tmp_path / "cut/stages/stages.jsonl").read_text()
    for run in ("cut", "whole"):
        lightning_log.clear()
        again = train(configuration(tmp_path / run, *few, "resume=true"))
        assert again["stages"] == whole["stages"], "with the averaged weights"
        assert again["train_loss"] == whole["train_loss"]
        assert boundary() == said
        assert "last.ckpt is at step 6, the end of this training" in lightning_log.text
        assert (tmp_path / run / "samples.png").exists()
        assert "raise the limit, such as trainer.max_steps=12." in lightning_log.text
    assert (tmp_path / "cut/stages/stages.jsonl").read_text() == before


@pytest.mark.usefixtures("quick_figures")
def test_a_table_by_stage_is_cut_at_the_boundary_of_the_run(tmp_path, capsys):
    """By the first probe, not by the last, which measures with other draws."""
    few = [
        "~callbacks.errors",
        "~callbacks.memorization",
        "~callbacks.transitions",
        "~callbacks.ema",
    ]
    results = train(configuration(tmp_path, *few))
    probes = [json.loads(line) for line in (tmp_path / "stages/stages.jsonl").open()][1:]
    assert len({probe["midpoint"] for probe in probes}) == len(probes) > 1
    rows = results["stages"]
    assert rows[0]["to"] == rows[1]["from"] == probes[0]["midpoint"]
    assert f"{probes[0]['midpoint']:7.3f}   [{probes[0]['midpoint_low']:.3f}," in (
        capsys.readouterr().out
    )
    for row in rows:
        assert row["gap"] == pytest.approx(row["held_out"] - row["train"], nan_ok=True)
    assert 0 < rows[-1]["gap_se"] < 0.5


@pytest.mark.usefixtures("quick_figures")
@pytest.mark.parametrize("classes", [1, 2])
def test_few_classes_are_trained_on_watched_steered_and_sampled(tmp_path, classes):
    path = make_latents(tmp_path / "made", 60, (4, 8, 8), classes)
    few = ["~callbacks.errors", "~callbacks.memorization", "~callbacks.transitions"]
    others = ("data.", "experiment=", "callbacks.ema.")
    some = [override for override in SMALL if not override.startswith(others)]
    with initialize_config_module("stagewise.recipes.conf", version_base="1.3"):
        config = compose(
            "train",
            [
                *(
                    "experiment=imagenet256_sdvae_sit_s",
                    f"data.latents.path={path}",
                    "callbacks=steer",
                ),
                *(f"data.num_classes={classes}", "data.held_out=10", "data.batch_size=8"),
                *("data.num_workers=0", "net.input_size=8", "net.num_heads=2", *some, *few),
                *("trainer.accelerator=cpu", "trainer.devices=1", f"run_dir={tmp_path / 'run'}"),
            ],
        )
    results = train(config)
    assert results["stages"][-1]["stage"] == "all t"
    assert (tmp_path / "run/samples.png").exists()
    last = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    # A row for each class, and one for none.
    assert last["state_dict"]["net.y_embedder.weight"].shape == (classes + 1, 32)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_figures")
def test_stopping_and_resuming_a_recipe_is_not_stopping(tmp_path):
    # Stopped at the end of an epoch of 8 batches: Lightning starts an interrupted one anew.
    steps = ["trainer.val_check_interval=4", "trainer.max_steps=12"]
    train(configuration(tmp_path / "whole", *steps))
    train(configuration(tmp_path / "first", steps[0], "trainer.max_steps=8"))
    last = tmp_path / "first/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 8
    train(configuration(tmp_path / "second", *steps, f"ckpt_path={last}"))
    whole, second = (
        torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True)
        for run in ("whole", "second")
    )
    assert whole["global_step"] == second["global_step"] == 12
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name
    curves = [
        [
            {k: v for k, v in json.loads(line).items() if "second" not in k and "share" not in k}
            for line in (tmp_path / run / "stages/stages.jsonl").open()
        ]
        for run in ("whole", "second")
    ]
    assert curves[0] == curves[1]


def test_loss_by_time_is_that_of_the_objective(tmp_path):
    config = configuration(tmp_path)
    data = instantiate(config.data)
    data.setup()
    module = instantiate(
        config.module, net=instantiate(config.net), objective=instantiate(config.objective)
    )
    t, loss = (value.numpy() for value in loss_by_time(module, data.train, 2000))
    assert (np.diff(t) > 0).all()
    # The network starts at zero, so the loss is the mean square of x_1 - x_0, at every t.
    x1 = data.train.tensors[0]
    assert loss.mean() == pytest.approx(1 + float(x1.square().mean()), rel=0.05)
    assert loss[:500].mean() == pytest.approx(loss[-500:].mean(), rel=0.1)


def test_loss_by_time_does_not_hang_on_the_epoch(tmp_path):
    """As when a training is killed in its evaluation, and evaluated without an epoch."""
    latents = make_latents(tmp_path / "latents", 40, (4, 4, 4), num_classes=2)
    net = ["net.input_size=4", "net.hidden_size=32", "net.depth=1", "net.num_heads=2"]
    with initialize_config_module("stagewise.recipes.conf", version_base="1.3"):
        overrides = [f"data.latents.path={latents}", "data.num_classes=2", "data.num_workers=0"]
        config = compose(
            "train", ["experiment=imagenet256_sdvae_sit_s", f"run_dir={tmp_path}", *net, *overrides]
        )
    data = instantiate(config.data)
    data.setup()
    objective = instantiate(config.objective)
    module = instantiate(config.module, net=instantiate(config.net), objective=objective)
    before = loss_by_time(module, data.train, 64)[1]
    drawn = torch.stack([data.train[row][0] for row in range(40)])
    data.latents.set_epoch(7)
    assert not torch.equal(drawn, torch.stack([data.train[row][0] for row in range(40)]))
    assert torch.equal(loss_by_time(module, data.train, 64)[1], before)


@pytest.mark.parametrize("wrong", ["net.hiden_size=3", "experiment=cats", "nett=sit_photos"])
def test_a_wrong_key_is_refused(tmp_path, wrong):
    with pytest.raises(HydraException, match="hiden_size|cats|nett"):
        configuration(tmp_path, wrong)
