"""Watch a training loop that is written by hand, without Lightning.

Only the lines with `watch` are added; without them the trained weights are the same to the last
bit. Run it with `python examples/plain_loop.py`; it takes a few seconds and needs the `recipes`
extra for scikit-learn's digits. Then: `stagewise report runs/digits`.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stagewise import StageTarget
from stagewise.callbacks import PosteriorMonitor, VelocityErrorMonitor, Watch


class Net(nn.Module):
    """A perceptron for 8x8 digits and their class."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64 + 1 + 10, 256), nn.SiLU(), nn.Linear(256, 64))

    def forward(self, xt, t, y):
        return self.layers(torch.cat([xt, t, nn.functional.one_hot(y, 10)], 1))


torch.manual_seed(0)
digits = load_digits()
x, labels = torch.from_numpy(digits.data).float() / 8 - 1, torch.from_numpy(digits.target)
loader = DataLoader(TensorDataset(x[:1500], labels[:1500]), batch_size=100, shuffle=True)
model, target = Net(), StageTarget()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
watch = Watch(
    model,
    loader,
    PosteriorMonitor(every_n_steps=50),
    VelocityErrorMonitor(every_n_steps=50),
    target=target,
    steps=150,
    held_out=(x[1500:], labels[1500:]),
    dirpath="runs/digits",
)
step = 0
for _ in range(10):
    for batch in loader:
        watch.step(step, batch)
        x1, y = batch
        x0, t = torch.randn_like(x1), torch.rand(len(x1), 1)
        xt = t * x1 + (1 - t) * x0
        u, w = target(x1 - x0, xt=xt, t=t, x1=x1, labels=y)
        loss = (w * (model(xt, t, y) - u).square().mean(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
watch.close()
