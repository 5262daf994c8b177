"""How the model's trainable variables are split into layer groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from hybridcore import ModelError

MOST_GROUPS = 8

Group = list[int]


def by_depth(sizes: Sequence[int], most: int = MOST_GROUPS) -> list[Group]:
    """Split variables into at most `most` contiguous groups of similar size, none of them empty.

    Parameters
    ----------
    sizes : sequence of int
        Number of elements of each variable, in the order of the model.

    Returns
    -------
    list of list of int
        Positions of the variables.
    """
    total = sum(sizes)
    groups: list[Group] = []
    before, last = 0, -1
    for position, size in enumerate(sizes):
        # The group is set by where the variable's middle lies in the whole.
        index = min(int(most * (before + size / 2) / max(total, 1)), most - 1)
        if index != last:
            groups.append([])
        groups[-1].append(position)
        last = index
        before += size
    return groups


def by_user(layer_groups: Iterable[Iterable[Any]], variables: Sequence[Any]) -> list[Group]:
    """Turn the user's groups of variables into positions, each variable in exactly one of them.

    Raises
    ------
    ModelError
        If a group is empty, or a variable is missing, foreign or named twice.
    """
    groups = [list(group) for group in layer_groups]
    if not groups or any(not group for group in groups):
        raise ModelError("layer_groups must be non-empty lists of variables, got an empty one")
    positions = {id(variable): position for position, variable in enumerate(variables)}
    named = [variable for group in groups for variable in group]
    counts = Counter(map(id, named))
    twice = [one for one in named if counts[id(one)] > 1]
    if twice:
        raise ModelError(f"layer_groups names {_path(twice[0])} twice: name each variable once")
    foreign = [one for one in named if id(one) not in positions]
    if foreign:
        raise ModelError(
            f"layer_groups holds {_path(foreign[0])}, which is no trainable variable of the model: "
            "leave it out"
        )
    missing = [one for one in variables if id(one) not in counts]
    if missing:
        raise ModelError(
            f"layer_groups lacks {len(missing)} trainable variables of the model, such as "
            f"{_path(missing[0])}: name each once"
        )
    return [[positions[id(variable)] for variable in group] for group in groups]


def _path(variable: Any) -> str:
    """Return what a user knows a variable by; of anything else its kind."""
    return str(getattr(variable, "path", type(variable).__name__))
