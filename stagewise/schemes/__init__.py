"""How a run treats its stages: which times it draws, what it is trained on, what counts how much.

A `Scheme` is one such choice. `Phases` changes it on the way. Both have the same interface, work in
any loop, and log nothing.
"""

from stagewise.schemes.phases import Phase, Phases, mixes, parts
from stagewise.schemes.scheme import Scheme
from stagewise.schemes.state import SchemeRecord

__all__ = ["Phase", "Phases", "Scheme", "SchemeRecord", "mixes", "parts"]
