// Which colour says which number, so that everybody can tell them apart? (Figures for papers have the light ones: pellucid.views.drawing.)
// Amounts run from paper to a deep blue-green, signed numbers from orange through paper to blue, which all common kinds of
// colour blindness keep apart; on a dark page both start from the dark paper and grow lighter. Steps are even in OKLab.

export type Theme = "light" | "dark";
type Rgb = [number, number, number];

const AMOUNTS = { light: ["#fbfaf7", "#a9d3c5", "#3f96a0", "#12466b"], dark: ["#17191c", "#1f4c5c", "#3f9a97", "#c5eed2"] };
const ABOVE = { light: ["#fbfaf7", "#9cc3ea", "#2a6db5", "#0e3a73"], dark: ["#17191c", "#24507f", "#4f94d8", "#b6dbff"] };
const BELOW = { light: ["#fbfaf7", "#f5bd86", "#c9681a", "#7c3503"], dark: ["#17191c", "#6b3d12", "#cf7a2b", "#ffd2a1"] };
const STEPS = 32;

/** What canvases are drawn with: the page's own colours (base.css). */
export const INK = {
  light: { paper: "#fbfaf7", ink: "#201e1b", soft: "#67625a", accent: "#1a5f9e", rule: "#e2ded5" },
  dark: { paper: "#17191c", ink: "#e9e5dd", soft: "#a39d92", accent: "#86bdf2", rule: "#34383d" },
};

/** Lines of a chart, in the order they are taken: told apart by lightness and dashes as well. */
export const LINES = {
  light: ["#1b6f86", "#b3500f", "#6b4fa0", "#3d7a35", "#a03060", "#6b6358"],
  dark: ["#58b7c4", "#ec9a52", "#b09be6", "#86c47c", "#e68aae", "#b5ada0"],
};

export interface Paint { fill: string; ink: string }

const ramps = new Map<string, Paint[]>();

function ramp(stops: string[]): Paint[] {
  const key = stops.join();
  let found = ramps.get(key);
  if (!found) {
    const labs = stops.map((s) => oklab(rgb(s)));
    found = Array.from({ length: STEPS + 1 }, (_, i) => {
      const at = (i / STEPS) * (labs.length - 1), j = Math.min(Math.floor(at), labs.length - 2);
      const fill = hex(srgb(labs[j].map((a, k) => a + (labs[j + 1][k] - a) * (at - j)) as Rgb));
      return { fill, ink: contrast("#000000", fill) > contrast("#ffffff", fill) ? "#000000" : "#ffffff" };
    });
    ramps.set(key, found);
  }
  return found;
}

const step = (t: number) => Math.round(STEPS * Math.min(1, Math.max(0, t)));

/** The colours of an amount, 0 to 1; null where there is no number. */
export const amount = (t: number, theme: Theme): Paint | null => (Number.isNaN(t) ? null : ramp(AMOUNTS[theme])[step(t)]);

/** The colours of a signed number, -1 to 1. */
export const signed = (t: number, theme: Theme): Paint | null =>
  Number.isNaN(t) ? null : ramp((t > 0 ? ABOVE : BELOW)[theme])[step(Math.abs(t))];

export const scale = (isSigned: boolean) => (isSigned ? signed : amount);

/** The contrast of two colours as WCAG 2 defines it, 1 to 21. */
export function contrast(a: string, b: string): number {
  const [light, dark] = [luminance(rgb(a)), luminance(rgb(b))].sort((x, y) => y - x);
  return (light + 0.05) / (dark + 0.05);
}

const rgb = (colour: string): Rgb => [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16) / 255) as Rgb;
const hex = (c: Rgb) => "#" + c.map((x) => Math.round(255 * Math.min(1, Math.max(0, x))).toString(16).padStart(2, "0")).join("");
const linear = (c: number) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
const gamma = (c: number) => (c <= 0.0031308 ? 12.92 * c : 1.055 * c ** (1 / 2.4) - 0.055);

function luminance(c: Rgb): number {
  const [r, g, b] = c.map(linear);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

// Bjorn Ottosson's OKLab (2020)
function oklab(c: Rgb): Rgb {
  const [r, g, b] = c.map(linear);
  const l = Math.cbrt(0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b);
  const m = Math.cbrt(0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b);
  const s = Math.cbrt(0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b);
  return [0.2104542553 * l + 0.793617785 * m - 0.0040720468 * s, 1.9779984951 * l - 2.428592205 * m + 0.4505937099 * s,
    0.0259040371 * l + 0.7827717662 * m - 0.808675766 * s];
}

function srgb([L, a, b]: Rgb): Rgb {
  const l = (L + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (L - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (L - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [gamma(4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s), gamma(-1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s),
    gamma(-0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s)];
}
