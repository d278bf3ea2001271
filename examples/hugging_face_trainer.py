"""Watch a training with the Trainer of Hugging Face, by a callback of five lines.

The model computes its own loss, as that Trainer expects. Its `StageTarget` shows the watch what it
is trained on, so the callback needs no batch. Run it with `python
examples/hugging_face_trainer.py`; it needs transformers and the `recipes` extra.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from stagewise import LatentBank, StageTarget
from stagewise.callbacks import PosteriorMonitor, VelocityErrorMonitor, Watch


class Flow(nn.Module):
    """Flow matching on 8x8 digits with a perceptron."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64 + 1, 256), nn.SiLU(), nn.Linear(256, 64))
        self.target = StageTarget()

    def forward(self, x1):
        x0, t = torch.randn_like(x1), torch.rand(len(x1), 1, device=x1.device)
        xt = t * x1 + (1 - t) * x0
        u, w = self.target(x1 - x0, xt=xt, t=t, x1=x1)
        v = self.net(torch.cat([xt, t], 1))
        return {"loss": (w * (v - u).square().mean(1)).mean()}


class Stages(TrainerCallback):
    """Calls a watch at each step."""

    def __init__(self, host):
        self.host = host

    def on_step_begin(self, args, state, control, **kwargs):
        self.host.step(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self.host.close()


set_seed(0)
x = torch.from_numpy(load_digits().data).float() / 8 - 1
model = Flow()
arguments = TrainingArguments(
    output_dir="runs/hugging_face",
    max_steps=60,
    per_device_train_batch_size=128,
    learning_rate=1e-3,
    use_cpu=True,
    report_to=[],
    save_strategy="no",
    disable_tqdm=True,
)
trainer = Trainer(model, arguments, train_dataset=[{"x1": row} for row in x])
watch = Watch(
    model,
    LatentBank(x),
    PosteriorMonitor(every_n_steps=30),
    VelocityErrorMonitor(every_n_steps=30),
    steps=60,
    dirpath="runs/hugging_face",
)
trainer.add_callback(Stages(watch))
trainer.train()
