"""From layers to stages: marks for every equation, the cut into segments, and the plan over a cluster."""

from autopar.stages.assign import assign
from autopar.stages.cut import cut, holders

__all__ = ["assign", "cut", "holders"]
