"""What every test file shares: the devices, and the proof that no guard outlives its test."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

# Read by cuBLAS when it starts; without it deterministic algorithms refuse matrix products.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The CPU and, where there is one, a GPU; there results are deterministic, so that two runs can be compared."""
    if request.param == "cpu":
        yield torch.device("cpu")
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield torch.device(request.param)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:
    """After each test no layer is claimed, no parameter held, no forward exchanged."""
    yield
    modules = [sys.modules.get(f"bnguard.{name}") for name in ("_hooks", "_affine", "_hold")]
    tables = [getattr(module, name, None) for module, name in zip(modules, ("_sentries", "_held", "_exchange_calls"))]
    left = [table for table in tables if table]
    sizes = [len(table) for table in left]
    for table in left:  # one failure must not become many
        table.clear()
    assert not sizes, "a guard outlived its test"
