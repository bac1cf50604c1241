"""Watching a generation: what is seen of each step, and what may be done about it.

A step is one forward pass and the token chosen after it. In step 0 it computes the whole prompt, later only the newest
token. What is seen at a site belongs to the position from whose logits the step's token is chosen: in step 0 the last
token of the prompt, in step i the token that step i - 1 wrote. So there are as many steps as tokens, with a cache and
without one, and the values are those of one run over prompt and answer.

A `Watch` names sites and a function of the `Step`. As `when=` of an edit the function says in which rows the edit acts; as
`when=` of `generate` it may `record` numbers and return what happens to single rows: `Stop`, `Say` or `Redirect`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.errors import InputError, nearest


@dataclass(eq=False)
class Step:
    """What a watcher sees; `row` counts the rows of the batch, which stay in their places when some have ended.

    index: the number of tokens written so far; running [row]: which rows go on; given [row]: which of them are being given
    a text; prompt, mask [row, position]: the prompts' tokens, padded on the left; logits [row, vocabulary]: the model's own
    for the next token (None where an edit's condition is asked: they are not computed yet); state: the watcher's own
    dictionary, empty when a generation begins.
    """

    index: int
    prompt: Tensor
    mask: Tensor
    running: Tensor
    given: Tensor
    logits: Tensor | None = None
    state: dict[str, Any] = field(default_factory=dict)
    _written: Sequence[Tensor] = ()
    _values: Mapping[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    _record: Callable[[Tensor], None] | None = None

    @cached_property
    def tokens(self) -> Tensor:
        """[row, index] the tokens written so far; behind a row's end padding."""
        return torch.stack([*self._written], 1) if self._written else self.prompt.new_zeros(len(self.prompt), 0)

    def __getitem__(self, site: Site | str) -> Tensor:
        """[row, ...] the values at a watched site, at the position from which the next token is chosen."""
        values, real = self._found(site)
        if real is not None:
            raise InputError(
                f"{str(site)!r} is not of what is being written: read all its positions, step.new({site!r})"
            )
        return values[:, -1]

    def new(self, site: Site | str) -> Tensor:
        """[row, position, ...] the values at every position this step computed: of the prompt in step 0 (where `mask` is
        False on padding), later of one token; at a site of the encoder always those of its text."""
        return self._found(site)[0]

    def real(self, site: Site | str) -> Tensor:
        """[row, position] which positions of `new(site)` hold real tokens."""
        values, real = self._found(site)
        if real is not None:
            return real
        return self.mask.bool() if self.index == 0 else torch.ones(values.shape[:2], dtype=torch.bool)

    def record(self, values: Any) -> None:
        """Keep a number (or several) for each row, [row, ...]: `generated.records`. Once in a step at most."""
        if self._record is None:
            raise InputError("an edit's condition records nothing: its answers are in `generated.fired`")
        values = torch.as_tensor(values).detach()
        if not values.ndim or len(values) != len(self.prompt):
            raise InputError(f"what is recorded has a row for each of the {len(self.prompt)}, not {list(values.shape)}")
        self._record(values.clone())

    def _found(self, site: Site | str) -> tuple[Tensor, Tensor | None]:
        name = str(Site.parse(site))
        if name not in self._values:
            raise InputError(f"{name!r} is not watched: name it in pl.Watch([...], ...){nearest(name, self._values)}")
        return self._values[name]


@dataclass(frozen=True, eq=False, repr=False)
class Watch:
    """Some sites, and a function that is asked about them at every step of a generation.

    sites: one or several addresses, selectors allowed, without '@'. function: given the `Step`. As an edit's `when` it
    returns a truth value for all rows, or [row], and is asked as soon as its sites are computed: what is computed after that
    in the same step obeys already. In `generate(when=...)` it is asked after the pass, and returns None, an action for all
    rows, a dictionary of actions by row, or a list with an action or None for each row. It may run the model.
    """

    sites: Site | str | Sequence[Site | str]
    function: Callable[[Step], Any]
    name: str = ""

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise InputError(f"a watcher needs a function of the step, not {type(self.function).__name__}")
        given = [self.sites] if isinstance(self.sites, Site | str) else list(self.sites)
        parsed = tuple(Site.parse(site) for site in given)
        at = next((site for site in parsed if site.at is not None), None)
        if at is not None:
            raise InputError(f"{str(at)!r}: a watcher sees the position that is being written, so leave '@' out")
        object.__setattr__(self, "sites", parsed)

    def __repr__(self) -> str:
        own = getattr(self.function, "__name__", type(self.function).__name__).strip("<>")
        named = f", name={self.name!r}" if self.name else ""
        return f"Watch({[str(site) for site in self.watched]}, <{own}>{named})"

    @property
    def watched(self) -> tuple[Site, ...]:
        """The sites, as they were parsed."""
        return self.sites  # type: ignore[return-value]

    @property
    def label(self) -> str:
        """What its answers are called."""
        own = getattr(self.function, "__name__", "<lambda>")
        return self.name or ("watch" if own == "<lambda>" else own)


# ---- what may be done


@dataclass(frozen=True, eq=False)
class Action:
    """What happens to a row from the token on that this step would choose."""

    def at(self, rows: Tensor) -> dict[int, Action]:
        """This action for the rows where `rows` [row] holds."""
        return dict.fromkeys(torch.as_tensor(rows).nonzero().flatten().tolist(), self)


@dataclass(frozen=True, eq=False)
class Stop(Action):
    """The row ends: this step's token is not written.

    >>> Stop("too sure of itself").at(torch.tensor([False, True]))
    {1: Stop(reason='too sure of itself')}
    """

    reason: str = ""


@dataclass(frozen=True, eq=False)
class Say(Action):
    """The row is given a text (or token ids) from this token on; `then` it ends, or goes on by itself.

    The text is cut where `max_new_tokens` ends. A row that is being given a text takes no other before its end.
    """

    text: str | Sequence[int]
    then: Literal["end", "go on"] = "end"
    reason: str = ""

    def __post_init__(self) -> None:
        if self.then not in ("end", "go on"):
            raise InputError(f"then={self.then!r}: expected 'end' or 'go on'")


@dataclass(frozen=True, eq=False)
class Redirect(Action):
    """The row goes on under these edits instead of those it had: all that is computed after this step obeys them.

    `beside`: it keeps those it had, too. Then this decides nothing about the row: what another watcher says is done as well.
    """

    edits: Any = ()
    reason: str = ""
    beside: bool = False


class Guard(Protocol):
    """A monitor at work in one generation: its watcher, and afterwards what all of them saw."""

    watch: Watch

    @classmethod
    def told(cls, guards: Sequence[Any], generated: Any) -> Any:
        """What the guards of a generation saw and did."""


class Monitored(Protocol):
    """What `generate(monitors=)` takes, `pellucid.safety` makes some: it begins anew in every generation."""

    def begin(self, model: Any) -> Guard: ...


def guards_of(monitors: Any, model: Any) -> tuple[Guard, ...]:
    """Every monitor at its beginning; InputError for what is none."""
    given = [monitors] if hasattr(monitors, "begin") else monitors
    if not isinstance(given, Sequence) or not all(hasattr(each, "begin") for each in given):
        raise InputError(f"monitors={monitors!r}: expected pl.safety.Monitor(...), or a list of them")
    return tuple(each.begin(model) for each in given)


def as_watch(when: Any, what: str) -> Watch:
    """A condition as a watcher: a function alone watches no site."""
    if isinstance(when, Watch):
        return when
    if not callable(when):
        raise InputError(f"{what} is {when!r}: expected pl.Watch(sites, function), or a function of the step")
    return Watch((), when)


def as_rows(said: Any, like: Tensor) -> Tensor:
    """A condition's answer as [row] truth values."""
    try:
        rows = torch.as_tensor(said).to(like.device).bool()
        return (
            rows.reshape(-1).expand(len(like))
            if rows.ndim < 2 or rows.numel() == len(like)
            else rows.expand(like.shape)
        )
    except (TypeError, ValueError, RuntimeError):
        shown = list(said.shape) if isinstance(said, Tensor) else repr(said)
        raise InputError(
            f"a condition said {shown}: expected a truth value, or one for each of {len(like)} rows"
        ) from None


def as_actions(said: Any, rows: int) -> dict[int, Action]:
    """What a watcher returned, by row."""
    if said is None:
        return {}
    if isinstance(said, Action):
        return dict.fromkeys(range(rows), said)
    if isinstance(said, Sequence) and not isinstance(said, str) and len(said) == rows:
        said = dict(enumerate(said))
    if not isinstance(said, Mapping) or not all(a is None or isinstance(a, Action) for a in said.values()):
        raise InputError(
            f"a watcher returned {type(said).__name__}: expected None, pl.Stop(...), pl.Say(...) or pl.Redirect(...) for all "
            f"rows, a dictionary of them by row, or a list with one or None for each of {rows} rows"
        )
    outside = next((row for row in said if not isinstance(row, int) or not 0 <= row < rows), None)
    if outside is not None:
        raise InputError(f"a watcher acts on row {outside!r}: the rows are 0 to {rows - 1}")
    return {row: action for row, action in said.items() if action is not None}


def watchers(when: Any) -> tuple[Watch, ...]:
    """One or several watchers; InputError for anything else."""
    given = [when] if isinstance(when, Watch) or callable(when) else when
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise InputError(f"when={when!r}: expected pl.Watch(sites, function), or a list of them")
    return tuple(as_watch(each, "when=") for each in given)
