"""Configurations of the `net` group."""
