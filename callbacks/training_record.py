r"""What training spends on each stage, seen at the network's own calls: no forward pass is added.

From `x_t`, t and `x_1` of a training batch the conditional velocity is known, from the network's
answer its error. A hook on that answer sees `dL/dv`, whose norm for each sample says how hard it
pulls. Draws, loss and pull are added up by bins of t, on the device; nothing waits for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stagewise.adapters.network import Network, noise_of, tensor_of
from stagewise.callbacks.metrics import SUMS, BinnedMeans
from stagewise.callbacks.velocity_entries import by_time, nominal_shares, spent, window_entry
from stagewise.paths import Prediction

__all__ = ["TrainingRecord"]


class TrainingRecord:
    """Adds up what the batches of a training show; see the module docstring.

    Args:
        network: What is trained; one hook is put on it, which `close` takes off.
        edges: Of the bins of t, (T + 1,), ascending.
        stages: Edges of the stages, (4,).
        device: Where the sums lie.
        step: Optimizer steps so far.
    """

    def __init__(
        self, network: Network, edges: Tensor, stages: Tensor, device: torch.device, step: int
    ) -> None:
        self.network, self._edges, self._stages = network, edges, stages
        dtype = torch.float32 if device.type == "mps" else torch.float64
        fine = torch.cat([edges, stages]).unique()
        self.means = BinnedMeans(fine, ("loss", "gradient"), dtype).to(device)
        self._begin = step
        self._logged: BinnedMeans | None = None
        self._x1: Tensor | None = None
        self._seen: tuple[Tensor, Tensor] | None = None
        self._pull: Tensor | None = None
        self._bad: tuple[Tensor, Tensor, Tensor] | None = None
        self._hook = network.module.register_forward_hook(self.look, with_kwargs=True)

    def expect(self, x1: Tensor) -> None:
        """Names the samples of the batch that comes."""
        self._x1, self._seen, self._pull = x1.detach(), None, None

    def look(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Takes note of a call of the network, if it is the training's; a forward hook."""
        # The first call with gradients is the training's: others are teachers, or are made again.
        x1 = self._x1
        if x1 is None or self._seen is not None or not torch.is_grad_enabled():
            return
        inputs = self.network.inputs(args, kwargs)
        if inputs is None or inputs[0].shape != x1.shape:
            return
        y = tensor_of(output, tuple(x1.shape))
        with torch.no_grad():
            xt, t = inputs
            path = self.network.seam.path
            x0, known = noise_of(path, xt, t, x1)
            u = Prediction("velocity").target(path(t.float()), x0, x1.float())
            error = (self.network.velocity(y, xt, t) - u).flatten(1).square().mean(1)
            # Where rounding has eaten the noise nothing can be said, which is not an error.
            self._seen = t.detach(), torch.where(known, error, 0.0)
        if y.requires_grad:
            y.register_hook(self._note)

    def _note(self, gradient: Tensor) -> None:
        self._pull = gradient.detach().flatten(1).float().norm(dim=1)

    def finish(self, step: int) -> None:
        """Adds the batch that was; costs no device sync.

        Args:
            step: Optimizer steps before it.
        """
        if self._seen is None:
            return
        (t, loss), pull = self._seen, self._pull
        pull = torch.zeros_like(loss) if pull is None else pull
        self.means.update(t, torch.stack([loss, pull]))
        bad = ~(loss.isfinite() & pull.isfinite())
        record = bad, t, torch.full((), step, device=t.device)
        self._bad = record if self._bad is None else _first(self._bad, record)
        self._x1 = self._seen = self._pull = None

    def latest(self, prefix: str) -> dict[str, float]:
        """Scalars over the batches of all ranks since the last time; a collective.

        Args:
            prefix: Of the tags.
        """
        with self.means.sync_context():
            total = self.means.merged()
        latest, self._logged = total.merged(without=self._logged), total
        scalars = {
            f"{prefix}/{key}/{stage}": share
            for stage, shares in spent(latest, self._stages).items()
            for key, share in shares.items()
        }
        losses = latest.merged(self._edges).compute()["loss"].tolist()
        return scalars | by_time(f"{prefix}/loss_by_t", self._edges, losses)

    def window(self, step: int) -> dict[str, Any] | None:
        """What the batches of all ranks since the last window have shown; a collective.

        Args:
            step: Optimizer steps so far.

        Returns:
            An event, None if nothing was seen.
        """
        with self.means.sync_context():
            total = self.means.merged().cpu()
        self.means.reset()
        begin, self._begin, self._logged = self._begin, step, None
        if not bool(total.count.any()):
            return None
        density = nominal_shares(self.network.seam, self._edges)
        entry = window_entry(total, self._edges, self._stages, density)
        return {"event": "training_window", "step": step, "from_step": begin, **entry}

    def nonfinite(self) -> dict[str, Any] | None:
        """The first batch since the last time that was not finite, None if all were; a device sync.

        Returns:
            `step`, optimizer steps before it; `rows`, places in the batch; `t`, their times; and a
            `message`.
        """
        record, self._bad = self._bad, None
        if record is None or not bool(record[0].any()):
            return None
        bad, t, step = (value.cpu() for value in record)
        rows, times = bad.nonzero().flatten().tolist(), t[bad].tolist()
        bins = torch.bucketize(t[bad].double(), self._edges[1:-1], right=True).unique()
        where = ", ".join(f"[{self._edges[i]:.3f}, {self._edges[i + 1]:.3f}]" for i in bins)
        message = (
            f"At step {int(step)} the loss or its gradient is not finite for {len(rows)} samples "
            f"of the batch: rows {rows[:16]}, t in {where}. They are left out of what is reported."
        )
        return {"step": int(step), "rows": rows, "t": times, "message": message}

    def state_dict(self) -> dict[str, Any]:
        """The sums of this rank, on the CPU."""
        parts = {"means": self.means, "logged": self._logged}
        sums = {
            name: {key: getattr(part, key).cpu() for key in SUMS}
            for name, part in parts.items()
            if part is not None
        }
        return {"begin": self._begin, **sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave; one of other bins is left."""
        if state["means"]["count"].shape != self.means.count.shape:
            return
        self._begin = state["begin"]
        if "logged" in state:
            self._logged = self.means.merged()
        for name, part in (("means", self.means), ("logged", self._logged)):
            for key, value in state.get(name, {}).items():
                setattr(part, key, value.to(self.means.edges))

    def close(self) -> None:
        """Takes the hook off."""
        self._hook.remove()


def _first(
    one: tuple[Tensor, Tensor, Tensor], other: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The first of two records if it has anything to say, else the other."""
    keep, size = one[0].any(), max(len(one[0]), len(other[0]))

    def chosen(a: Tensor, b: Tensor) -> Tensor:
        # The last batch of an epoch may have fewer samples.
        return torch.where(keep, *(nn.functional.pad(x, (0, size - len(x))) for x in (a, b)))

    bad, t = (chosen(a, b) for a, b in zip(one[:2], other[:2], strict=True))
    return bad, t, torch.where(keep, one[2], other[2])
