"""Configurations of the `ema` group."""
