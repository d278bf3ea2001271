"""Configurations of the `scheme` group."""
