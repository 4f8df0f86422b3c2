"""The explanation of each code: its example has the finding, and has it no longer after the remedy."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import bnguard
from bnguard.findings.codes import CODES
from bnguard.findings.explanations import Explanation, explanation_of
from bnguard.findings.rules import RULES
from tests import forks

IN_RANKS = "BN015"

# For each code a part of the example, and what makes it right.
REMEDIES = {
    "BN001": ("model.train()\n", "model.train()\nbackbone.eval()\n"),
    "BN002": ("\nvalidate(", "\nmodel.eval()\nvalidate("),
    "BN003": (
        "    score_of_real = model(real)\n    score_of_fake = model(fake)\n",
        "    score_of_real, score_of_fake = model(torch.cat([real, fake])).chunk(2)\n",
    ),
    "BN004": ("nn.Linear(4, 4), norm)", "nn.Linear(4, 4), nn.BatchNorm1d(4))"),
    "BN005": (
        "use_reentrant=False",
        "use_reentrant=False, context_fn=__import__('bnguard').recompute_frozen(block)",
    ),
    "BN006": ("torch.randn(2, 4)", "torch.randn(16, 4)"),
    "BN007": ("momentum=0.9", "momentum=0.1"),
    "BN008": ("    model.train()  #", "    model.train(), model[1].eval()  #"),
    "BN009": (
        "model(torch.randn(16, 4, dtype=torch.bfloat16))",
        "model[1].float()\nmodel(torch.randn(16, 4, dtype=torch.bfloat16))",
    ),
    "BN010": ("set_to_none=False", "set_to_none=True"),
    "BN011": ("layer.track_running_stats = False", "layer.eval()"),
    "BN012": ("model(images)", "model(torch.nan_to_num(images))"),
    "BN013": (
        "model.train()\n",
        "evaluated.square().sum().backward()\nevaluated = evaluated.detach()\nmodel.train()\n",
    ),
    "BN014": ("model.eval()\n", "torch.optim.swa_utils.update_bn([torch.randn(16, 4)], model)\nmodel.eval()\n"),
    "BN016": (
        "        teacher(torch",
        "        teacher[1].load_state_dict(model[1].state_dict())\n        teacher(torch",
    ),
    "BN017": ("norm.track_running_stats = False\n", ""),
    "BN018": ("    model[1].running_mean.add_(1.0)\n", ""),
    "BN019": ("layer(torch", "layer.momentum = 0.1\nlayer(torch"),
    IN_RANKS: (
        "    optimizer.step()\n",
        "    optimizer.step()\nfor buffer in model.buffers():\n    dist.all_reduce(buffer)\n",
    ),
}


def found(program: str, folder: Path) -> set[str]:
    """The codes that a program has under ``watch``."""
    names: dict[str, Any] = {}  # which keep its models alive, as a script does
    with bnguard.watch() as record:
        exec(compile(program, str(folder / "example.py"), "exec"), names)
    return {finding.code for finding in record.findings}


def found_in_ranks(program: str, folder: Path) -> set[str]:
    """The codes that a program has under ``bnguard run``, in two processes."""
    (folder / "train.py").write_text(program)
    command = ["tests.forked_ranks", 2, "bnguard", "run", "--json", "out.json", "train.py"]
    done = forks.run("-m", *command, cwd=folder)
    assert done.returncode == 0, done.stderr
    return {finding["code"] for finding in json.loads((folder / "out.json").read_text())["findings"]}


@pytest.mark.parametrize("code", CODES)
def test_example_has_its_finding_and_no_other(code: str, tmp_path: Path) -> None:
    """It is a complete program."""
    run = found_in_ranks if code == IN_RANKS else found
    assert run(explanation_of(code).example, tmp_path) == {code}


@pytest.mark.parametrize(
    "code", [pytest.param(code, marks=[pytest.mark.slow] if code == IN_RANKS else []) for code in CODES]
)
def test_example_with_the_remedy_has_no_finding(code: str, tmp_path: Path) -> None:
    """It looks much like the mistake."""
    run = found_in_ranks if code == IN_RANKS else found
    example = explanation_of(code).example
    part, remedy = REMEDIES[code]
    assert example.count(part) == 1
    assert run(example.replace(part, remedy), tmp_path) == set()


@pytest.mark.parametrize("code", CODES)
def test_explanation_is_complete(code: str) -> None:
    """It is what the rule says; prose ends with a full stop, and a line of the example fits into 80 columns."""
    explanation, rule = explanation_of(code), RULES[code]
    assert explanation.remedies == rule.remedies
    assert (explanation.meaning, explanation.harm, explanation.fine) == (rule.meaning, rule.harm, rule.fine)
    for text in (explanation.meaning, explanation.harm, explanation.fine, *explanation.remedies):
        assert text.endswith(".")
        assert "  " not in text
    assert max(map(len, explanation.example.splitlines())) <= 78
    assert rule.example.split() == explanation.example.split()
    ast.parse(explanation.example)


def test_explanations_are_read_without_torch() -> None:
    """So that they come at once."""
    code = "import sys, bnguard.findings.explanations as e; e.explanation_of('BN001'); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_explanations_have_the_fields_that_rules_have() -> None:
    """A new field is documented with the rules."""
    for field in Explanation._fields:
        assert f"    {field}: " in inspect.cleandoc(sys.modules["bnguard.findings.rule"].Rule.__doc__ or "")
