"""Configurations of the `engine` group."""
