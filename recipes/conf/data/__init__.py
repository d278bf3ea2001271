"""Configurations of the `data` group."""
