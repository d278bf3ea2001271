"""`VelocityErrorMonitor` and `StageTransitions` in two processes (gloo): what one would say."""

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
from lightning.pytorch.loggers import CSVLogger

from stagewise.callbacks import (
    MemorizationMonitor, PosteriorMonitor, StageTransitions, VelocityErrorMonitor
)

x, others = samples(97 + 31).split([97, 31])


class Validated(Flow):
    def validation_step(self, batch, batch_idx):
        pass


def fit(*callbacks, logger=False, lr=0.0):  # the same model at any batch size
    pl.seed_everything(9 + rank, verbose=False)
    model = Validated(lr)
    trainer = make_trainer(*callbacks, logger=logger, max_steps=10, log_every_n_steps=2)
    trainer.fit(model, loader(x, 8 // devices, shuffle=True), loader(others))
    return weights(model)


errors = VelocityErrorMonitor(every_n_steps=2, strata=4, queries=9, dirpath=out / f"rank{rank}")
heard = []
events = StageTransitions(window=4, patience=1, subscribers=[heard.append])
# A model that does not move is at its plateau as soon as anything can be said.
errors_short = VelocityErrorMonitor(every_n_steps=1, strata=4, queries=4, name="short")
few = {"every_n_steps": 3, "strata": 4, "queries": 4}
all_of_them = (
    PosteriorMonitor(**few, name="a"), VelocityErrorMonitor(**few, name="b"),
    MemorizationMonitor(every_n_steps=3, samples=6, steps=5), StageTransitions(name="c"),
)
with undrawn():
    fit(errors_short, events, errors, logger=CSVLogger(out, "csv", version=""))
    plain, watched = fit(lr=0.1), fit(*all_of_them, lr=0.1)
report({"events": errors.events, "heard": heard, "plain": plain, "watched": watched})
"""


@pytest.fixture(scope="module")
def folders(on_one_and_two_ranks):
    """The folder of the run in one process, and that of the run in two."""
    return on_one_and_two_ranks(SCRIPT)


@pytest.fixture(scope="module")
def reports(folders, reports_of):
    """What the one process reported, then rank 0 and rank 1 of the two."""
    return reports_of(*folders)


def test_probes_are_those_of_one_process(reports):
    one, first, second = reports
    assert first["events"][0]["step"] == 1
    assert [e["event"] for e in first["events"]] == [e["event"] for e in one["events"]]
    for mine, hers, expected in zip(first["events"], second["events"], one["events"], strict=True):
        if mine["event"] != "velocity_probe":
            continue
        for split in ("train", "held_out"):
            for key in ("conditional", "oracle", "cosine", "conditional_se"):
                assert mine[split][key] == pytest.approx(expected[split][key], rel=1e-5, abs=1e-6)
                assert mine[split][key] == pytest.approx(hers[split][key], rel=1e-12, nan_ok=True)
        assert mine["stages"]["train"]["navigation"]["floor"] == pytest.approx(
            expected["stages"]["train"]["navigation"]["floor"], rel=1e-5
        )


def test_windows_count_the_batches_of_all_ranks(reports):
    for said in reports[1:]:
        windows = [e for e in said["events"] if e["event"] == "training_window"]
        steps = [(w["from_step"], w["step"]) for w in windows]
        assert steps == [(0, 1), (1, 2), (2, 4), (4, 6), (6, 8), (8, 10)]
        assert all(sum(w["draws"]) == pytest.approx(1) for w in windows)
    same = [said["events"][1]["loss"] for said in reports[1:]]
    assert same[0] == pytest.approx(same[1], nan_ok=True)


def test_ranks_decide_the_same_transition_at_the_same_step(reports):
    one, first, second = (said["heard"] for said in reports)
    assert first == second
    assert first[0]["kind"] == "navigation learned"
    assert [(e["kind"], e["step"]) for e in first] == [(e["kind"], e["step"]) for e in one]


def test_weights_are_bit_identical_with_all_monitors(reports):
    assert all(each["watched"] == each["plain"] for each in reports)
    assert reports[1]["plain"] == reports[2]["plain"], "the ranks train one model"
    assert max(map(abs, reports[0]["plain"][1])) > 0


def test_only_the_first_rank_writes(folders):
    assert (folders[1] / "rank0" / "stages.jsonl").exists()
    assert not (folders[1] / "rank1").exists()
