"""What a recorded graph was computed from, and what a backward pass asks of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge


def closure_leaves(root: Tensor, known: tuple[Tensor, ...]) -> list[Tensor]:
    """The leaf tensors that ``root`` was computed from, other than through ``known``.

    Raises:
        RuntimeError: a reentrant activation checkpoint hides what it was computed from.
    """
    seen: set[Any] = {tensor.grad_fn for tensor in known if tensor.grad_fn is not None}
    found = []
    waiting = [root.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "CheckpointFunctionBackward":
            raise RuntimeError(
                "f uses reentrant activation checkpointing, which no implicit gradient can pass; "
                "call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        variable = getattr(node, "variable", None)
        if variable is not None and not any(variable is tensor for tensor in known):
            found.append(variable)
        waiting.extend(parent for parent, _ in node.next_functions)
    return found


def refuse_computed_targets(root: Tensor, aliases: tuple[Any, ...], reason: str) -> None:
    """RuntimeError, for this ``reason``, if this pass asks for the gradient of a computed tensor in
    f's closure.

    It is where the pass ends without having come to a leaf or to an input's alias. Its gradient
    would be too small, for what f depends on through it is returned to the leaves.
    """
    seen: set[Any] = set(aliases)
    waiting = [root.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or not _runs(node):
            continue
        seen.add(node)
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        if parents and not any(map(_runs, parents)):
            raise RuntimeError(reason)
        waiting.extend(parents)


def _runs(node: Any) -> bool:
    """Whether the backward pass that is under way comes to ``node``."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch's answer for a leaf whose gradient autograd.grad was asked for
        return True


def refuse_other_leaves(again: Tensor, known: tuple[Tensor, ...], recorded: list[Tensor]) -> None:
    """RuntimeError unless ``again`` was computed from the leaves ``recorded``, and from ``known``.

    Else f is another function by now than the one whose gradient is asked for.
    """
    # By their nodes: hooks on saved tensors may have made other tensors of them.
    before = {get_gradient_edge(leaf).node for leaf in recorded if leaf.requires_grad}
    now = {get_gradient_edge(leaf).node for leaf in closure_leaves(again, known)}
    if len(before) != len(recorded) or before != now:
        raise RuntimeError(
            "with create_graph=True f is evaluated again, and it no longer depends on the same "
            f"parameters and other leaf tensors: {len(recorded)} in the forward pass, {len(now)} "
            f"now, {len(before & now)} of them the same. Leave f, the parameters that it uses and "
            "their requires_grad as they are until the backward pass is over"
        )


def refuse_several(gradient: Tensor, name: str) -> None:
    """NotImplementedError where ``gradient`` stands for several: a solve branches on one."""
    if torch._C._functorch.is_legacy_batchedtensor(gradient):
        raise NotImplementedError(
            f"{name} cannot pass several gradients back at once, as is_grads_batched and "
            "jacobian(vectorize=True) ask for. Take them one by one (vectorize=False), use "
            "backward='phantom', or torch.func.jacrev with backward='implicit'"
        )
