"""Hydra configurations of `stagewise train`; each folder is a group."""
