"""Which parameters are predicted, and how they are split into layer groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hybridcore import ModelError

MOST_GROUPS = 8

Group = list[torch.nn.Parameter]


def trainable_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> Group:
    """Parameters that `optimizer` trains, in the order of the model, tied ones once.

    Raises
    ------
    ModelError
        If the model has no trainable parameter, the optimizer holds none of them, or one is
        complex, sparse or not a floating-point tensor.
    """
    of_model = [p for p in model.parameters() if p.requires_grad]
    if not of_model:
        raise ModelError(
            "model has no trainable parameter (all have requires_grad=False or there are none): "
            "unfreeze at least one before building the trainer"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    shared = [p for p in of_model if id(p) in held]
    if not shared:
        raise ModelError(
            "optimizer holds none of the model's trainable parameters: build it from "
            "model.parameters() of the model given here, after moving the model to its device"
        )
    # Parameters outside the model, of a learned loss for instance, move with the rest.
    others = [p for p in outside(model, optimizer) if p.requires_grad]
    for module in model.modules():
        sparse = isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
        if sparse and module.weight.requires_grad and id(module.weight) in held:
            raise ModelError(
                f"{type(module).__name__}(sparse=True) makes sparse gradients, which cannot be "
                "watched: build it with sparse=False and use a dense optimizer"
            )
    for parameter in shared + others:
        if not parameter.is_floating_point() or parameter.layout is not torch.strided:
            raise ModelError(
                f"parameters must be dense and floating-point, got {parameter.dtype} with layout "
                f"{parameter.layout}: freeze that one, or train it by another optimizer"
            )
    return shared + others


def outside(model: nn.Module, optimizer: torch.optim.Optimizer) -> Group:
    """Parameters of `optimizer` that are none of `model`."""
    known = {id(p) for p in model.parameters()}
    held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    return [p for key, p in held.items() if key not in known]


def by_depth(parameters: Sequence[torch.nn.Parameter], most: int = MOST_GROUPS) -> list[Group]:
    """Split into at most `most` contiguous groups of similar size, none of them empty."""
    total = sum(p.numel() for p in parameters)
    groups: list[Group] = []
    before, last = 0, -1
    for parameter in parameters:
        # The group is set by where the parameter's middle lies in the whole.
        middle = before + parameter.numel() / 2
        index = min(int(most * middle / max(total, 1)), most - 1)
        if index != last:
            groups.append([])
        groups[-1].append(parameter)
        last = index
        before += parameter.numel()
    return groups


def by_user(
    layer_groups: Iterable[Iterable[torch.nn.Parameter]],
    parameters: Sequence[torch.nn.Parameter],
) -> list[Group]:
    """Check the user's groups: each trainable parameter in exactly one of them.

    Raises
    ------
    ModelError
        If a group is empty, or a parameter is missing, foreign or named twice.
    """
    given = list(layer_groups) if _holds(layer_groups) else [layer_groups]
    groups: list[Group] = []
    for group in given:
        lists = _holds(group)
        members: list[Any] = list(group) if lists else [group]
        wrong = [p for p in members if not (lists and isinstance(p, torch.Tensor))]
        if wrong:
            raise ModelError(
                f"layer_groups must be lists of parameters, got {type(wrong[0]).__name__}: pass a "
                "list for each group, [[...], [...]]"
            )
        groups.append(members)
    named = [id(p) for group in groups for p in group]
    if not groups or any(not group for group in groups):
        raise ModelError("layer_groups must be non-empty lists of parameters, got an empty one")
    if len(set(named)) != len(named):
        raise ModelError("layer_groups names a parameter twice: name each once")
    wanted = {id(p) for p in parameters}
    if set(named) != wanted:
        missing, foreign = len(wanted - set(named)), len(set(named) - wanted)
        raise ModelError(
            f"layer_groups must hold every trainable parameter of the optimizer once: {missing} "
            f"missing, {foreign} not trainable by it"
        )
    return groups


def _holds(value: Any) -> bool:
    """Whether `value` is a list of something, and not one of what can be iterated over besides."""
    return isinstance(value, Iterable) and not isinstance(value, torch.Tensor | str | Mapping)
