"""How does this model come to its answer? Every first method asked about one prompt, on one page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pellucid.engine.given import Pair
from pellucid.engine.pausing import progress, quiet
from pellucid.errors import PellucidError
from pellucid.model import Model
from pellucid.views.counterfactual import made
from pellucid.views.evidence import Evidence
from pellucid.views.markup import Html, join, number, percent, quoted, tag, visible
from pellucid.views.page import Section, missing, page
from pellucid.views.question import Question, against, ask, described, short_name
from pellucid.views.sections import (
    agreement,
    answer,
    direct,
    heads,
    layers,
    looks,
    origin,
    patches,
    strongest,
    trust,
    words,
)

LONG = 240  # characters of a prompt that is no longer set as a title


@dataclass(frozen=True)
class Report:
    """A page as HTML that works offline, and its findings as plain sentences."""

    html: str
    findings: list[str]
    sections: tuple[Section, ...]

    def __repr__(self) -> str:
        return f"<Report of {len(self.sections)} sections, {len(self.html) / 1000:.0f} kB>"


def build(
    model: Model,
    prompt: str | Pair,
    *,
    counterfactual: str | Pair | None = None,
    target: str | None = None,
    top: int = 5,
    word: str | int | None = None,
) -> Report:
    """Trace `prompt` through the model and describe what was found.

    A model of pairs (cross-encoders, entailment, next sentence, a question with one of its choices) is given a `pl.Pair`; a
    counterfactual that is a text then stands for the first one. `target` is the answer to explain, by default the model's own: a token, a class or label by name, the text of a span.
    `word` is the word whose label is explained, of a model that labels every word. `counterfactual` is a prompt of as many tokens with
    another answer; without one, pellucid looks for one word to replace, and says so. `top` is how many candidates are
    listed. What a model cannot have is said in its place. InputError for a prompt, target or counterfactual that does
    not fit.

    >>> report = build(model, "The capital of France is")
    >>> Path("report.html").write_text(report.html) > 50_000
    True
    """
    bar: progress[None] = progress(what="report", total=11)
    with bar, quiet():  # one bar for all of its methods
        question = ask(model, prompt, target, counterfactual, top, word)
        if counterfactual is None and (found := made(question)) is not None:
            question = replace(against(question, found.prompt, top, found.how), searched=not found.known)
        bar.step()
        sections = _sections(question, top, bar.step)
    findings = [s.finding for s in sections if s.finding]
    return Report(_page(question, sections), findings, tuple(sections))


def _sections(question: Question, top: int, step: Callable[[], None]) -> list[Section]:
    evidence = Evidence()
    plan = [
        ("answer", "The answer", "What does the model answer?", lambda: answer.answer(question, top)),
        ("words", "The words", words.TITLE, lambda: words.words(question, evidence)),
        ("layers", "The layers", layers.TITLE, lambda: layers.layers(question, top, evidence)),
        ("patches", "The patches", patches.TITLE, lambda: patches.patches(question, evidence)),
        ("direct", "The writers", direct.TITLE, lambda: direct.direct(question, evidence)),
        ("looks", "The attention", looks.TITLE, lambda: looks.looks(question, evidence)),
        ("heads", "The heads", heads.TITLE, lambda: heads.heads(question, evidence)),
        ("agree", "The agreement", agreement.TITLE, lambda: agreement.agree(question, evidence)),
        ("strongest", "The strongest parts", strongest.TITLE, lambda: strongest.strongest(question, evidence)),
        ("trust", "The trust", trust.TITLE, lambda: trust.trust(question, evidence)),
    ]
    made: list[Section] = []
    for id, name, title, section in plan:
        why = question.lacks(id)
        try:
            made.append(missing(id, name, title, why) if why else section())
        except PellucidError as error:
            made.append(missing(id, name, title, str(error).rstrip(".")))
        except RuntimeError as error:  # torch's own: a model whose code allows no gradient, or too little memory
            made.append(missing(id, name, title, f"torch refused ({str(error).splitlines()[0].rstrip('.')})"))
        step()
    made.append(origin.origin(question, made))
    return [replace(s, shell=question.shell, verdict=evidence.verdicts.get(s.id, "")) for s in made]


def _page(question: Question, sections: list[Section]) -> str:
    name = short_name(question.model)
    found = [
        tag("li", tag("span", s.finding), _sure(s), tag("a", s.name.lower(), href=f"#{s.id}"))
        for s in sections
        if s.finding
    ]
    header = join(
        tag("p", tag("b", name), " · ", described(question.model), class_="eyebrow"),
        tag("h1", _asked(question), class_="long" if len(question.text) > LONG else None),
        tag("ul", found, class_="found", id="findings"),
        [tag("p", note, class_="note") for note in question.notes],
    )
    footer = join("Made with pellucid. ", tag("a", "Back to the top", href="#top"))
    made = page(f"{quoted(question.text[:60])} in {name}", header, sections, footer)
    return shared(made, question.model.loaded.name)


def shared(page: str, name: str) -> str:
    """A page for others, whom a folder of this machine tells nothing: a local model is named by its file alone.

    >>> shared("pl.load('/no/such/model.gguf')", "/no/such/model.gguf")  # not here: may be a name on the hub
    "pl.load('/no/such/model.gguf')"
    """
    path = Path(name)
    return page.replace(name, path.name) if len(path.parts) > 1 and path.exists() else page


def _sure(section: Section) -> Html:
    """How far the finding can be trusted, where it has a control: a link to the control."""
    name = section.verdict
    return tag("a", name, href="#trust", class_=f"sure {name.split()[-1]}") if name else tag("span", class_="sure")


def _asked(question: Question) -> Html:
    """The prompt with the answer in its place: at the mask, or at the end."""
    if question.target is None:
        return join(question.text)
    own = question.target.ids == question.options[0].ids
    given = question.kind == "value"
    sure = number(question.scores[0]) if given else percent(question.target.probability)
    sure += "" if own else ", asked for"
    word = visible(question.target.text.strip() or question.target.text)
    answer = tag("span", word, tag("small", sure), class_="answer")
    mask = question.model.tokenizer.mask_token if question.kind == "masked token" else None
    if mask is None:
        return join(question.text, " ", answer)
    before, _, after = question.text.partition(mask)
    return join(before, answer, after)
