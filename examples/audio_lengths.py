"""Watch and steer a training on sounds of different lengths.

Batches are padded to their longest sound, and the loss ignores padding. `read_batch` returns the
mask beside x_1: a sound is then compared only with sounds of the same length. Run it with `python
examples/audio_lengths.py`; it takes a few seconds and needs the `lightning` extra.
"""

import lightning as L
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from stagewise import Mix
from stagewise.callbacks import PosteriorMonitor, StageRun, StageScheme, VelocityErrorMonitor
from stagewise.losses import FlowMatchingLoss


def sounds(count):
    """Decaying tones of 16, 24 or 32 steps of a spectrogram with 4 bands."""
    draws = torch.Generator().manual_seed(0)
    made = []
    for k in range(count):
        steps = torch.arange(16 + 8 * (k % 3))[:, None]
        pitch, decay = torch.rand(2, 4, generator=draws)
        made.append(torch.cos(pitch * steps) * torch.exp(-decay * steps / 8))
    return made


def collate(items):
    """Sounds (B, L, 4), padded to the longest of the batch, and which steps are sound, (B, L)."""
    lengths = torch.tensor([len(item) for item in items])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return pad_sequence(items, batch_first=True), mask


class Network(nn.Module):
    """Convolutions over time that do not see padding."""

    def __init__(self):
        super().__init__()
        self.into, self.out = (nn.Conv1d(a, b, 5, padding=2) for a, b in ((5, 32), (32, 4)))

    def forward(self, xt, t, mask):
        """The velocity, (B, L, 4)."""
        x = torch.cat([xt, t[:, None, None].expand(-1, xt.shape[1], 1)], 2) * mask[..., None]
        h = nn.functional.silu(self.into(x.mT)) * mask[:, None]
        return self.out(h).mT


class Sounds(L.LightningModule):
    """Flow matching on sounds."""

    def __init__(self):
        super().__init__()
        self.net, self.loss_fn = Network(), FlowMatchingLoss()

    def training_step(self, batch, batch_idx):
        """The mean over the sounds, without padding."""
        x1, mask = batch
        return self.loss_fn(self.net, x1, mask, loss_mask=mask)

    def configure_optimizers(self):
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main(*callbacks, **options):
    """Trains and returns the module."""
    torch.manual_seed(0)
    trainer = L.Trainer(max_steps=60, callbacks=list(callbacks), accelerator="cpu", **options)
    loader = DataLoader(sounds(240), batch_size=32, shuffle=True, collate_fn=collate)
    trainer.fit(module := Sounds(), loader)
    return module


RUN = StageRun(read_batch=lambda batch: (batch[0], None, batch[1]))
WATCHING = [RUN, PosteriorMonitor(), VelocityErrorMonitor()]
if __name__ == "__main__":
    main(*WATCHING, StageScheme(target=Mix("boundary")))
