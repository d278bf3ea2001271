"""Configurations of the `logger` group."""
