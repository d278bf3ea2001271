"""Watch a training with Accelerate, with two batches for each step of the optimizer.

Only the lines with `watch` are added: `watch.step` gets the number of steps done and the batch. Run
it with `python examples/accelerate_loop.py`; it takes a few seconds and needs accelerate and the
`recipes` extra.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stagewise import StageTarget
from stagewise.callbacks import PosteriorMonitor, VelocityErrorMonitor, Watch


class Net(nn.Module):
    """A perceptron for 8x8 digits."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64 + 1, 256), nn.SiLU(), nn.Linear(256, 64))

    def forward(self, xt, t):
        return self.layers(torch.cat([xt, t], 1))


accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
set_seed(0)
x = torch.from_numpy(load_digits().data).float() / 8 - 1
model, target = Net(), StageTarget()
model, optimizer, loader = accelerator.prepare(
    model,
    torch.optim.Adam(model.parameters(), lr=1e-3),
    DataLoader(TensorDataset(x), batch_size=64, shuffle=True, drop_last=True),
)
watch = Watch(
    model,
    loader,
    PosteriorMonitor(every_n_steps=30),
    VelocityErrorMonitor(every_n_steps=30),
    target=target,
    steps=56,
    accumulate=2,
    log=lambda values, step: print(f"step {step}: {len(values)} numbers"),
    dirpath="runs/accelerate",
)
step = 0
for _ in range(4):
    for batch in loader:
        watch.step(step, batch)
        with accelerator.accumulate(model):
            (x1,) = batch
            x0, t = torch.randn_like(x1), torch.rand(len(x1), 1, device=x1.device)
            xt = t * x1 + (1 - t) * x0
            u, w = target(x1 - x0, xt=xt, t=t, x1=x1)
            accelerator.backward((w * (model(xt, t) - u).square().mean(1)).mean())
            optimizer.step()
            optimizer.zero_grad()
            step += accelerator.sync_gradients
watch.close()
