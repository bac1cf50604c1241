// Tokens and numbers as people can read them (as pellucid.views.markup writes them).

const SPACES: Record<string, string> = { " ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥", "\u00a0": "⍽", "\u3000": "⬚" };

/** A token with what cannot be seen made visible: outer spaces, line ends, control and format characters. */
export function visible(token: string): string {
  if (!token) return "∅";
  const start = token.length - token.trimStart().length;
  const end = token.trimEnd().length;
  let at = 0, out = "";
  for (const c of token) {
    const inner = at >= start && at < end && c === " ";
    out += inner ? c : (SPACES[c] ?? (/[\p{C}\p{Z}]/u.test(c) ? escaped(c) : c));
    at += c.length;
  }
  return out;
}

const escaped = (c: string) => "\\u" + c.codePointAt(0)!.toString(16).padStart(4, "0");

/** A token for a narrow place: its leading space left out. */
export const short = (token: string) => visible(token).replace(/^␣(?=[^␣])/, "");

export function number(x: number, digits?: number, sign = false): string {
  if (Number.isNaN(x)) return "";
  if (!Number.isFinite(x)) return x > 0 ? "∞" : "−∞";
  const size = Math.abs(x);
  if (digits === undefined) {
    if (Number.isInteger(x) && size < 1e6) digits = 0;
    else if (size && (size < 0.001 || size >= 1e6)) return (sign && x > 0 ? "+" : "") + x.toExponential(1).replaceAll("-", "−");
    else digits = size >= 100 ? 1 : size >= 1 ? 2 : 3;
  }
  const text = size.toFixed(digits);
  if (!/[1-9]/.test(text)) return text;
  return (x < 0 ? "−" : sign ? "+" : "") + text;
}

/** A round number beside an axis. */
export const tick = (x: number) => (x && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e6) ? x.toExponential() : String(+x.toPrecision(6))).replaceAll("-", "−");

/** As few digits as tell cells apart; a dot for what rounds to zero, so that the eye finds the rest. */
export function cell(x: number, full: number): string {
  if (!Number.isFinite(x)) return "";
  const text = number(x, full >= 100 ? 0 : full >= 10 ? 1 : 2);
  return /[1-9]/.test(text) ? text.replace(/^(−?)0\./, "$1.") : "·";
}

export function percent(p: number): string {
  if (!Number.isFinite(p)) return "";
  if (p >= 1) return "100%";
  if (p < 0.001) return p > 0 ? "<0.1%" : "0%";
  if (p >= 0.9995 && p < 1) return ">99.9%";
  return p >= 0.0995 && Math.round(100 * p) < 100 ? `${Math.round(100 * p)}%` : `${(100 * p).toFixed(1)}%`;
}
