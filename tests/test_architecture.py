"""How the package is built: what may import what, where torch's private names are, and how large things grow."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

import bnguard
from bnguard.guard.policy import POLICIES
from tests.families import KEPT

ROOT = Path(__file__).parents[1]
PACKAGE = Path(bnguard.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
EACH_FILE = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())

# The base classes of the layers whose updates bnguard predicts.
ALLOWED = {"layers/kinds.py": {"_BatchNorm", "_InstanceNorm", "_NormBase"}}
PRIVATE = re.compile(r"torch(\.\w+)*\._[a-zA-Z]\w*(\.\w+)*")


@pytest.mark.parametrize("contract", ["layers", "cycles"])
def test_imports_obey_the_contract(contract: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Imports point one way through the packages, and siblings do not import each other in a circle."""
    status = lint_imports(str(ROOT / "pyproject.toml"), (contract,), no_cache=True, no_logo=True)
    assert status == 0, capsys.readouterr().out


@EACH_FILE
def test_private_names_of_torch_are_in_torch_internals(path: Path) -> None:
    """A release of torch that renames one changes files in ``torch_internals/`` only."""
    name = path.relative_to(PACKAGE).as_posix()
    found = set(private_names(ast.parse(path.read_text(encoding="utf-8"))))
    wrong = {found_name for found_name in found if not ALLOWED.get(name, set()) & set(found_name.split("."))}
    assert name.startswith("torch_internals/") or not wrong


@pytest.mark.parametrize("file", KEPT)
def test_families_of_slow_tests_exist(file: str) -> None:
    """A renamed test does not silently take all its cases into the default run."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert KEPT[file].keys() <= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@EACH_FILE
def test_file_is_short(path: Path) -> None:
    """A file has at most 400 lines."""
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 400


def test_package_is_small() -> None:
    """The package has at most 16,372 lines of code, blank lines, comments and docstrings aside; to get smaller."""
    lines = sum(len(code_lines(path.read_text(encoding="utf-8"))) for path in FILES)
    assert lines <= 16_372


# Options that contradict each other, and a switch of the plugin with the name of a policy.
COMPARED = {"guard/options.py": {"rollback"}, "pytest_plugin/__init__.py": {"warn"}}


@EACH_FILE
def test_policies_are_asked_for_their_properties(path: Path) -> None:
    """A new policy is one record: no other file compares one with a name."""
    compares = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Compare)]
    sides = [side for node in compares for side in (node.left, *node.comparators) if isinstance(side, ast.Constant)]
    found = {side.value for side in sides} & POLICIES.keys()
    assert found <= COMPARED.get(path.relative_to(PACKAGE).as_posix(), set())


@pytest.mark.parametrize("name", ["audit", "diff", "frozen", "strict", "watch"])
def test_no_submodule_replaces_a_public_object(name: str) -> None:
    """Importing a submodule sets it as an attribute of the package, in place of the function or class of that name."""
    assert not (PACKAGE / name).exists()
    assert not (PACKAGE / f"{name}.py").exists()


def private_names(tree: ast.AST) -> Iterator[str]:
    """Private names of torch that code imports, reads, or looks up by a string."""
    imported = {"torch": "torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                imported[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
                yield from private(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield from private(f"{node.module}.{alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield from private(dotted(node, imported))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from private(node.value)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            owner, name = node.args[:2]
            if isinstance(name, ast.Constant):
                yield from private(f"{dotted(owner, imported)}.{name.value}")


def private(name: str) -> list[str]:
    """The name, if it is one of torch's private ones."""
    return [name] if PRIVATE.fullmatch(name) else []


def dotted(node: ast.AST, imported: dict[str, str]) -> str:
    """The full name of what an expression such as ``F.batch_norm`` refers to, or ``""`` for any other expression."""
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value, imported)
        return owner and f"{owner}.{node.attr}"
    return imported.get(node.id, "") if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("import torch._dynamo", {"torch._dynamo"}),
        ("from torch._C import _functorch", {"torch._C._functorch"}),
        ("from torch.nn.modules.module import _global_hooks", {"torch.nn.modules.module._global_hooks"}),
        ("torch._C._get_tracing_state()", {"torch._C", "torch._C._get_tracing_state"}),
        ("from torch.nn.modules import module as m\nm._hooks", {"torch.nn.modules.module._hooks"}),
        ("sys.modules.get('torch._dynamo')", {"torch._dynamo"}),
        ("getattr(torch.autograd, '_engine')", {"torch.autograd._engine"}),
        ("module._buffers, layer._parameters, torch.__version__, self._torch, torch.nn.functional", set()),
        ("'torch.compile calls torch._dynamo'", set()),
    ],
)
def test_private_names_are_found(code: str, names: set[str]) -> None:
    """However code reaches a private name of torch; a module's own tables are no such names."""
    assert set(private_names(ast.parse(code))) == names


def code_lines(source: str) -> set[int]:
    """Numbers of the lines with code on them."""
    ignored = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in ignored:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, node.end_lineno + 1))
    return lines


def test_lines_of_code_are_counted() -> None:
    """Docstrings, comments and blank lines are no code."""
    source = '"""One\n\ntwo."""\n\n# three\nx = """\n\n"""  # four\n\n\ndef f():\n    """Five."""\n    g()\n'
    assert code_lines(source) == {6, 7, 8, 11, 13}
