"""How a family lays a tensor out in memory, and the one order everybody reads it in.

A layout is written like an einops pattern: the native order, for example `(b h) p e`, and the canonical one
it is read in. Letters: b batch, p position (queries), k key position, h head, e head width, d model width or
neurons, s parallel residual streams.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

TOKENS = "b p d"
HEADS = "b p h e"
PATTERN = "b h p k"
STREAMS = "b p (s d)"


def _groups(pattern: str) -> list[list[str]]:
    groups: list[list[str]] = []
    inside = False
    for token in pattern.replace("(", " ( ").replace(")", " ) ").split():
        if token == "(":
            inside = True
            groups.append([])
        elif token == ")":
            inside = False
        elif inside:
            groups[-1].append(token)
        else:
            groups.append([token])
    return groups


@dataclass(frozen=True)
class Layout:
    """Converts between a native and a canonical order.

    >>> import torch
    >>> x = torch.arange(12).reshape(6, 2)                       # (b p) d
    >>> layout = Layout("(b p) d", "b p d")
    >>> y = layout.read(x, b=2)
    >>> y.shape, torch.equal(layout.write(y), x)
    (torch.Size([2, 3, 2]), True)
    """

    native: str
    canonical: str
    sizes: tuple[tuple[str, int], ...] = ()  # sizes that do not change between runs, such as h
    scale: float = 1.0  # canonical value = scale * native value
    shared: bool = False  # one native row serves all prompts of the batch
    _plain: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_plain", self.native == self.canonical)

    def read(self, x: Tensor, b: int) -> Tensor:
        """The canonical view of a native tensor of batch size `b`."""
        if self.shared:
            x = x.expand(b, *x.shape[1:])
        if not self._plain:
            x = _rearrange(x, self.native, self.canonical, {**dict(self.sizes), "b": b})
        return x if self.scale == 1.0 else x * self.scale

    def write(self, x: Tensor) -> Tensor:
        """The native form of a canonical tensor."""
        if self.scale != 1.0:
            x = x / self.scale
        return x if self._plain else _rearrange(x, self.canonical, self.native, dict(self.sizes))


def _rearrange(x: Tensor, source: str, target: str, sizes: dict[str, int]) -> Tensor:
    """From one order of the same letters to another; in every group at most one size may be unknown."""
    letters: list[str] = []
    shape: list[int] = []
    for size, group in zip(x.shape, _groups(source), strict=True):
        rest = size
        for letter in group:
            rest //= sizes.get(letter, 1)
        letters += group
        shape += [sizes.get(letter, rest) if len(group) > 1 else size for letter in group]
    wanted = _groups(target)
    x = x.reshape(shape).permute([letters.index(letter) for group in wanted for letter in group])
    if all(len(group) == 1 for group in wanted):
        return x
    known = dict(zip((letter for group in wanted for letter in group), x.shape, strict=True))
    merged = []
    for group in wanted:
        product = 1
        for letter in group:
            product *= known[letter]
        merged.append(product)
    return x.reshape(merged)


# Native orders met in the wild, most usual first.
NATIVE = {
    TOKENS: ("b p d", "(b p) d", "p b d", "b d p"),
    HEADS: (
        "b p h e", "b h p e", "b p (h e)", "(b h) p e", "p b (h e)", "p b h e", "p (b h) e", "(b p) (h e)",
        "b (h e) p",
    ),
    PATTERN: ("b h p k", "(b h) p k", "p k b h", "b p h k"),
    STREAMS: ("b p s d", "s b p d"),
}  # fmt: skip


def recognise(shape: tuple[int, ...], canonical: str, **sizes: int) -> Layout | None:
    """The layout whose native order gives `shape` for these sizes (all letters that matter must be given)."""
    for native in NATIVE[canonical]:
        groups = _groups(native)
        if len(groups) != len(shape):
            continue
        fits = True
        for size, group in zip(shape, groups, strict=True):
            product = 1
            for letter in group:
                product *= sizes.get(letter, -1)
            fits = fits and product == size
        if fits:
            return Layout(native, canonical, tuple((letter, sizes[letter]) for letter in "hs" if letter in sizes))
    return None
