// A grid of coloured cells with headings: where everything stands, and how it is drawn. Only what is in sight is drawn, so
// that a prompt of hundreds of tokens stays as quick as a short one.
import { type Brush, fit, squeeze, textWidth } from "./brush";
import type { Paint } from "./colour";

export interface Told { title: string; lines: [string, string][] }

export interface Heat {
  rows: string[];
  columns: string[];
  rowName: string;
  columnName: string;
  paint(row: number, column: number): Paint | null;
  text?(row: number, column: number): string;
  tell(row: number, column: number): Told;
  outlined?(row: number, column: number): boolean;
  clipped?(row: number, column: number): boolean; // beyond the ends of the scale
  selected?(row: number, column: number): boolean;
  rowMark?(row: number): 0 | 1 | 2;
  columnMark?(column: number): 0 | 1 | 2;
  picture?(row: number, column: number, brush: Brush, x: number, y: number, size: number): void;
  cell: { width: [number, number]; height: number; size?: number };
}

export interface Layout { left: number; top: number; w: number; h: number; width: number; height: number; slanted: boolean; right: number }
export interface Ink { paper: string; ink: string; soft: string; accent: string; rule: string }

const SIZE = 11.5;

export function layout(heat: Heat, room: number): Layout {
  const widest = (labels: string[]) => labels.reduce((m, t) => Math.max(m, textWidth(t.slice(0, 24), SIZE)), 0);
  const left = Math.ceil(Math.min(96, Math.max(widest(heat.rows), textWidth(heat.rowName, SIZE)) + 12));
  const [least, most] = heat.cell.width;
  const n = Math.max(1, heat.columns.length);
  const w = Math.max(least, Math.min(most, Math.floor(((room - left - 2) / n) * 4) / 4));
  const longest = Math.min(90, widest(heat.columns));
  const slanted = longest > w - 4 && w < 44;
  const top = slanted ? Math.ceil(longest * 0.72 + 16) : 24;
  const right = slanted ? Math.ceil(longest * 0.72) : 2;
  const h = heat.cell.height;
  return { left, top, w, h, right, slanted, width: Math.ceil(left + n * w + right), height: Math.ceil(top + heat.rows.length * h + 2) };
}

/** The part of the grid that begins at scroll position (sx, sy) and is `width` x `height` large. */
export function draw(brush: Brush, heat: Heat, at: Layout, ink: Ink, sx: number, sy: number, width: number, height: number, focus?: [number, number] | null): void {
  const { left, top, w, h } = at;
  const first = Math.max(0, Math.floor(sx / w)), last = Math.min(heat.columns.length, Math.ceil((sx + width - left) / w) + 1);
  const upper = Math.max(0, Math.floor(sy / h)), lower = Math.min(heat.rows.length, Math.ceil((sy + height - top) / h) + 1);
  const gap = w >= 8 && h >= 8 ? 1 : 0;
  const size = heat.cell.size ?? 11;
  brush.rect(0, 0, width, height, ink.paper);
  for (let i = upper; i < lower; i++)
    for (let j = first; j < last; j++) {
      const x = left + j * w - sx, y = top + i * h - sy;
      if (heat.picture) heat.picture(i, j, brush, x + 2, y + 2, Math.min(w, h) - 5);
      else {
        const paint = heat.paint(i, j);
        if (!paint) continue;
        brush.rect(x, y, w - gap, h - gap, paint.fill);
        if (heat.clipped?.(i, j)) brush.rect(x + w - gap - 4, y, 4, 4, paint.ink);
        const text = heat.text?.(i, j);
        if (text && w > 18) brush.text(squeeze(text, w - 4, size), x + (w - gap) / 2, y + (h - gap) / 2 + 0.5, { fill: paint.ink, size, align: "center", weight: heat.outlined?.(i, j) ? 650 : 400 });
        if (heat.outlined?.(i, j)) brush.frame(x + 1, y + 1, w - gap - 2, h - gap - 2, paint.ink, 1);
      }
    }
  for (let i = upper; i < lower; i++)
    for (let j = first; j < last; j++) {
      const x = left + j * w - sx, y = top + i * h - sy;
      if (heat.selected?.(i, j)) halo(brush, ink, x - gap, y - gap, w + gap, h + gap);
      if (focus && focus[0] === i && focus[1] === j) brush.frame(x - gap, y - gap, w + gap, h + gap, ink.ink, 2);
    }
  columnHeads(brush, heat, at, ink, sx, width, first, last, focus);
  brush.rect(0, top, left, height, ink.paper);
  for (let i = upper; i < lower; i++) {
    const y = top + i * h - sy + h / 2;
    if (y < top) continue;
    if (h < 9 && i % Math.ceil(12 / h)) continue;
    const mark = heat.rowMark?.(i) ?? 0, here = focus?.[0] === i;
    brush.text(fit(heat.rows[i], left - 8, SIZE), left - 7, y, { fill: mark ? ink.accent : here ? ink.ink : ink.soft, size: SIZE, align: "right", weight: mark || here ? 650 : 400 });
  }
  brush.rect(0, 0, left, top, ink.paper);
  brush.text(fit(heat.rowName, left - 8, SIZE), left - 7, top - 11, { fill: ink.soft, size: SIZE, align: "right" });
}

function halo(brush: Brush, ink: Ink, x: number, y: number, w: number, h: number): void {
  brush.frame(x, y, w, h, ink.accent, Math.min(2.5, w / 3));
}

function columnHeads(brush: Brush, heat: Heat, at: Layout, ink: Ink, sx: number, width: number, first: number, last: number, focus?: [number, number] | null): void {
  const { left, top, w, slanted } = at;
  brush.rect(0, 0, width, top, ink.paper);
  const every = slanted ? Math.max(1, Math.ceil(13 / w)) : 1;
  for (let j = first; j < last; j++) {
    const here = focus?.[1] === j, mark = heat.columnMark?.(j) ?? 0;
    if (j % every && !here && !mark) continue;
    const how = { fill: mark ? ink.accent : here ? ink.ink : ink.soft, size: SIZE, weight: mark || here ? 650 : 400 };
    const x = left + (j + 0.5) * w - sx;
    if (slanted) brush.text(fit(heat.columns[j], 90, SIZE, how.weight), x - 3, top - 9, { ...how, turn: -45 });
    else brush.text(fit(heat.columns[j], w - 4, SIZE, how.weight), x, top - 11, { ...how, align: "center" });
  }
}

/** Which cell is at (x, y) of the visible part; null on headings. */
export function hit(heat: Heat, at: Layout, x: number, y: number, sx: number, sy: number): [number, number] | null {
  if (x < at.left || y < at.top) return null;
  const j = Math.floor((x + sx - at.left) / at.w), i = Math.floor((y + sy - at.top) / at.h);
  return i >= 0 && i < heat.rows.length && j >= 0 && j < heat.columns.length ? [i, j] : null;
}

/** Where a key leads from a cell; null for any other key. */
export function step(key: string, [i, j]: [number, number], rows: number, columns: number): [number, number] | null {
  const to: Record<string, [number, number]> = {
    ArrowUp: [i - 1, j], ArrowDown: [i + 1, j], ArrowLeft: [i, j - 1], ArrowRight: [i, j + 1],
    Home: [i, 0], End: [i, columns - 1], PageUp: [0, j], PageDown: [rows - 1, j],
  };
  const found = to[key];
  return found ? [Math.min(rows - 1, Math.max(0, found[0])), Math.min(columns - 1, Math.max(0, found[1]))] : null;
}
