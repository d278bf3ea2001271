"""The examples of loops without Lightning: watched they train the same weights, and can be steered.

Each is run three times: without the statements that say `watch`, as it is, and with a `StageScheme`
more among its callbacks.
"""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import stagewise.callbacks
from stagewise import Mix, StageTarget
from stagewise.callbacks import StageScheme, Watch

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ["fabric", "plain_loop", "accelerate_loop", "hugging_face_trainer"]


class Without(ast.NodeTransformer):
    """Leaves out the statements that say `watch`."""

    def generic_visit(self, node):
        if isinstance(node, (ast.Expr, ast.Assign)) and "watch" in {
            part.id for part in ast.walk(node) if isinstance(part, ast.Name)
        }:
            return None
        return super().generic_visit(node)


def run(name, *, watched=True):
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text())
    tree = tree if watched else ast.fix_missing_locations(Without().visit(tree))
    found = {"__name__": name}
    exec(compile(tree, name, "exec"), found)
    return found


def weights(found):
    return nn.utils.parameters_to_vector(found["model"].parameters()).detach()


def oracle_velocity(xt, t, rows):
    """u* = (E[x_1 | x_t] - x_t) / (1 - t) in float64, over all rows."""
    t = t.reshape(-1, 1)
    far = (xt[:, None] - t[:, None] * rows).square().sum(2)
    mean = (-far / (2 * (1 - t).square())).softmax(1) @ rows
    return (mean - xt) / (1 - t)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_example(name, tmp_path, monkeypatch, quick_figures):
    monkeypatch.chdir(tmp_path)
    plain, watched = run(name, watched=False), run(name)
    assert torch.equal(weights(plain), weights(watched))
    assert "watch" not in plain
    assert len(list(tmp_path.glob("runs/*/stagewise*/stages.jsonl"))) == 2
    if name == "fabric":
        logged = Path("runs/fabric/version_0/metrics.csv").read_text()
        assert "stagewise/midpoint" in logged
        assert "stagewise_error/pythagoras" in logged

    steers, calls = StageScheme(target=Mix("boundary"), boundary=0.6), []

    def steered(model, data, *callbacks, **options):
        return Watch(model, data, *callbacks, steers, **options)

    def note(module, args, kwargs, output):
        calls.append((args[0], kwargs, output[0]))

    monkeypatch.setattr(stagewise.callbacks, "Watch", steered)
    whole = StageTarget.__init__

    def init(self, *args, **options):
        whole(self, *args, **options)
        self.register_forward_hook(note, with_kwargs=True)

    monkeypatch.setattr(StageTarget, "__init__", init)
    found = run(name)
    assert not torch.equal(weights(plain), weights(found))
    for u, given, got in calls[-3:]:
        xt, t = given["xt"].double(), given["t"].double()
        labels, rows = given.get("labels"), steers.scheme.oracle.bank
        x = rows.take(torch.arange(len(rows))).double()
        if labels is None:
            star = oracle_velocity(xt, t, x)
        else:
            of = torch.tensor(rows.labels_of(list(range(len(rows)))))
            star = torch.cat(
                [oracle_velocity(xt[k : k + 1], t[k], x[of == labels[k]]) for k in range(len(xt))]
            )
        expected = torch.where(t < 0.6, star, u.double())
        assert bool((t < 0.6).any())
        off = (got.double() - expected).norm(dim=1) / expected.norm(dim=1)
        assert float(off.max()) < 1e-5
