"""`LatentBank`, the training latents as the oracle needs them."""

from stagewise.bank.latent_bank import LatentBank

__all__ = ["LatentBank"]
