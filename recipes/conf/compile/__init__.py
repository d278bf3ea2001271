"""Configurations of the `compile` group."""
