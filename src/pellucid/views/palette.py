"""Which colour says which number, so that everybody can tell them apart?

Two scales. Amounts (0 to 1) run from the paper's colour to a deep blue-green, one hue whose lightness falls evenly.
Signed numbers run from orange (below zero) through paper to blue (above), which all common kinds of colour blindness
keep apart. On a dark page both start from the dark paper and grow lighter. Steps between colours are taken in OKLab,
where equal steps look equal, and every step brings black or white text that can be read on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

STEPS = 16  # of the amounts, and to each side of zero
Rgb = tuple[float, float, float]

# paper, then the colours passed on the way to the strongest
AMOUNTS = {"light": ("#fbfaf7", "#a9d3c5", "#3f96a0", "#12466b"), "dark": ("#17191c", "#1f4c5c", "#3f9a97", "#c5eed2")}
ABOVE = {"light": ("#fbfaf7", "#9cc3ea", "#2a6db5", "#0e3a73"), "dark": ("#17191c", "#24507f", "#4f94d8", "#b6dbff")}
BELOW = {"light": ("#fbfaf7", "#f5bd86", "#c9681a", "#7c3503"), "dark": ("#17191c", "#6b3d12", "#cf7a2b", "#ffd2a1")}


def amount_class(value: float, full: float = 1.0) -> str:
    """The CSS class of an amount between 0 and `full`; no colour where there is no number.

    >>> amount_class(0.0), amount_class(1.0), amount_class(float("nan"))
    ('s0', 's16', '')
    """
    return f"s{_step(value, full)}" if math.isfinite(value) else ""


def signed_class(value: float, full: float) -> str:
    """The CSS class of a signed number; `full` and beyond have the strongest colour.

    >>> signed_class(-5.0, 5.0), signed_class(0.0, 5.0), signed_class(9.0, 5.0)
    ('n16', 's0', 'p16')
    """
    if not math.isfinite(value):
        return ""
    step = _step(abs(value), full)
    return f"{'p' if value > 0 else 'n'}{step}" if step else "s0"


def _step(value: float, full: float) -> int:
    return round(STEPS * min(1.0, max(0.0, value) / full)) if full > 0 else 0


def styles(theme: str) -> Iterator[str]:
    """CSS rules of one theme, "light" or "dark"."""
    for prefix, scale in (("s", AMOUNTS), ("p", ABOVE), ("n", BELOW)):
        for i, colour in enumerate(ramp(scale[theme])):
            if i or prefix == "s":
                yield f".{prefix}{i}{{background:{colour};fill:{colour};color:{ink(colour)}}}"


def ramp(stops: tuple[str, ...]) -> list[str]:
    """`STEPS` + 1 colours evenly along the stops."""
    labs = [_oklab(_rgb(stop)) for stop in stops]
    colours = []
    for i in range(STEPS + 1):
        at = i / STEPS * (len(labs) - 1)
        j = min(int(at), len(labs) - 2)
        mixed = [a + (b - a) * (at - j) for a, b in zip(labs[j], labs[j + 1], strict=True)]
        colours.append("#" + "".join(f"{round(255 * c):02x}" for c in _srgb((mixed[0], mixed[1], mixed[2]))))
    return colours


def ink(colour: str) -> str:
    """Black or white, whichever can be read better on `colour`."""
    return max(("#000", "#fff"), key=lambda text: contrast(text, colour))


def contrast(a: str, b: str) -> float:
    """The contrast of two colours as WCAG 2 defines it, 1 to 21.

    >>> round(contrast("#000", "#fff"), 1)
    21.0
    """
    light, dark = sorted((_luminance(_rgb(a)), _luminance(_rgb(b))), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _rgb(colour: str) -> Rgb:
    digits = colour.lstrip("#")
    if len(digits) == 3:
        digits = "".join(2 * d for d in digits)
    r, g, b = (int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
    return r, g, b


def _linear(c: float) -> float:
    return c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4


def _luminance(rgb: Rgb) -> float:
    r, g, b = map(_linear, rgb)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def _oklab(rgb: Rgb) -> Rgb:
    """Bjorn Ottosson's OKLab (2020)."""
    r, g, b = map(_linear, rgb)
    l = math.cbrt(0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b)  # noqa: E741
    m = math.cbrt(0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b)
    s = math.cbrt(0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b)
    return (
        0.2104542553 * l + 0.7936177850 * m - 0.0040720468 * s,
        1.9779984951 * l - 2.4285922050 * m + 0.4505937099 * s,
        0.0259040371 * l + 0.7827717662 * m - 0.8086757660 * s,
    )


def _srgb(lab: Rgb) -> Rgb:
    lightness, a, b = lab
    l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3  # noqa: E741
    m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    s = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
        -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
        -0.0041960863 * l - 0.7034186147 * m + 1.7076147010 * s,
    )
    r, g, b = (_gamma(min(1.0, max(0.0, c))) for c in linear)
    return r, g, b


def _gamma(c: float) -> float:
    return 12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055
