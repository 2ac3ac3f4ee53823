"""Programs: schedules as data, a plan turned into instructions, their symbolic check and their simulation."""

from autopar.program.check import check
from autopar.program.emit import emit
from autopar.program.schedules import SCHEDULES, gpipe, one_forward_one_backward, schedule
from autopar.program.simulate import simulate

__all__ = ["SCHEDULES", "check", "emit", "gpipe", "one_forward_one_backward", "schedule", "simulate"]
