"""What every test file shares: the devices, and the proof that no guard outlives its test."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from torch.nn.modules import module as torch_module

from tests.suites import Keeper

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
    """After each test no layer is claimed, no parameter held, no forward exchanged, and no hook sees all modules."""
    Keeper.put_back()
    yield
    hooks = torch_module._global_forward_pre_hooks
    assert hooks.pop("bnguard", None) is None, "a suite's hook outlived its test"
    tables = {"guard.layer_guard": "sentries", "guard.affine": "_held", "guard.hold": "_exchange_calls"}
    left = [getattr(sys.modules.get(f"bnguard.{module}"), table, None) for module, table in tables.items()]
    left = [table for table in left if table]
    sizes = [len(table) for table in left]
    for table in left:  # one failure must not become many
        table.clear()
    assert not sizes, "a guard outlived its test"
