"""Does a name that leaves go on working, and say at the caller's line what to use?"""

from __future__ import annotations

import warnings

import pytest

from pellucid.deprecation import deprecated, renamed


def test_an_old_callable_works_and_names_its_successor():
    @deprecated(since="0.2", gone="0.3", use="new")
    def old(x: int) -> int:
        """Double."""
        return 2 * x

    with pytest.warns(DeprecationWarning, match=r"old leaves in pellucid 0\.3 \(said since 0\.2\): use new") as seen:
        assert old(3) == 6
    assert seen[0].filename == __file__ and old.__doc__ == "Double."


def test_an_old_keyword_reaches_the_new_one_and_the_new_one_is_silent():
    @renamed(since="0.2", gone="0.3", n="draws")
    def sampled(text: str, draws: int = 1) -> tuple[str, int]:
        return text, draws

    with pytest.warns(DeprecationWarning, match=r"sampled\(n=\) is draws= now") as seen:
        assert sampled("a", n=3) == ("a", 3)
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sampled("a", draws=2) == ("a", 2) and sampled("a") == ("a", 1)
    with pytest.raises(TypeError, match="draws= or its old name n=, not both"):
        sampled("a", n=1, draws=2)
