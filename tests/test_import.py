"""`import pellucid` costs next to nothing and offers every name."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pellucid

HEAVY = ("torch", "transformers", "xarray", "typer", "rich")


def modules_after(statement: str) -> set[str]:
    """The modules a fresh interpreter holds after a statement."""
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).split())


def test_importing_pellucid_loads_nothing_heavy():
    assert not modules_after("import pellucid; dir(pellucid); pellucid.__version__").intersection(HEAVY)


def test_the_command_line_starts_without_torch():
    assert not modules_after("import pellucid.cli").intersection({"torch", "transformers", "xarray"})


def test_a_name_loads_its_module_when_it_is_used():
    assert "torch" in modules_after("import pellucid; pellucid.load")


@pytest.mark.parametrize("name", dir(pellucid))
def test_every_listed_name_exists(name):
    assert getattr(pellucid, name) is not None


def test_type_checkers_see_the_names_that_load_lazily():
    tree = ast.parse(Path(pellucid.__file__).read_text())
    seen = {alias.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(pellucid._HOME) <= seen


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        pellucid.laod  # noqa: B018
