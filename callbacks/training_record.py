r"""What training spends on each stage, from the network's own calls: no forward pass is added.

`x_t`, t and `x_1` of a training batch give the conditional velocity, and the network's answer its
error. A hook on that answer gets `dL/dv`, of which the norm is taken for each sample. Draws, losses
and norms are added up by bins of t, on the device; nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import unserializable_hook

from stagewise.adapters.hooks import CallHook
from stagewise.adapters.network import Network
from stagewise.adapters.network_search import NetworkSearch
from stagewise.adapters.own import nominal_shares
from stagewise.binned_sums import SUMS, BinnedSums
from stagewise.callbacks.writer import by_time
from stagewise.masks import MaskedLabels, zeroed
from stagewise.noise import can_tell
from stagewise.paths import Prediction, expand_like
from stagewise.velocity_probe import spent, window_entry

__all__ = ["TrainingRecord"]

_BATCHES = 16
"""Batches that are added at a time."""


class TrainingRecord:
    """Adds up draws, losses and gradient norms of the batches of a training.

    Args:
        network: What is trained; a hook is on it from the start of each batch to its call.
        edges: Of the bins of t, (T + 1,), ascending.
        stages: Edges of the stages, (4,).
        device: Of the sums.
        add: Adds a tensor up over ranks.
        step: Optimizer steps so far.

    Attributes:
        lacking: What the next window does not count; empty if it counts everything.
    """

    def __init__(
        self,
        network: Network,
        edges: Tensor,
        stages: Tensor,
        device: torch.device,
        add: Callable[[Tensor], Tensor],
        step: int,
    ) -> None:
        self.network, self._edges, self._stages = network, edges, stages
        dtype = torch.float32 if device.type == "mps" else torch.float64
        fine = torch.cat([edges, stages]).unique()
        self._empty = BinnedSums.empty(fine, ("loss", "gradient"), dtype).to(device)
        self.sums, self._reduce = replace(self._empty), add
        self._begin, self.lacking = step, ""
        self._logged: BinnedSums | None = None
        self._x1: Callable[[], Tensor] | None = None
        self._seen: tuple[Tensor, Tensor, Tensor] | None = None
        self._pull: Tensor | None = None
        self._waiting: list[tuple[Tensor, ...]] = []
        self._unread: list[tuple[Tensor, ...]] = []
        self._hook: CallHook | None = None

    def expect(self, x1: Callable[[], Tensor], masks: Callable[[], object]) -> None:
        """Before a batch: takes functions that give its samples once the network is called."""
        self.close()
        self._x1, self._masks, self._seen, self._pull = x1, masks, None, None
        self._hook = CallHook(self.look, self.network.module.register_forward_hook)

    def take_first(self, search: NetworkSearch) -> None:
        """Takes the first call of the network, which was before the hook."""
        first, labels = search.first, search.labels
        assert first is not None
        self.expect(lambda: first.x1, lambda: labels)
        self.look(self.network.module, *first.made)

    def look(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Records the training's call of the network; a forward hook."""
        # That is the first with gradients; others are of teachers, or of checkpointed activations.
        if self._x1 is None or self._seen is not None or not torch.is_grad_enabled():
            return
        inputs = self.network.inputs(args, kwargs)
        x1 = self._x1().detach()
        if inputs is None or inputs[0].shape != x1.shape:
            return
        y = self.network.answer(output, tuple(x1.shape))
        self.close()
        with torch.no_grad():
            xt, t = inputs
            path = self.network.maker.path(t.float())
            # u = c x_1 + b x_t, which is not known if rounding has removed the noise.
            known = can_tell(path, xt.dtype)
            c, b = (expand_like(value, xt) for value in Prediction("velocity").coefficients(path))
            u = torch.addcmul(b * xt.float(), c, x1.float())
            masks, gap = self._masks(), self.network.velocity(output, xt, t) - u
            gap = zeroed(gap, masks).flatten(1)
            count = masks.counts if isinstance(masks, MaskedLabels) else gap.shape[1]
            loss = torch.linalg.vector_norm(gap, dim=1).square() / count
            self._seen = t.detach(), torch.where(known, loss, torch.nan), known
        if y.retains_grad and y.grad is not None:  # the backward pass is over
            self._note(y.grad)
        elif y.requires_grad:
            y.register_hook(self._note)

    @unserializable_hook
    def _note(self, gradient: Tensor) -> None:
        self._pull = gradient.detach().flatten(1).float().norm(dim=1)

    def finish(self, step: int) -> None:
        """Adds the last batch, after `step` optimizer steps before it; costs no device sync."""
        self.close()
        if self._seen is None:
            return
        t, loss, known = self._seen
        pull = torch.zeros_like(loss) if self._pull is None else self._pull
        place = torch.arange(len(t), device=t.device)
        self._waiting.append((t, loss, pull, known, place, torch.full_like(place, step)))
        self._x1 = self._seen = self._pull = None
        if len(self._waiting) == _BATCHES:
            self._add()

    def _add(self) -> None:
        """Adds the waiting batches, many at a time, so that few kernels are launched."""
        if not self._waiting:
            return
        t, loss, pull, known, place, step = (
            torch.cat(part) for part in zip(*self._waiting, strict=True)
        )
        self._waiting = []
        self.sums.update(t, torch.stack([loss, pull]))
        bad = known & ~(loss.isfinite() & pull.isfinite())
        self._unread.append((bad, t, place, step))

    def _of_all_ranks(self) -> BinnedSums:
        self._add()
        return self.sums.over(self._reduce)

    def latest(self, prefix: str) -> dict[str, float]:
        """Scalars by tag, over the batches of all ranks since the last call; a collective."""
        total = self._of_all_ranks()
        latest = total if self._logged is None else total.without(self._logged)
        self._logged = total
        scalars = {
            f"{prefix}/{key}/{stage}": share
            for stage, shares in spent(latest, self._stages).items()
            for key, share in shares.items()
        }
        losses = latest.merged(self._edges).means()["loss"].tolist()
        return scalars | by_time(f"{prefix}/loss_by_t", self._edges, losses)

    def window(self, step: int) -> dict[str, Any] | None:
        """The event of all ranks' batches since the last window, None without any; a collective."""
        total = self._of_all_ranks().to("cpu")
        self.sums, self._unread = replace(self._empty), []
        begin, self._begin, self._logged = self._begin, step, None
        if not bool(total.count.any()):
            return None
        density = nominal_shares(self.network.maker, self._edges)
        entry = window_entry(total, self._edges, self._stages, density)
        lacking, self.lacking = self.lacking, ""
        about = {"event": "training_window", "step": step, "from_step": begin, **entry}
        return about | ({"lacking": lacking} if lacking else {})

    def nonfinite(self) -> dict[str, Any] | None:
        """The first batch since the last call that was not finite, if any; a device sync."""
        self._add()
        records, self._unread = self._unread, []
        if not records:
            return None
        found = [torch.cat(part) for part in zip(*records, strict=True)]
        if not bool(found[0].any()):
            return None
        bad, t, place, steps = (value.cpu() for value in found)
        step = int(steps[bad].min())
        bad &= steps == step
        rows, times = place[bad].tolist(), t[bad].tolist()
        bins = torch.bucketize(t[bad].double(), self._edges[1:-1], right=True).unique()
        where = ", ".join(f"[{self._edges[i]:.3f}, {self._edges[i + 1]:.3f}]" for i in bins)
        message = (
            f"At step {step} the loss or its gradient is not finite for {len(rows)} samples "
            f"of the batch: rows {rows[:16]}, t in {where}. They are left out of all reports."
        )
        return {"step": step, "rows": rows, "t": times, "message": message}

    def state_dict(self) -> dict[str, Any]:
        """The sums of this rank, on the CPU."""
        self._add()
        parts = {"means": self.sums, "logged": self._logged}
        sums = {
            name: {key: getattr(part, key).cpu() for key in SUMS}
            for name, part in parts.items()
            if part is not None
        }
        return {"begin": self._begin, "lacking": self.lacking, **sums}

    def load_state_dict(self, state: dict[str, Any], rank: int = 0, ranks: int = 1) -> None:
        """Takes what `state_dict` gave, unless it has other bins.

        The state of a checkpoint is the first rank's: sums of other ranks are lost.
        """
        count = state["means"]["count"]
        if count.shape != self.sums.count.shape:
            return
        self.lacking = state.get("lacking", "")
        if ranks > 1 and bool(count.any()):
            self.lacking = (
                f"from step {state['begin']} to {self._begin}, where training was resumed, draws "
                f"of one process of {ranks} are counted"
            )
        if rank:
            return
        self._begin, edges = state["begin"], self.sums.edges
        means, logged = (
            {key: value.to(edges) for key, value in state.get(name, {}).items()}
            for name in ("means", "logged")
        )
        self.sums = replace(self._empty, **means)
        self._logged = replace(self._empty, **logged) if logged else None

    def close(self) -> None:
        """Removes the hook."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None
