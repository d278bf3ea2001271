"""Watch a training with Lightning Fabric: give `Watch` what `fabric.setup` returns.

Only the lines with `watch` are added. The network runs in Fabric's precision, here bfloat16, and
scalars go to Fabric's logger. Run it with `python examples/fabric.py`; it takes a few seconds and
needs the `recipes` extra.
"""

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger
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


log = CSVLogger("runs", "fabric", flush_logs_every_n_steps=1)
fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed", loggers=log)
fabric.seed_everything(0)
x = torch.from_numpy(load_digits().data).float() / 8 - 1
model, target = Net(), StageTarget()
model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), lr=1e-3))
loader = fabric.setup_dataloaders(DataLoader(TensorDataset(x), batch_size=128, shuffle=True))
watch = Watch(
    model,
    loader,
    PosteriorMonitor(every_n_steps=30),
    VelocityErrorMonitor(every_n_steps=30),
    target=target,
    steps=60,
    log=fabric.log_dict,
    dirpath="runs/fabric",
)
step = 0
for _ in range(4):
    for batch in loader:
        watch.step(step, batch)
        (x1,) = batch
        x0, t = torch.randn_like(x1), torch.rand(len(x1), 1)
        xt = t * x1 + (1 - t) * x0
        u, w = target(x1 - x0, xt=xt, t=t, x1=x1)
        loss = (w * (model(xt, t) - u).square().mean(1)).mean()
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        step += 1
watch.close()
