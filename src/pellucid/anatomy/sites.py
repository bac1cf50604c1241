"""Sites: parseable, printable, hashable addresses of a model's tensors.

    embed    layers.5.resid_post    layers.5.attn.heads.9.q    decoder.layers.2.cross.pattern    mlp.neurons.1234
    embed.tokens    layers.*.resid_pre    layers.2:6.mlp.out    layers.-1.attn.z    layers.3.resid_post@-1    ...@'John'

`*`, `2:6`, `1,4` and `-1` select layers, units and positions; `@` narrows to positions, counted on real (not padding)
tokens: an index, a slice, a quoted token or the name of a span. TransformerLens names are understood as aliases.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from operator import index

from pellucid.errors import SiteError, nearest

TOKENS = ("batch", "position", "d_model")
HEADS = ("batch", "position", "head", "d_head")
PATTERN = ("batch", "head", "query", "key")

# Every part of a block: its dimensions. A unit of a part is one index of the dimension named in UNITS.
PARTS: dict[str, tuple[str, ...]] = {
    "resid_pre": TOKENS,
    "resid_mid": TOKENS,
    "resid_post": TOKENS,
    **{
        f"{a}.{p}": dims
        for a in ("attn", "cross")
        for p, dims in {
            "q": HEADS,
            "k": ("batch", "position", "kv_head", "d_head"),
            "v": ("batch", "position", "kv_head", "d_head"),
            "z": HEADS,
            "z_out": HEADS,
            "scores": PATTERN,
            "pattern": PATTERN,
            "out": TOKENS,
        }.items()
    },
    "mlp.out": TOKENS,
    "mlp.neurons": ("batch", "position", "neuron"),
    "mlp.router": ("batch", "position", "expert"),
    "mixer.out": TOKENS,
}
WHOLE = {
    **dict.fromkeys(("embed", "embed.tokens", "embed.positions", "final_norm"), TOKENS),
    "logits": ("batch", "position", "vocabulary"),
}
UNITS = {"head", "kv_head", "neuron", "expert", "d_model"}
HEAD_PORTS = ("q", "k", "v", "z", "z_out", "scores", "pattern", "out")
EXPERT_PORTS = ("neurons", "out")

Index = int | str | None  # a number, a selector such as "*" or "2:6", or nothing
Position = int | str | None  # a number, or "*", "2:6", "1,4", "'token'", "span"

_LENS = {
    "hook_resid_pre": "resid_pre", "hook_resid_mid": "resid_mid", "hook_resid_post": "resid_post",
    "hook_attn_out": "attn.out", "hook_mlp_out": "mlp.out",
    "attn.hook_rot_q": "attn.q", "attn.hook_rot_k": "attn.k", "attn.hook_v": "attn.v", "attn.hook_z": "attn.z", "attn.hook_attn_scores": "attn.scores",
    "attn.hook_pattern": "attn.pattern", "mlp.hook_post": "mlp.neurons",
}  # fmt: skip
# TransformerLens has these before the rotation, and the rotated ones beside them; here they are met after it.
_UNROTATED = {"attn.hook_q": "attn.q", "attn.hook_k": "attn.k"}
PLAIN = {int, str, type(None)}
_SELECTOR = re.compile(r"-?\d+|\*|(-?\d+)?:(-?\d+)?|\d+(,\d+)+")


@dataclass(frozen=True, repr=False)
class Site:
    """An address. `layer`, `unit` and `at` may be selectors; a site without any is concrete.

    >>> site = Site.parse("layers.5.attn.heads.9.q@-1")
    >>> site.part, site.layer, site.unit, site.at
    ('attn.q', 5, 9, -1)
    >>> print(site)
    layers.5.attn.heads.9.q@-1
    >>> print(Site.parse("blocks.3.attn.hook_z"))
    layers.3.attn.z
    """

    part: str
    layer: Index = None
    stack: str = ""
    unit: Index = None
    port: str = ""  # "heads" or "experts.neurons"...: how the unit was addressed, kept for printing
    at: Position = None

    def __post_init__(self) -> None:
        for name in ("layer", "unit", "at"):
            value = getattr(self, name)
            if type(value) not in PLAIN and hasattr(value, "__index__"):  # numpy's integers print as such
                object.__setattr__(self, name, index(value))

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """Read an address; SiteError names what was not understood and the nearest names."""
        if isinstance(text, Site):
            return text
        if not isinstance(text, str):
            raise SiteError(f"{text!r} is no site: give its address, such as 'layers.0.resid_post'")
        path, at = _split_position(text)
        stack, path = _split_stack(path)
        if path in WHOLE:
            return cls(path, stack=stack, at=at)
        match = re.fullmatch(r"(?:layers|blocks)\.([^.]+)\.(.+)", path)
        if match is None:
            raise SiteError(
                f"cannot read the site {text!r}: expected 'layers.N.PART', 'embed', 'final_norm' or 'logits'"
                + nearest(path, [*WHOLE, *(f"layers.0.{p}" for p in PARTS)])
            )
        if match[2] in _UNROTATED:
            name = _UNROTATED[match[2]]
            raise SiteError(
                f"{text!r} is before the rotation of rotary models, where nothing is met: write '{stack and f'{stack}.'}"
                f"layers.{match[1]}.{name}', which are rotated (TransformerLens' '{match[2].replace('_', '_rot_')}')"
            )
        layer, rest = _index(match[1], text), _LENS.get(match[2], match[2])
        return replace(cls._part(rest, text), layer=layer, stack=stack, at=at)

    @classmethod
    def _part(cls, rest: str, text: str) -> Site:
        if rest in PARTS:
            return cls(rest)
        words = rest.split(".")
        if len(words) >= 3 and words[0] in ("attn", "cross") and words[1] == "heads":
            port = words[3] if len(words) == 4 else ""
            if len(words) <= 4 and (port in HEAD_PORTS or not port):
                return cls(
                    f"{words[0]}.{port or 'z_out'}", unit=_index(words[2], text), port="heads" if port else "head"
                )
        if len(words) in (3, 4) and words[:2] == ["mlp", "experts"]:
            port = words[3] if len(words) == 4 else "out"
            if port in EXPERT_PORTS:
                return cls(f"mlp.experts.{port}", unit=_index(words[2], text), port="experts")
        head, _, last = rest.rpartition(".")
        if head in PARTS and PARTS[head][-1] in UNITS:
            return cls(head, unit=_index(last, text))
        known = [*PARTS, "attn.heads.0", "attn.heads.0.z", "mlp.neurons.0", "mlp.experts.0"]
        raise SiteError(f"unknown part {rest!r} in the site {text!r}{nearest(rest, known)}")

    def __repr__(self) -> str:
        return f"pl.Site.parse({str(self)!r})"

    def __str__(self) -> str:
        prefix = f"{self.stack}." if self.stack else ""
        at = "" if self.at is None else f"@{self.at}"
        if self.layer is None:
            return f"{prefix}{self.part}{at}"
        area, _, port = self.part.partition(".")
        if self.port == "head":
            path = f"{area}.heads.{self.unit}"
        elif self.port == "heads":
            path = f"{area}.heads.{self.unit}.{port}"
        elif self.port == "experts":
            path = f"mlp.experts.{self.unit}.{port.removeprefix('experts.')}"
        else:
            path = self.part if self.unit is None else f"{self.part}.{self.unit}"
        return f"{prefix}layers.{self.layer}.{path}{at}"

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the dimensions of the tensor found here (a unit's own dimension is gone)."""
        if self.part.startswith("mlp.experts."):
            return ("batch", "position", "neuron" if self.part.endswith("neurons") else "d_model")
        dims = WHOLE.get(self.part) or PARTS[self.part]
        if self.part.endswith(".out") and self.port == "heads":
            return TOKENS
        return dims if self.unit is None else tuple(d for d in dims if d != self.unit_dim)

    @property
    def unit_dim(self) -> str:
        """The dimension a unit of this part is an index of."""
        dims = PARTS.get(self.part, TOKENS)
        return next((d for d in dims if d in ("head", "kv_head")), dims[-1])

    @property
    def whole(self) -> Site:
        """The tensor this site is met in: without unit and positions."""
        return self if self.part.startswith("mlp.experts.") else replace(self, unit=None, port="", at=None)

    def at_position(self, at: Position) -> Site:
        return replace(self, at=at)


def _split_position(text: str) -> tuple[str, Position]:
    path, sign, position = text.strip().partition("@")
    if not sign:
        return path, None
    if not position:
        raise SiteError(f"the site {text!r} ends in '@' without a position: use an index, a slice, 'token' or a span")
    return path, int(position) if re.fullmatch(r"-?\d+", position) else position


def _split_stack(path: str) -> tuple[str, str]:
    match = re.match(r"(encoder|decoder|stack\d+)\.", path)
    return (match[1], path[match.end() :]) if match else ("", path)


def _index(word: str, text: str) -> Index:
    if re.fullmatch(r"-?\d+", word):
        return int(word)
    if _SELECTOR.fullmatch(word):
        return word
    raise SiteError(
        f"cannot read {word!r} in the site {text!r}: expected a number, '*', a slice such as '2:6' or '1,4'"
    )


def choose(selector: Index, size: int, what: str, site: Site | str) -> list[int]:
    """The indices below `size` that a selector names; SiteError if it names none.

    >>> choose("2:4", 6, "layer", "s"), choose(-1, 6, "layer", "s"), choose("*", 3, "head", "s")
    ([2, 3], [5], [0, 1, 2])
    """
    if isinstance(selector, int):
        if not -size <= selector < size:
            raise SiteError(f"{site}: there is no {what} {selector}; this model has {size} (0 to {size - 1})")
        return [selector % size]
    assert selector is not None
    if "," in selector:
        return [i for word in selector.split(",") for i in choose(int(word), size, what, site)]
    if selector == "*":
        return list(range(size))
    start, _, stop = selector.partition(":")
    named = list(range(size))[slice(int(start) if start else None, int(stop) if stop else None)]
    if not named:
        raise SiteError(f"{site}: {selector!r} names no {what}; this model has {size} (0 to {size - 1})")
    return named
