"""Configurations of the `trainer` group."""
