"""Configurations of the `precision` group."""
