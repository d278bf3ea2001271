"""Watch and steer the action head of a robot: padded chunks of actions, given an observation.

Chunks at the end of an episode are padded; the mask says which steps are actions. The target of a
chunk is the mean over chunks with about the same observation, weighted by a kernel. The step is
written by hand; `self.target(...)` is the one line that is needed to steer it. Run it with `python
examples/action_head.py`; it takes a few seconds and needs the `lightning` extra.
"""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from stagewise import Condition, Mix, StageTarget
from stagewise.callbacks import PosteriorMonitor, StageRun, StageScheme

CHUNK, EPISODE = 8, 20


def episodes(count):
    """Observations (N, 2), chunks (N, 8, 2), masks (N, 8) of a reach for the origin, with noise."""
    draws = torch.Generator().manual_seed(0)
    place = torch.randn(count, 2, generator=draws)
    seen, done = [], []
    for _ in range(EPISODE):
        seen.append(place)
        done.append(0.3 * torch.randn(count, 2, generator=draws) - place)
        place = place + 0.2 * done[-1]
    done += [done[-1]] * CHUNK  # padding that repeats the last action
    chunks = [torch.stack(done[k : k + CHUNK], 1) for k in range(EPISODE)]
    steps = torch.arange(EPISODE)[:, None] + torch.arange(CHUNK)
    mask = (steps < EPISODE)[:, None].expand(-1, count, -1)
    return torch.cat(seen), torch.cat(chunks), mask.flatten(0, 1)


class ActionHead(L.LightningModule):
    """Flow matching on chunks of actions."""

    def __init__(self):
        super().__init__()
        sizes = 2 * CHUNK + 1 + 2, 128, 2 * CHUNK
        self.net = nn.Sequential(nn.Linear(*sizes[:2]), nn.SiLU(), nn.Linear(*sizes[1:]))
        self.target = StageTarget()

    def training_step(self, batch, batch_idx):
        """The mean square over actions, without padding."""
        x1, mask = batch["actions"], batch["mask"]
        x0, t = torch.randn_like(x1), torch.rand(len(x1), device=x1.device)
        xt = (1 - t[:, None, None]) * x0 + t[:, None, None] * x1
        u, w = self.target(x1 - x0, xt=xt, t=t, x1=x1, mask=mask)
        v = self.net(torch.cat([xt.flatten(1), t[:, None], batch["observation"]], 1))
        error = (v.reshape(u.shape) - u).square().mean(2)
        return (w * (error * mask).sum(1) / mask.sum(1)).mean()

    def configure_optimizers(self):
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main(*callbacks, **options):
    """Trains and returns the module."""
    torch.manual_seed(0)
    names = "observation", "actions", "mask"
    rows = zip(*episodes(24), strict=True)
    data = [dict(zip(names, row, strict=True)) for row in rows]
    trainer = L.Trainer(max_steps=60, callbacks=list(callbacks), accelerator="cpu", **options)
    trainer.fit(module := ActionHead(), DataLoader(data, batch_size=64, shuffle=True))
    return module


RUN = StageRun(
    read_batch=lambda batch: (batch["actions"], None, batch["mask"]),
    condition=Condition(bandwidth=0.3, read_batch=lambda batch: batch["observation"]),
)
if __name__ == "__main__":
    main(RUN, PosteriorMonitor(), StageScheme(target=Mix("boundary")))
