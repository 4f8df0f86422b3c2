"""torch_geometric: its norms, its models with each norm, and its layers that own running statistics."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import conv, models, norm

from tests.zoo.case import Case, Inputs, call

__all__ = ["cases"]

NODES, CHANNELS, EDGES = 12, 8, 40


def cases() -> Iterator[Case]:
    """The norms alone, models with norms, and the rest of the models."""
    for name in norm.__all__:
        cls = getattr(norm, name)
        if "Norm" not in name:
            continue
        parameters = inspect.signature(cls).parameters
        yield Case(name, partial(_norm, cls, {}), _norm_inputs)
        for option, value in (("track_running_stats", True), ("track_running_stats", False), ("affine", False)):
            if option in parameters:
                yield Case(f"{name}, {option}={value}", partial(_norm, cls, {option: value}), _norm_inputs)
    for name in ("GCN", "GraphSAGE", "GIN", "GAT", "EdgeCNN"):
        for normalisation in (None, "BatchNorm", "InstanceNorm", "DiffGroupNorm"):
            options = {"norm": normalisation, "norm_kwargs": _norm_options(normalisation), "dropout": 0.2, "jk": "cat"}
            build = partial(getattr(models, name), CHANNELS, 16, 3, 4, **options)
            yield Case(f"{name}, {normalisation}", build, _graph)
    pna = {"aggregators": ["mean", "std"], "scalers": ["identity"], "deg": torch.tensor([1, 3, 5, 2])}
    yield Case("PNA, BatchNorm", partial(models.PNA, CHANNELS, 16, 2, 4, norm="BatchNorm", **pna), _graph)
    for normalisation in (None, "batch_norm", "layer_norm"):
        build = partial(models.MLP, [CHANNELS, 16, 16, 4], dropout=0.3, norm=normalisation)
        yield Case(f"MLP, {normalisation}", build, _nodes)
    for batch_norm in (False, True):
        yield Case(f"CGConv, {batch_norm}", partial(_one, conv.CGConv, CHANNELS, batch_norm=batch_norm), _graph)
    for normalisation in ("batch", "layer", "instance"):
        yield Case(
            f"GENConv, {normalisation}", partial(_one, conv.GENConv, CHANNELS, CHANNELS, norm=normalisation), _graph
        )
    yield Case("XConv", partial(_one, conv.XConv, CHANNELS, 8, 3, 4, 8), _points)
    build = partial(
        models.DeepGCNLayer, conv.GCNConv(CHANNELS, CHANNELS), nn.BatchNorm1d(CHANNELS), nn.ReLU(), dropout=0.2
    )
    for block in ("res+", "res", "dense", "plain"):
        yield Case(f"DeepGCNLayer, {block}", partial(build, block=block), _graph)
    yield Case("DeepGCNLayer, checkpointed", partial(build, ckpt_grad=True), _graph)
    yield Case("GraphUNet", partial(models.GraphUNet, CHANNELS, 16, 4, 2), _graph)
    yield Case("LINKX", partial(models.LINKX, NODES, CHANNELS, 16, 4, 2, 2, 2), _graph)
    yield Case("SGFormer", partial(models.SGFormer, CHANNELS, 16, 4), _graph_of_batch)
    yield Case("Polynormer", partial(models.Polynormer, CHANNELS, 16, 4), _graph_of_batch)
    yield Case("PMLP", partial(models.PMLP, CHANNELS, 16, 4, 3), _graph)
    yield Case("GNNFF", partial(models.GNNFF, 8, 8, 2), _molecule)
    yield Case("SchNet", partial(models.SchNet, 16, 16, 2, interaction_graph=_all_pairs), _molecule)
    yield Case("AttentiveFP", partial(models.AttentiveFP, CHANNELS, 16, 4, 3, 2, 2), _graph_with_attributes)
    yield Case("GPSE", partial(models.GPSE, dim_inner=16, layers_mp=2), _gpse)
    for kind in ("mlp", "linear"):
        build = partial(models.GPSENodeEncoder, 16, CHANNELS, 8, model_type=kind, norm_type="batchnorm")
        yield Case(f"GPSENodeEncoder, {kind}", build, _encoder)
    yield Case("TGNMemory", partial(_tgn), lambda _: [lambda: call(torch.arange(4))])


def _norm_options(name: str | None) -> dict[str, Any] | None:
    return {"InstanceNorm": {"track_running_stats": True}, "DiffGroupNorm": {"groups": 2}}.get(name or "")


class _One(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any) -> Any:
        return self.layer(*args)


def _one(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    return _One(cls(*args, **kwargs))


def _norm(cls: Any, options: dict[str, Any]) -> nn.Module:
    parameters = inspect.signature(cls).parameters
    sizes = {"in_channels": CHANNELS, "num_types": 2, "groups": 2}
    return _One(cls(**{name: size for name, size in sizes.items() if name in parameters}, **options))


def _edges() -> Tensor:
    return torch.randint(0, NODES, (2, EDGES))


def _nodes(model: nn.Module) -> list[Callable[[], Inputs]]:
    return [lambda: call(torch.randn(NODES, CHANNELS))]


def _norm_inputs(model: nn.Module) -> list[Callable[[], Inputs]]:
    types = torch.arange(NODES) % 2
    return [
        lambda: call(torch.randn(NODES, CHANNELS)),
        lambda: call(torch.randn(NODES, CHANNELS), types),
        lambda: call(torch.randn(NODES, CHANNELS), torch.randn(NODES, CHANNELS)),
    ]


def _graph(model: nn.Module) -> list[Callable[[], Inputs]]:
    return [lambda: call(torch.randn(NODES, CHANNELS), _edges())]


def _graph_of_batch(model: nn.Module) -> list[Callable[[], Inputs]]:
    return [lambda: call(torch.randn(NODES, CHANNELS), _edges(), torch.arange(NODES) // 6)]


def _graph_with_attributes(model: nn.Module) -> list[Callable[[], Inputs]]:
    batch = torch.arange(NODES) // 6
    return [lambda: call(torch.randn(NODES, CHANNELS), _edges(), torch.randn(EDGES, 3), batch)]


def _points(model: nn.Module) -> list[Callable[[], Inputs]]:
    return [lambda: call(torch.randn(NODES, CHANNELS), torch.randn(NODES, 3), torch.zeros(NODES, dtype=torch.long))]


def _molecule(model: nn.Module) -> list[Callable[[], Inputs]]:
    return [lambda: call(torch.randint(1, 9, (NODES,)), torch.randn(NODES, 3), torch.arange(NODES) // 6)]


def _gpse(model: nn.Module) -> list[Callable[[], Inputs]]:
    batch = torch.arange(NODES) // 6
    return [
        lambda: call(torch.randn(NODES, 20), _edges(), batch),
        lambda: call(
            Data(
                x=torch.randn(NODES, 20),
                edge_index=_edges(),
                batch=batch,
                y=torch.randn(NODES, 51),
                y_graph=torch.randn(2, 11),
            )
        ),
    ]


def _encoder(model: nn.Module) -> list[Callable[[], Inputs]]:
    return [
        lambda: call(torch.randn(NODES, 16), torch.randn(NODES, CHANNELS)),
        lambda: call(torch.randn(NODES, CHANNELS)),
    ]


def _all_pairs(positions: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    edges = ((batch[:, None] == batch) & ~torch.eye(len(batch), dtype=torch.bool)).nonzero().T
    return edges, (positions[edges[0]] - positions[edges[1]]).norm(dim=-1)


def _tgn() -> nn.Module:
    from torch_geometric.nn.models.tgn import IdentityMessage, LastAggregator

    return models.TGNMemory(NODES, 4, 8, 6, IdentityMessage(4, 8, 6), LastAggregator())
