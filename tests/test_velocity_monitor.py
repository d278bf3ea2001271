"""`VelocityErrorMonitor` in small runs: what it logs and refuses, and that it changes nothing."""

import json
import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from stagewise import LatentBank
from stagewise.adapters import find_target_makers
from stagewise.adapters.network_search import NetworkSearch
from stagewise.callbacks import PosteriorMonitor, StageTransitions, VelocityErrorMonitor
from stagewise.callbacks.training_record import TrainingRecord
from stagewise.losses import FlowMatchingLoss
from stagewise.timesteps import TimestepSampler

pytestmark = [
    pytest.mark.usefixtures("quick_figures"),
    pytest.mark.filterwarnings("ignore:.*(resuming from a checkpoint|callbacks used to create)"),
]

SMALL = {"every_n_steps": 3, "strata": 4, "queries": 8}
COSTS = ("probe_seconds", "share_of_step_time")


def text(events):
    """For comparison: NaN equals NaN here, and every digit counts, but not what a probe cost."""
    return json.dumps([{k: v for k, v in e.items() if k not in COSTS} for e in events])


@pytest.fixture
def fit(make_data, make_trainer, tiny_flow, make_loader):
    """`fit(*callbacks, ...)`: a short run with held-out data; gives the model and the trainer."""

    def fit(
        *callbacks,
        model=None,
        held_out=True,
        x=None,
        labels=None,
        loader=None,
        ckpt_path=None,
        **options,
    ):
        model = model or tiny_flow()
        if x is None:
            x, labels = make_data()
        pl.seed_everything(4, verbose=False)
        others = make_loader(make_data(40)[0] + 0.1)
        if held_out:
            model.validation_step = lambda batch, batch_idx: None
        trainer = make_trainer(*callbacks, **options)
        loader = loader or make_loader(x, labels, shuffle=True)
        trainer.fit(model, loader, others if held_out else None, ckpt_path=ckpt_path)
        return model, trainer

    return fit


def test_watching_changes_nothing(fit, weights, tmp_path):
    plain, _ = fit(max_steps=9)
    monitors = (
        PosteriorMonitor(**SMALL),
        VelocityErrorMonitor(**SMALL),
        StageTransitions(),
        EMAWeightAveraging(decay=0.9),
    )
    watched, _ = fit(*monitors, max_steps=9, logger=CSVLogger(tmp_path, "csv"))
    averaged, _ = fit(EMAWeightAveraging(decay=0.9), max_steps=9)
    assert torch.equal(weights(watched), weights(averaged))
    assert not torch.equal(weights(plain), weights(averaged))
    monitor = VelocityErrorMonitor(**SMALL)
    assert torch.equal(weights(fit(monitor, max_steps=9)[0]), weights(plain))
    assert [entry["step"] for entry in monitor.history] == [1, 3, 6, 9]


def test_no_trace_is_left_on_the_module(fit):
    model, _ = fit(VelocityErrorMonitor(**SMALL))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(module.training for module in model.net.modules())


def test_everything_is_logged_under_its_name(fit, tmp_path, read_stages):
    monitor = VelocityErrorMonitor(**SMALL)
    fit(monitor, max_steps=6, logger=CSVLogger(tmp_path, "csv", version=""))
    header, *columns = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()
    names = set(header.split(","))
    for split in ("train", "held_out"):
        for key in ("conditional", "oracle", "cosine"):
            assert f"stagewise_error/{split}/{key}/navigation" in names
    assert {"stagewise_error/train/floor/navigation", "stagewise_error/gap/refinement"} <= names
    assert {"stagewise_error/pythagoras", "stagewise_error/probe_seconds"} <= names
    assert {f"stagewise_error_spent/{k}/navigation" for k in ("draws", "loss", "gradient")} <= names
    assert "stagewise_error_by_t/train/oracle/t=0.125" in names
    assert "stagewise_error_spent/loss_by_t/t=0.875" in names
    about, events = read_stages(tmp_path / "csv" / "stagewise_error")
    assert about["event"] == "velocity"
    assert about["network"] == "module.net: Sequential(x_t, time)"
    assert about["held_out_rows"] == 32
    assert about["edges"] == [0, 0.25, 0.5, 0.75, 1]
    kinds = [event["event"] for event in events]
    assert kinds == ["velocity_probe", "training_window"] * 3
    windows = [event for event in events if event["event"] == "training_window"]
    assert [(w["from_step"], w["step"]) for w in windows] == [(0, 1), (1, 3), (3, 6)]
    assert all(sum(w["draws"]) == pytest.approx(1) for w in windows)
    assert windows[0]["density"] == pytest.approx([0.25] * 4)


def test_training_batches_are_seen_as_the_objective_sees_them(fit):
    """The loss and the pull of every batch, against those of the objective itself."""
    seen = []

    class Listen(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(pl_module.loss.last)

    monitor = VelocityErrorMonitor(every_n_steps=1, strata=4, queries=2)
    fit(Listen(), monitor, max_steps=4)
    windows = [e for e in monitor.events if e["event"] == "training_window"]
    assert len(windows) == len(seen) == 4
    for window, record in zip(windows, seen, strict=True):
        for place in range(4):
            inside = (record.t >= place / 4) & (record.t < (place + 1) / 4)
            assert window["draws"][place] == pytest.approx(float(inside.float().mean()))
            if inside.any():
                expected = float(record.loss[inside].double().mean())
                assert window["loss"][place] == pytest.approx(expected, rel=1e-4)
                # dL/dv = 2 (v - u) / (B D), so its norm is 2 sqrt(D loss) / (B D).
                pull = 2 * (6 * record.loss[inside].double()).sqrt() / (8 * 6)
                assert window["gradient"][place] == pytest.approx(float(pull.mean()), rel=1e-4)


def test_accumulated_batches_and_bf16(fit):
    monitor = VelocityErrorMonitor(**SMALL)
    fit(monitor, max_steps=4, accumulate_grad_batches=2, precision="bf16-mixed")
    # After the first optimizer step, which is not after the first batch.
    assert [entry["step"] for entry in monitor.history] == [1, 3, 4]
    assert all(math.isfinite(value) for value in monitor.history[-1]["train"]["oracle"])


def test_accumulated_batches_are_all_counted_and_probed_once_a_step(fit):
    batches = []

    class Listen(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            batches.append(pl_module.loss.last)

    monitor, again = VelocityErrorMonitor(**SMALL | {"every_n_steps": 1}), Asked()
    fit(Listen(), monitor, again, max_steps=4, accumulate_grad_batches=2)
    assert [entry["step"] for entry in monitor.history] == [1, 2, 3, 4]
    assert again.after == [2, 4, 6, 8], "batches before each probe"
    windows = [e for e in monitor.events if e["event"] == "training_window"]
    for place, window in enumerate(windows):
        t = torch.cat([record.t for record in batches[2 * place : 2 * place + 2]])
        first = float((t < 0.25).float().mean())
        assert window["draws"][0] == pytest.approx(first), "both batches of the step"


class Asked(pl.Callback):
    """Notes how many batches there were when a monitor before it probed."""

    def __init__(self):
        self.after, self.batches, self.probes = [], 0, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches += 1
        probes = len(trainer.callbacks[1].history)
        if probes > self.probes:
            self.after.append(self.batches)
        self.probes = probes


@pytest.mark.parametrize("at", [5, 6])
def test_a_window_resumed_on_several_ranks_says_what_it_does_not_count(
    fit, make_data, tmp_path, monkeypatch, at, lightning_log
):
    """A checkpoint holds the sums of the first rank; none are lost just after a window."""

    def run(steps, file=None):
        monitor = VelocityErrorMonitor(every_n_steps=3, strata=4, queries=4)
        saved = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
        callbacks = [monitor, saved] if file is None else [monitor]
        options = {"max_steps": steps, "enable_checkpointing": file is None}
        fit(*callbacks, ckpt_path=file, **options)
        return [e for e in monitor.events if e["event"] == "training_window"]

    run(6)
    load = TrainingRecord.load_state_dict
    monkeypatch.setattr(TrainingRecord, "load_state_dict", lambda self, s, *_: load(self, s, 0, 2))
    file = tmp_path / f"step={at}.ckpt"
    windows = run(9, file)
    lacking = [window.get("lacking") for window in windows if window["step"] > at]
    said = "from step 3 to 5, where training was resumed, draws of one process of 2 are counted"
    assert lacking == ([said, None] if at == 5 else [None])
    assert (f"in its first window {said}" in lightning_log.text) == (at == 5)


def test_labels_are_asked_for_where_the_network_is_given_them(fit, make_data):
    x, labels = make_data(64, classes=3)

    class Conditional(pl.LightningModule):
        def __init__(self, conditional):
            super().__init__()
            torch.manual_seed(0)
            self.net, self.embed = nn.Linear(7, 6), nn.Embedding(3, 6)
            self.loss, self.conditional = FlowMatchingLoss(), conditional

        def forward(self, xt, t, y=None):
            h = self.net(torch.cat([xt, t[:, None]], 1))
            return h if y is None else h + self.embed(y)

        def training_step(self, batch, batch_idx):
            x1, y = batch
            return self.loss(self, x1, *([y] if self.conditional else []))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    for conditional in (True, False):
        monitor = VelocityErrorMonitor(**SMALL)
        fit(monitor, model=Conditional(conditional), x=x, labels=labels, held_out=False)
        assert monitor.wise == conditional
        assert monitor.history[-1]["held_out"] is None


def test_a_given_velocity_and_held_out_samples(fit, make_data):
    held_out = make_data(30)[0]
    monitor = VelocityErrorMonitor(
        **SMALL,
        held_out=held_out,
        velocity=lambda module, xt, t, y: module.net(torch.cat([xt, t[:, None]], 1)),
    )
    found = VelocityErrorMonitor(**SMALL, held_out=held_out, name="found")
    fit(monitor, found, held_out=False)
    assert text(monitor.history) == text(found.history)
    assert {e["event"] for e in monitor.events} == {"velocity_probe"}


def test_without_held_out_data_the_log_says_what_is_left_out(fit, lightning_log):
    fit(VelocityErrorMonitor(**SMALL), held_out=False)
    assert "there is no validation data" in lightning_log.text
    assert "held_out=(samples, labels)" in lightning_log.text


def test_a_bank_of_another_scale_raises_the_alarm(fit, make_data, recwarn):
    x, _ = make_data()
    with pytest.warns(UserWarning, match="the oracle is not that of this training"):
        fit(VelocityErrorMonitor(LatentBank(1.3 * x), strata=4, queries=64))
    recwarn.clear()
    fit(VelocityErrorMonitor(LatentBank(x), strata=4, queries=64))
    assert not any("not that of this training" in str(w.message) for w in recwarn)


@pytest.mark.slow
def test_pythagoras_holds_in_every_bin_on_photographs(make_trainer):
    """The net, the objective and the data of the demo, of half the width and fewer rows."""
    pytest.importorskip("timm")
    from stagewise.recipes.module import FlowMatchingModule
    from stagewise.recipes.photos import PhotoPatches
    from stagewise.recipes.sit import SiT

    pl.seed_everything(0, verbose=False)
    module = FlowMatchingModule(
        SiT(7, hidden_size=64, depth=2, num_heads=2), FlowMatchingLoss(), warmup_steps=5
    )
    monitor = VelocityErrorMonitor(every_n_steps=15, queries=32)
    trainer = make_trainer(monitor, max_steps=30, limit_val_batches=1, num_sanity_val_steps=0)
    trainer.fit(module, datamodule=PhotoPatches(train_size=3000, held_out_size=800, batch_size=32))
    assert monitor.wise
    assert [entry["step"] for entry in monitor.history] == [1, 15, 30]
    for entry in monitor.history:
        z = entry["train"]["pythagoras_z"]
        assert len(z) == 24
        assert max(map(abs, z)) < 4, entry["step"]
        assert entry["alarm"] is None


class Broken(pl.LightningModule):
    """Its loss is NaN for the rows 2 and 5 of the batch at step 3, which never ends training."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.loss = Spoilt(), FlowMatchingLoss()

    def training_step(self, batch, batch_idx):
        self.net.spoil = self.trainer.global_step == 3
        loss = self.loss(self.net, batch[0])
        return loss.nan_to_num()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


class Spoilt(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.spoil = nn.Linear(6, 6), False

    def forward(self, xt, t):
        v = self.inner(xt)
        if self.spoil:
            v = v * torch.ones(len(v), 1).index_fill(0, torch.tensor([2, 5]), torch.nan)
        return v


def test_a_loss_that_is_not_finite_is_named(fit, tmp_path, read_stages):
    drawn = []

    class Listen(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            drawn.append(pl_module.loss.last.t)

    monitor = VelocityErrorMonitor(**SMALL)
    with pytest.warns(
        UserWarning, match=r"At step 3 .* 2 samples of the batch: rows \[2, 5\], t in"
    ) as said:
        fit(Listen(), monitor, model=Broken(), max_steps=6, log_every_n_steps=2)
    _, events = read_stages(tmp_path / "stagewise_error_logs")
    (found,) = [event for event in events if event["event"] == "non-finite"]
    assert (found["step"], found["rows"]) == (3, [2, 5])
    times = drawn[3][[2, 5]].tolist()
    assert found["t"] == pytest.approx(times)
    (message,) = [str(w.message) for w in said if "At step 3" in str(w.message)]
    for t in times:
        low = math.floor(4 * t) / 4  # four bins of equal width
        assert f"[{low:.3f}, {low + 0.25:.3f}]" in message
    windows = [e for e in events if e["event"] == "training_window"]
    assert all(value is None or math.isfinite(value) for w in windows for value in w["loss"])


class Early(TimestepSampler):
    """Draws no t above 0.4."""

    def quantile(self, u):
        return 0.4 * u

    def density(self, t):
        return torch.where(t < 0.4, 2.5, 0.0)


def test_bins_that_training_never_draws_from_are_left_out(fit, tiny_flow, tmp_path, read_stages):
    model = tiny_flow()
    model.loss = FlowMatchingLoss(timesteps=Early())
    monitor = VelocityErrorMonitor(**SMALL)
    fit(monitor, model=model, max_steps=3, logger=CSVLogger(tmp_path, "csv", version=""))
    header = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()[0].split(",")
    by_t = [name for name in header if name.startswith("stagewise_error_spent/loss_by_t/")]
    assert [name.rsplit("=")[-1] for name in by_t] == ["0.125", "0.375"]
    _, events = read_stages(tmp_path / "csv" / "stagewise_error")
    window = [event for event in events if event["event"] == "training_window"][-1]
    assert window["loss"][2:] == [None, None]
    assert window["draws"][2:] == [0, 0]
    assert window["stages"]["refinement"]["loss"] == 0
    assert monitor.history[-1]["train"]["conditional"][3] > 0, "a probe has queries there"


def test_after_a_batch_that_is_not_finite_no_others_are_kept(fit):
    kept = []

    class Listen(pl.Callback):
        def on_train_batch_end(self, *_):
            kept.append(len(monitor._record._unread))

    monitor = VelocityErrorMonitor(**SMALL)
    with pytest.warns(UserWarning, match="At step 3"):
        fit(Listen(), monitor, model=Broken(), max_steps=30, log_every_n_steps=1)
    assert max(kept) <= SMALL["every_n_steps"]


def test_it_is_named_if_training_stops_there(fit, tiny_flow, tmp_path, read_stages):
    model = Broken()
    step = model.training_step

    def stops(batch, batch_idx):
        if model.trainer.global_step == 4:
            raise RuntimeError("loss is NaN")
        return step(batch, batch_idx)

    model.training_step = stops
    with pytest.warns(UserWarning, match="At step 3"), pytest.raises(RuntimeError, match="is NaN"):
        fit(VelocityErrorMonitor(**SMALL), model=model, max_steps=9, log_every_n_steps=100)
    kinds = [event["event"] for event in read_stages(tmp_path / "stagewise_error_logs")[1]]
    assert kinds[-1] == "non-finite"


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"every_n_steps": 0}, ValueError, "every_n_steps"),
        ({"queries": 1}, ValueError, "queries"),
        ({"strata": 3}, ValueError, "4 strata"),
        ({"class_wise": "yes"}, ValueError, "class_wise"),
        ({"bank": torch.zeros(3, 2)}, TypeError, r"LatentBank\(x, labels\)"),
    ],
)
def test_bad_arguments(options, error, match):
    with pytest.raises(error, match=match):
        VelocityErrorMonitor(**options)


def test_refusals_before_the_first_optimizer_step(fit, tiny_flow, make_data, weights, tmp_path):
    def refused(match, monitor=None, model=None, error=ValueError, **options):
        model = model or tiny_flow()
        before = weights(model)
        with pytest.raises(error, match=match):
            fit(monitor or VelocityErrorMonitor(**SMALL), model=model, **options)
        assert torch.equal(weights(model), before)

    seamless = tiny_flow()
    del seamless.loss
    seamless.training_step = lambda batch, batch_idx: seamless.net(torch.zeros(2, 7)).sum()
    refused("Found nothing that makes the targets", model=seamless)

    torchcfm = pytest.importorskip("torchcfm")
    coupled = tiny_flow()
    coupled.matcher, coupled.loss = torchcfm.ExactOptimalTransportConditionalFlowMatcher(), None
    refused("no oracle to compare with", model=coupled)
    coupled = tiny_flow()
    coupled.pairs = torchcfm.optimal_transport.OTPlanSampler("exact")
    with pytest.warns(UserWarning, match="may not be that of module.loss"):
        refused("no oracle to compare with.* pairs noise with data", model=coupled)

    wrong = VelocityErrorMonitor(**SMALL, velocity=lambda module, xt, t, y: xt[:, :3])
    refused(r"tensor of shape \(2, 6\), got \(2, 3\)", wrong)
    wrong = VelocityErrorMonitor(**SMALL, velocity=lambda module, xt, t, y: None)
    refused("got NoneType", wrong)

    refused("samples of shape", VelocityErrorMonitor(LatentBank(torch.randn(9, 5)), **SMALL))
    refused("`held_out` with samples", VelocityErrorMonitor(**SMALL, held_out=torch.randn(9, 5)))
    file = tmp_path / "file"
    file.write_text("")
    blocked = VelocityErrorMonitor(**SMALL, dirpath=file / "folder")
    refused("Say where files go: dirpath", blocked, error=OSError)

    encodes = tiny_flow()
    step = encodes.training_step
    encodes.training_step = lambda batch, batch_idx: step([3 * batch[0].abs() + 1], batch_idx)
    refused("not on what was read from the batches, and module.loss is given other", model=encodes)


def test_an_oracle_that_another_callback_has_is_shared(fit):
    first, second = PosteriorMonitor(**SMALL), VelocityErrorMonitor(**SMALL)
    shared = []

    class Look(pl.Callback):
        def on_train_batch_end(self, *_):
            shared.append(first.oracle is second.oracle)

    fit(first, second, Look())
    assert all(shared)
    assert second.boundary.midpoint == first.history[0]["midpoint"]


def test_a_step_on_cuda_waits_for_nothing():
    """Fake tensors hold no numbers: reading one, or mixing devices, is an error."""
    model = nn.Module()
    model.net, model.loss = nn.Linear(7, 6), FlowMatchingLoss()

    def call(xt, t):
        return model.net(torch.cat([xt, t[:, None]], 1))

    x1 = torch.randn(64, 6)
    search = NetworkSearch(model, find_target_makers(model), lambda: [("batch[0]", x1)], None)
    model.loss(call, x1)
    search.stop()
    network = search.result()
    edges, stages = torch.linspace(0, 1, 5).double(), torch.tensor([0, 0.3, 0.6, 1.0]).double()
    record = TrainingRecord(network, edges, stages, torch.device("cpu"), lambda own: own, 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.net.cuda()
        record.sums = record.sums.to("cuda")
        for step in range(17):  # more than are added at a time
            x1 = torch.randn(64, 6, device="cuda")
            record.expect(lambda x1=x1: x1, lambda: None)
            t = torch.rand(64, device="cuda")
            model.loss(call, x1, t=t, x0=torch.randn_like(x1))
            assert record._seen is not None
            record._note(torch.randn_like(x1))  # autograd has no fake device to run on
            record.finish(step)
        assert record.sums.total.device.type == "cuda"


def test_a_checkpoint_keeps_its_state_plain(fit, tmp_path):
    saved = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=5, filename="{step}")
    fit(VelocityErrorMonitor(**SMALL), saved, max_steps=6, enable_checkpointing=True)
    state = torch.load(tmp_path / "saved" / "step=5.ckpt", weights_only=True)
    (key,) = [key for key in state["callbacks"] if "VelocityErrorMonitor" in key]
    found = state["callbacks"][key]
    assert found["record"]["means"]["count"].sum() == 2 * 8  # since the probe at step 3
    assert [e["step"] for e in found["events"]] == [1, 1, 3, 3]


def test_labels_that_a_class_wise_oracle_needs(fit, make_data, make_loader, lightning_log):
    x, labels = make_data(64, classes=3)
    bank = LatentBank(x, labels)
    given = {"velocity": lambda module, xt, t, y: torch.zeros_like(xt), "held_out": x[:9]}
    with pytest.raises(ValueError, match="no labels were found in the training batches"):
        fit(VelocityErrorMonitor(bank, class_wise=True, **SMALL, **given), x=x)
    plain = VelocityErrorMonitor(bank, **SMALL, **given)
    fit(plain, x=x)
    assert not plain.wise
    wise = VelocityErrorMonitor(bank, **SMALL, **given | {"held_out": (x[:9], labels[:9] + 7)})
    fit(wise, loader=make_loader(x, labels))
    assert wise.wise
    assert wise.history[-1]["held_out"] is None
    assert "held-out samples have labels without rows, [7, 8, 9]" in lightning_log.text
