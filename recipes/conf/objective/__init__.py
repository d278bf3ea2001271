"""Configurations of the `objective` group."""
