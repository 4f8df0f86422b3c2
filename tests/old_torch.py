"""What an older torch cannot do, as the reasons for which tests are skipped there."""

from __future__ import annotations

import pytest
import torch
from packaging.version import Version

RELEASE = Version(torch.__version__).release[:2]
# What checkpoint() in torch 2.4 makes torch itself warn about.
OLD_AUTOCAST = "`torch.cpu.amp.autocast(args...)` is deprecated."
guards_graphs = RELEASE >= (2, 12)

needs_guarded_graphs = pytest.mark.skipif(
    not guards_graphs, reason="before torch 2.12 a guarded layer in a graph is refused: test_refused_graphs.py"
)
needs_traced_layers = pytest.mark.skipif(
    RELEASE < (2, 5), reason="before torch 2.5 a graph calls torch's own layers without tracing them"
)


def skip_refused_export(tool: str) -> None:
    """Skips a test that exports a guarded model through the compiler."""
    if tool == "export-strict" and not guards_graphs:
        pytest.skip("before torch 2.12 a guarded layer in a graph is refused, and strict export makes one")
