"""From layers to stages: marks for every equation, the cut into segments, and the plan over a cluster."""

from autopar.stages.assign import assign
from autopar.stages.cut import cut, holders
from autopar.stages.offers import Offer, Options, Price, Replacements, Shard, replacements
from autopar.stages.plan import plan

__all__ = [
    "Offer",
    "Options",
    "Price",
    "Replacements",
    "Shard",
    "assign",
    "cut",
    "holders",
    "plan",
    "replacements",
]
