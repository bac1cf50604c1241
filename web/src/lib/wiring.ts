// Where the boxes of a circuit stand: depth upwards, and in each row ordered so that lines cross little.
import type { Circuit } from "../schema";
import { list } from "./numbers";

export interface Box { id: string; label: string; members: number[]; type: string; layer: number; order: number; component: string; x: number; y: number; width: number; position: string }
export interface Wire { source: number; target: number; port: string; score: number }
export interface Wiring { boxes: Box[]; wires: Wire[]; width: number; height: number; left: number; rows: { layer: number; y: number; name: string }[]; columns: { position: string; x: number }[] }

export const BOX = 24, ROW = 74, GAP = 16;
const PORTS: Record<string, number> = { q: 0.2, k: 0.5, v: 0.8 };

/** Where a wire ends on its box. */
export const portAt = (box: Box, port: string) => box.x + box.width * (box.members.length === 1 && box.type === "head" ? (PORTS[port] ?? 0.5) : 0.5);

/** Edges from the strongest. */
export function ranked(circuit: Circuit): Wire[] {
  const source = list(circuit.sources), target = list(circuit.targets), score = list(circuit.scores);
  return source.map((s, i) => ({ source: s, target: target[i], port: circuit.ports[i] ?? "", score: score[i] }))
    .sort((a, b) => Math.abs(b.score) - Math.abs(a.score));
}

/** `names`: node -> the name of its group; nodes of one name become one box. */
export function wiring(circuit: Circuit, edges: Wire[], names: ReadonlyMap<number, string>, room: number): Wiring {
  const used = new Set(edges.flatMap((e) => [e.source, e.target]));
  const box = new Map<string, Box>(), of = new Map<number, string>();
  circuit.nodes.forEach((node, i) => {
    if (!used.has(i)) return;
    const name = names.get(i), id = name ? `name ${name}` : `node ${i}`;
    of.set(i, id);
    const found = box.get(id);
    if (found) {
      found.members.push(i);
      found.layer = Math.max(found.layer, node.layer);
      return;
    }
    const label = name ?? node.label;
    box.set(id, { id, label, members: [i], type: node.type, layer: node.layer, order: node.type === "mlp" ? 1e6 : (node.unit ?? -1), component: node.component,
      x: 0, y: 0, width: Math.max(52, 7 * label.length + 16), position: node.position ?? "" });
  });
  const boxes = [...box.values()], index = new Map(boxes.map((b, i) => [b.id, i]));
  const sums = new Map<string, Wire>();
  for (const e of edges) {
    const source = index.get(of.get(e.source)!)!, target = index.get(of.get(e.target)!)!;
    if (source === target) continue;
    const port = boxes[target].members.length > 1 ? "" : e.port, key = `${source} ${target} ${port}`;
    const found = sums.get(key);
    if (found) found.score += e.score;
    else sums.set(key, { source, target, port, score: e.score });
  }
  const wires = [...sums.values()];
  const layers = [...new Set(boxes.map((b) => b.layer))].sort((a, b) => a - b);
  const rows = layers.map((layer) => boxes.filter((b) => b.layer === layer).sort((a, b) => a.order - b.order));
  const positions = [...new Set(circuit.nodes.map((n) => n.position ?? ""))].filter((p) => p && boxes.some((b) => b.position === p));
  const columns = positions.length ? byPosition(rows, positions) : byNeighbours(rows, boxes, wires);
  const width = Math.max(room, ...boxes.map((b) => b.x + b.width + 12));
  const shift = Math.max(0, (room - Math.max(...boxes.map((b) => b.x + b.width), 0) - 12) / 2);
  const height = layers.length * ROW + 8;
  rows.forEach((row, i) => row.forEach((b) => { b.y = height - (i + 1) * ROW + (ROW - BOX) / 2; b.x += shift; }));
  const last = layers[layers.length - 1];
  return {
    boxes, wires, width, height, left: Math.max(0, shift), columns: columns.map((c) => ({ ...c, x: c.x + shift })),
    rows: layers.map((layer, i) => ({ layer, y: height - (i + 1) * ROW + ROW / 2, name: layer < 0 || (layer === last && rows[i][0]?.type === "logits") ? "" : `layer ${layer}` })),
  };
}

const LEFT = 58;

function pack(row: Box[], wanted: (b: Box) => number): void {
  let free = LEFT;
  for (const b of row) {
    b.x = Math.max(free, wanted(b) - b.width / 2);
    free = b.x + b.width + GAP;
  }
}

function byNeighbours(rows: Box[][], boxes: Box[], wires: Wire[]): [] {
  const sizes = rows.map((row) => row.reduce((s, b) => s + b.width + GAP, 0)), widest = Math.max(...sizes, 0);
  rows.forEach((row, i) => { let x = LEFT + (widest - sizes[i]) / 2; for (const b of row) { b.x = x; x += b.width + GAP; } });
  const near = boxes.map(() => [] as [number, number][]);
  for (const w of wires) {
    near[w.source].push([w.target, Math.abs(w.score)]);
    near[w.target].push([w.source, Math.abs(w.score)]);
  }
  const number = new Map(boxes.map((b, i) => [b, i]));
  const centre = (b: Box) => b.x + b.width / 2;
  for (let sweep = 0; sweep < 6; sweep++)
    for (const row of sweep % 2 ? [...rows].reverse() : rows) {
      const goal = new Map(row.map((b) => {
        let sum = 0, weight = 1e-12;
        for (const [other, w] of near[number.get(b)!]) { sum += w * centre(boxes[other]); weight += w; }
        return [b, weight > 1e-9 ? sum / weight : centre(b)];
      }));
      row.sort((a, b) => goal.get(a)! - goal.get(b)!);
      pack(row, (b) => goal.get(b)!);
      const over = Math.max(0, Math.max(...row.map((b) => b.x + b.width)) - LEFT - widest);
      for (const b of row) b.x = Math.max(LEFT, b.x - over);
      pack(row, centre);
    }
  return [];
}

function byPosition(rows: Box[][], positions: string[]): { position: string; x: number }[] {
  const room = new Map(positions.map((p) => [p, Math.max(...rows.map((row) => row.filter((b) => b.position === p).reduce((s, b) => s + b.width + 6, 0)), 60) + GAP]));
  let x = LEFT;
  const found = positions.map((position) => { const at = { position, x }; x += room.get(position)!; return at; });
  for (const row of rows) {
    for (const { position, x } of found) {
      let free = x;
      for (const b of row.filter((b) => b.position === position)) { b.x = free; free += b.width + 6; }
    }
    for (const b of row.filter((b) => !b.position)) b.x = LEFT + (x - LEFT - b.width) / 2;
  }
  return found;
}
