"""Runnable recipes: Hydra configurations and the few modules that they put together."""
