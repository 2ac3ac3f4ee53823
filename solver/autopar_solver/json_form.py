"""Choice problems as JSON: our form and the contest's, gzipped or not."""

import gzip
import json
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any, cast

import numpy as np

from autopar_solver.errors import ProblemError
from autopar_solver.problem import FORBIDDEN, ChoiceProblem, as_ints, expand_limit, flatten

FORMAT = "autopar choice problem"


def load_problem(path: str | os.PathLike[str]) -> ChoiceProblem:
    """Returns the problem in a JSON file of either form; a name ending in .gz is read as gzip.

    Raises:
        ProblemError: the file can't be read, is not JSON, or doesn't hold a choice problem; says what is
            wrong.
    """
    name = os.fspath(path)
    try:
        raw = Path(name).read_bytes()
        form = json.loads(gzip.decompress(raw) if name.endswith(".gz") else raw)
    except (OSError, EOFError, zlib.error) as error:
        raise ProblemError(f"cannot read {name}: {error}") from None
    except ValueError as error:
        raise ProblemError(f"{name} is not JSON: {error}") from None
    return problem_from_json(form)


def save_problem(problem: ChoiceProblem, path: str | os.PathLike[str]) -> None:
    """Writes a problem in our form (gzipped if the name ends in .gz); the file appears whole or not at
    all.
    """
    text = json.dumps(problem_to_json(problem)).encode()
    write_whole(path, gzip.compress(text, 6) if os.fspath(path).endswith(".gz") else text)


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file so that a reader (or an interrupt) never sees half of it."""
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def problem_to_json(p: ChoiceProblem) -> dict[str, Any]:
    """Returns our JSON form: nodes and edges as objects, forbidden entries as null."""
    usage: list[list[Any]] = [[] for _ in range(p.num_nodes)]
    for r, i in enumerate(p.item_node.tolist()):
        start, stop = p.item_interval[r].tolist()
        usage[i].append([start, stop, p.item_usage[p.item_start[r] : p.item_start[r + 1]].tolist()])
    nodes = [{"costs": _nulls(p.costs(i)), "usage": usage[i]} for i in range(p.num_nodes)]
    edges = [
        {"ends": p.edge_ends[e].tolist(), "costs": [_nulls(r) for r in p.matrix(e)]}
        for e in range(p.num_edges)
    ]
    same = len(p.limit) and (p.limit == p.limit[0]).all()
    limit = (int(p.limit[0]) if same else p.limit.tolist()) if len(p.limit) else None
    return {"format": FORMAT, "limit": limit, "nodes": nodes, "edges": edges}


def problem_from_json(form: Any) -> ChoiceProblem:
    """Returns the problem in parsed JSON of either form; raises ProblemError where it doesn't hold one."""
    held = cast(dict[str, Any], form) if isinstance(form, dict) else dict[str, Any]()
    if "problem" in held:
        return _from_contest(held["problem"])
    if held.get("format") != FORMAT:
        raise ProblemError(f'expected an object with "problem" (the contest\'s form) or "format": "{FORMAT}"')
    try:
        return ChoiceProblem.build(
            [_forbidden(node["costs"]) for node in held["nodes"]],
            [(edge["ends"][0], edge["ends"][1]) for edge in held["edges"]],
            [[_forbidden(row) for row in edge["costs"]] for edge in held["edges"]],
            [[(s, t, u) for s, t, u in node.get("usage", ())] for node in held["nodes"]],
            held.get("limit"),
        )
    except ProblemError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ProblemError(f"not a choice problem: {_say(error)}") from None


def _from_contest(problem: Any) -> ChoiceProblem:
    """The contest's form: one interval per node, edge matrices flat and row-major, entries of 1e18
    forbidden.
    """
    try:
        nodes, edges = problem["nodes"], problem["edges"]
        costs, usages, intervals = nodes["costs"], nodes["usages"], nodes["intervals"]
        ends, matrices, limit = edges["nodes"], edges["costs"], problem.get("usage_limit")
        if not len(costs) == len(usages) == len(intervals):
            raise ProblemError(
                f"{len(costs)} costs, {len(usages)} usages, {len(intervals)} intervals; one per node"
            )
        if len(ends) != len(matrices):
            raise ProblemError(f"{len(ends)} edges but {len(matrices)} cost matrices")
        span = _array(intervals, "intervals").reshape(-1, 2)
        alive = np.flatnonzero(span[:, 0] != span[:, 1])
        for i in alive.tolist():
            if len(usages[i]) != len(costs[i]):
                raise ProblemError(f"node {i} has {len(usages[i])} usages for {len(costs[i])} costs")
        used = [usages[i] for i in alive.tolist()]
        return ChoiceProblem(
            *_lay(costs, "costs of nodes"),
            _array(ends, "edge ends").reshape(-1, 2),
            *_lay(matrices, "costs of edges"),
            alive,
            span[alive],
            *_lay(used, "usages"),
            expand_limit(limit, int(span[alive, 1].max(initial=0))),
        )
    except ProblemError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise ProblemError(f"not a choice problem in the contest's form: {_say(error)}") from None


def _lay(lists: list[list[int]], what: str) -> tuple[Any, Any]:
    """Lists end to end; one conversion for all of them is many times faster than one each."""
    start = np.zeros(len(lists) + 1, np.int64)
    start[1:] = np.cumsum([len(values) for values in lists], dtype=np.int64)
    return start, _array([v for values in lists for v in values], what)


def _array(values: Any, what: str) -> Any:
    return as_ints(values, what)


def _nulls(values: Any) -> list[int | None]:
    return [None if v >= FORBIDDEN else int(v) for v in values]


def _forbidden(values: Any) -> list[int]:
    return [FORBIDDEN if v is None else v for v in values]


def _say(error: Exception) -> str:
    return f"missing {error}" if isinstance(error, KeyError) else str(error)


__all__ = ["flatten", "load_problem", "problem_from_json", "problem_to_json", "save_problem", "write_whole"]
