"""Configurations of the `strategy` group."""
