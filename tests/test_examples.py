"""Examples run: those that cannot say why, and they are few."""

from __future__ import annotations

import doctest

import pytest

from tests import examples
from tests.skipped import counted, skipped


def test_an_example_that_is_not_run_says_what_it_needs_and_few_need_what_no_test_has() -> None:
    found = list(skipped())
    assert all(reason for _, reason in found), found
    assert len(found) <= 5, found  # a number that only falls
    assert counted().startswith("examples not run: ")


def test_a_mark_without_a_reason_is_found(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    lines = [
        "# doctest: +SKIP",
        "# doctest: +ELLIPSIS, +SKIP",
        "# needs a cluster  # doctest: +SKIP",
        "# doctest: +ELLIPSIS",
    ]
    (tmp_path / "README.md").write_text("\n".join(f">>> f()  {line}" for line in lines))
    monkeypatch.setattr("tests.skipped.ROOT", tmp_path)
    assert list(skipped()) == [("README.md:1", ""), ("README.md:2", ""), ("README.md:3", "needs a cluster")]
    assert counted() == "examples not run: 1 needs a cluster, 2 no reason"


def test_examples_get_the_names_that_they_use_and_do_not_make() -> None:
    parse = doctest.DocTestParser().get_examples
    found = parse(
        ">>> a = f(b, [c for c in b])\n>>> a.d, sorted(e), g  # doctest: +SKIP\n>>> h = lambda x: (x, b)\n>>> i\n"
    )
    assert examples.needed(found, {"f"}) == ["b", "i"]
