"""Configurations of the `experiment` group."""
