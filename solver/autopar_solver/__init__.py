"""Choice problems: one choice per node, costs on nodes and edges, a memory limit over time; solved with a
proof.
"""

from autopar_solver.choice import Choice, Progress
from autopar_solver.errors import ProblemError
from autopar_solver.json_form import load_problem, problem_from_json, problem_to_json, save_problem
from autopar_solver.problem import FORBIDDEN, ChoiceProblem
from autopar_solver.solve import solve

__all__ = [
    "FORBIDDEN",
    "Choice",
    "ChoiceProblem",
    "ProblemError",
    "Progress",
    "load_problem",
    "problem_from_json",
    "problem_to_json",
    "save_problem",
    "solve",
]
