"""A callback of which a trainer may hold several."""

from __future__ import annotations

import lightning.pytorch as pl

__all__ = ["NamedCallback"]


class NamedCallback(pl.Callback):
    """Its name keeps its checkpointed state, its tags and its files apart from others'.

    Attributes:
        name: Prefix of its tags, and name of its folder.
    """

    name: str

    @property
    def state_key(self) -> str:
        """Distinct for callbacks of distinct names."""
        return self._generate_state_key(name=self.name)
