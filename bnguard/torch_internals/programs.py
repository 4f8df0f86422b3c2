"""Whether scripted, traced and exported programs normalise with the batch or with the running statistics."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any, Final

from torch import fx, nn

_NORMALISATIONS: Final = ("aten::batch_norm", "aten::instance_norm")
_TRAINING: Final = 5  # the position of the argument that says so, in both
_ARGUMENTS: Final = ("training", "use_input_stats")


def script_uses_batch(module: Any) -> bool | None:
    """Whether a ScriptModule normalises with the batch in any mode; None if its mode decides, or it is not known."""
    found = {
        list(node.inputs())[_TRAINING].toIValue()
        for node in _nodes(module.inlined_graph)
        if node.kind() in _NORMALISATIONS
    }
    return None if len(found) != 1 else found.pop()


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.nodes():
        yield node
        for block in node.blocks():
            yield from _nodes(block)


def normalised_with_batch(model: nn.Module) -> frozenset[int]:
    """The ids of the running means of those layers that exported programs in a model normalise with the batch."""
    found = set()
    for module in model.modules():
        for node in _fx_nodes(module):
            mean = _mean_in_train_mode(node)
            if mean is not None:
                try:
                    found.add(id(attrgetter(mean)(module)))
                except AttributeError:  # a program that is given its state
                    continue
    return frozenset(found)


def _fx_nodes(module: nn.Module) -> Iterator[fx.Node]:
    for name in ("_graph", "graph"):  # of a GraphModule, and of an unflattened part
        graph = module.__dict__.get(name)
        if isinstance(graph, fx.Graph):
            yield from graph.nodes


def _mean_in_train_mode(node: fx.Node) -> str | None:
    """The attribute that holds the running mean, if a node normalises with its batch."""
    schema = getattr(node.target, "_schema", None)
    names = [] if schema is None else [argument.name for argument in schema.arguments]
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    mean = given.get("running_mean")
    is_in_train_mode = any([given.get(name) is True for name in _ARGUMENTS])
    return str(mean.target) if is_in_train_mode and isinstance(mean, fx.Node) and mean.op == "get_attr" else None
