"""Runs plans: segments become compiled functions, workers interpret programs, here or on a cluster."""

from autopar.runtime.array import DistributedArray, fetch
from autopar.runtime.backend import Backend, Session, StageMemory
from autopar.runtime.executable import Executable, load
from autopar.runtime.inprocess import InProcess

__all__ = [
    "Backend",
    "DistributedArray",
    "Executable",
    "InProcess",
    "Session",
    "StageMemory",
    "fetch",
    "load",
]
