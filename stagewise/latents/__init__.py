"""Latents on disk: readers and writers of the usual formats.

`open_latents` recognises what a path holds (LightningDiT, fast-DiT, REPA, EDM2, MAR, or one plain
file) and returns a data set of `(x_1, label, index)` at the scale of training; `latents.bank()`
makes its bank. `write_latents` writes LightningDiT's shards, `convert` writes any format from any
other, and `make_latents` writes made-up latents for trials.
"""

from stagewise.latents.base import Latents
from stagewise.latents.lightningdit import write_latents, write_stats
from stagewise.latents.making import make_latents
from stagewise.latents.opening import convert, open_latents

__all__ = [
    "Latents",
    "convert",
    "make_latents",
    "open_latents",
    "write_latents",
    "write_stats",
]
