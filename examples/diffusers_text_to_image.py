"""Steer a diffusers script: DDPM on pictures with captions, written out in plain torch.

The step is that of diffusers' text-to-image scripts. One line computes the target: the mean over
the pictures that may have become `noisy`, weighted by how similar their captions are to this one. A
model with text should predict the mean over the data of that text, so the kernel is narrow:
captions that say the same in other words share a target, others do not. Run it with `python
examples/diffusers_text_to_image.py`; it takes some seconds and needs diffusers.
"""

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch.nn.functional import mse_loss

from stagewise import Condition, ConditionedOracle, LatentBank, Mix, Scheme
from stagewise.adapters import diffusers_target
from stagewise.conventions import as_convention

WORDS = ["a", "red", "green", "blue", "square", "cross", "picture", "of", "bright"]


def pictures(count):
    """Coloured shapes at random places, (n, 3, 8, 8), and the words of their captions, (n, 4)."""
    images, captions = torch.full((count, 3, 8, 8), -1.0), torch.zeros(count, 4, dtype=torch.long)
    for image, caption, colour in zip(images, captions, torch.arange(count) % 3, strict=True):
        row, column, cross, more = (int(torch.randint(n, ())) for n in (5, 5, 2, 2))
        image[colour, row : row + 3, column : column + 3] = 1
        if cross:
            image[colour, row : row + 3 : 2, column : column + 3 : 2] = -1
        caption[:] = torch.tensor([0, 8 if more else 0, 1 + int(colour), 4 + cross])
    return images + 0.1 * torch.randn_like(images), captions


def train(steps=100, prediction_type="epsilon"):
    """Trains a small UNet; returns its losses."""
    torch.manual_seed(0)
    latents, captions = pictures(192)
    text = torch.randn(len(WORDS), 16)[captions]  # stands for a text encoder: (n, 4, 16)
    pooled = text.mean(1)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    noise_scheduler = DDPMScheduler(prediction_type=prediction_type)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)

    bank = LatentBank(latents, conditions=pooled)
    path = as_convention(noise_scheduler).path
    oracle = ConditionedOracle(bank, path, Condition("cosine", bandwidth=0.3))
    scheme = Scheme(oracle, target=Mix(), convention=noise_scheduler)

    losses = []
    for _ in range(steps):
        at = torch.randint(len(latents), (16,))
        noise = torch.randn_like(latents[at])
        timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, (len(at),))
        noisy = noise_scheduler.add_noise(latents[at], noise, timesteps)
        # In place of `target = noise`, or get_velocity(...):
        given = (noisy, latents[at], noise, timesteps, scheme)
        target = diffusers_target(*given, condition=pooled[at])
        loss = mse_loss(unet(noisy, timesteps, encoder_hidden_states=text[at]).sample, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


if __name__ == "__main__":
    first, *_, last = torch.tensor(train()).unflatten(0, (10, 10)).mean(1)
    print(f"loss of the first ten steps {first:.3f}, of the last ten {last:.3f}")
