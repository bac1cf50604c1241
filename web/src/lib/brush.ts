// Drawing once for a canvas and for an SVG file.

export interface Words { fill: string; size: number; align?: "left" | "center" | "right"; weight?: number; turn?: number }

export interface Brush {
  rect(x: number, y: number, w: number, h: number, fill: string): void;
  frame(x: number, y: number, w: number, h: number, stroke: string, width: number): void;
  text(text: string, x: number, y: number, how: Words): void;
}

const SANS = 'ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif';
const font = (how: Words) => `${how.weight ?? 400} ${how.size}px ${SANS}`;

export function canvasBrush(context: CanvasRenderingContext2D): Brush {
  return {
    rect(x, y, w, h, fill) {
      context.fillStyle = fill;
      context.fillRect(x, y, w, h);
    },
    frame(x, y, w, h, stroke, width) {
      context.strokeStyle = stroke;
      context.lineWidth = width;
      context.strokeRect(x + width / 2, y + width / 2, w - width, h - width);
    },
    text(text, x, y, how) {
      context.font = font(how);
      context.fillStyle = how.fill;
      context.textAlign = how.align ?? "left";
      context.textBaseline = "middle";
      if (!how.turn) return context.fillText(text, x, y);
      context.save();
      context.translate(x, y);
      context.rotate((how.turn * Math.PI) / 180);
      context.fillText(text, 0, 0);
      context.restore();
    },
  };
}

export function svgBrush(): Brush & { svg(width: number, height: number, background: string): string } {
  const parts: string[] = [];
  const n = (x: number) => +x.toFixed(2);
  return {
    rect: (x, y, w, h, fill) => void parts.push(`<rect x="${n(x)}" y="${n(y)}" width="${n(w)}" height="${n(h)}" fill="${fill}"/>`),
    frame: (x, y, w, h, stroke, width) => void parts.push(
      `<rect x="${n(x + width / 2)}" y="${n(y + width / 2)}" width="${n(w - width)}" height="${n(h - width)}" fill="none" stroke="${stroke}" stroke-width="${width}"/>`),
    text(text, x, y, how) {
      const anchor = { left: "start", center: "middle", right: "end" }[how.align ?? "left"];
      const turn = how.turn ? ` transform="rotate(${how.turn} ${n(x)} ${n(y)})"` : "";
      parts.push(`<text x="${n(x)}" y="${n(y)}" fill="${how.fill}" font-size="${how.size}" font-weight="${how.weight ?? 400}" text-anchor="${anchor}" dominant-baseline="central"${turn}>${xml(text)}</text>`);
    },
    svg: (width, height, background) =>
      `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" font-family='${SANS}'><rect width="100%" height="100%" fill="${background}"/>${parts.join("")}</svg>`,
  };
}

export const xml = (text: string) =>
  text.replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]/g, "\ufffd").replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]!);

let ruler: CanvasRenderingContext2D | null | undefined;
const widths = new Map<string, number>();

export function textWidth(text: string, size: number, weight = 400): number {
  const key = `${size} ${weight} ${text}`;
  let found = widths.get(key);
  if (found === undefined) {
    ruler ??= typeof document === "undefined" ? null : document.createElement("canvas").getContext("2d");
    if (ruler) ruler.font = font({ fill: "", size, weight });
    found = ruler ? ruler.measureText(text).width : 0.55 * size * text.length;
    if (widths.size > 20_000) widths.clear();
    widths.set(key, found);
  }
  return found;
}

/** A number with as many digits as have room; other text is cut. */
export function squeeze(text: string, room: number, size: number): string {
  const [, sign, whole, digits] = /^([−+]?)(\d*)\.(\d+)$/.exec(text) ?? [];
  if (digits === undefined) return fit(text, room, size);
  for (let n = digits.length; n >= 0; n--) {
    const rounded = Number(`${whole || 0}.${digits}`).toFixed(n);
    const shown = sign + (whole ? rounded : rounded.replace(/^0\./, "."));
    if (textWidth(shown, size) <= room) return shown;
  }
  return "";
}

/** The text, or as much of its start as has room. */
export function fit(text: string, room: number, size: number, weight = 400): string {
  if (textWidth(text, size, weight) <= room) return text;
  const signs = [...text];
  let low = 0, high = signs.length;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (textWidth(signs.slice(0, middle).join("") + "…", size, weight) <= room) low = middle;
    else high = middle - 1;
  }
  return low ? signs.slice(0, low).join("") + "…" : "";
}
