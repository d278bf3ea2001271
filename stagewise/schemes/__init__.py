"""What a training does by stage: the times it draws, its targets, weights and smoothing.

A `Scheme` is one such choice, `Phases` are several in a row. Both have the same interface, work in
any loop, and log nothing.
"""

from stagewise.schemes.phases import Phase, Phases, mixes, parts
from stagewise.schemes.scheme import Scheme
from stagewise.schemes.sources import sources
from stagewise.schemes.state import SchemeRecord

__all__ = ["Phase", "Phases", "Scheme", "SchemeRecord", "mixes", "parts", "sources"]
