"""Configurations of the `callbacks` group."""
