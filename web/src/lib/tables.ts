// The same as a table: what each kind of view (../kinds.ts) says in rows and columns, for reading aloud, sorting, and spreadsheets.
import type { Anatomy, Attention, Circuit, Column, Contributions, Curves, Grid, Lens, Neuron, Numbers, Table, Tokens, Traces } from "../schema";
import { list, values } from "./numbers";
import { patterns } from "./patterns";
import { ranked } from "./wiring";

type Cell = string | number;
const MANY = 20_000; // rows of a table of attention
interface Row { cells: Cell[]; component?: string }

export function tokens(view: Tokens): Table {
  return build(["position", "token", ...view.tracks.map((t) => t.name)], view.tokens.map((t, i) => ({ cells: [view.positions[i], t, ...view.tracks.map((tr) => values(tr.values).at(i))] })), 1);
}

export function attention(view: Attention): Table {
  const many = view.stacks.length > 1;
  for (const least of [0.01, 0.03, 0.1, 0.3]) {
    const rows: Row[] = [];
    for (const s of view.stacks) s.heads.forEach((h, n) => patterns(s).each(n, least, (i, j, w) => {
      if (rows.length <= MANY) rows.push({ cells: [...(many ? [s.name ?? ""] : []), h.layer, h.head, i, s.queries[i], j, s.keys[j], w], component: h.component });
    }));
    if (rows.length > MANY && least < 0.3) continue; // too many to look through: the stronger ones only
    return build([...(many ? ["who"] : []), "layer", "head", "from", "from token", "to", "to token", `attention (from ${least})`], rows.slice(0, MANY), many ? 4 : 3, many ? 6 : 5);
  }
  return build([], []);
}

export function lens(view: Lens): Table {
  const rows: Row[] = [];
  for (const r of view.readings) {
    const top = values(r.top), p = values(r.probability);
    view.layers.forEach((layer, i) => view.tokens.forEach((t, j) => rows.push({
      cells: [...(view.readings.length > 1 ? [r.name] : []), layer, view.positions[j], t, view.words[top.at(i, j, 0)] ?? "", p.at(i, j, 0), r.rank ? values(r.rank).at(i, j) : NaN, r.kl ? values(r.kl).at(i, j) : NaN], component: view.components[i],
    })));
  }
  const many = view.readings.length > 1;
  return build([...(many ? ["lens"] : []), "layer", "position", "token", "best guess", "probability", "rank of the answer (0: the likeliest)", "KL"], rows, many ? 3 : 2, many ? 4 : 3);
}

export function contributions(view: Contributions): Table {
  const v = list(view.values);
  return build(["part", "contribution"], view.names.map((name, i) => ({ cells: [name, v[i]], component: view.components[i] })));
}

export function grid(view: Grid): Table {
  const rows: Row[] = [];
  const intervals = view.planes.some((p) => p.low);
  view.rows.labels.forEach((r, i) => view.columns.labels.forEach((c, j) => {
    const cells: Cell[] = [r, ...(view.columns.positions?.length ? [view.columns.positions[j]] : []), c];
    for (const p of view.planes) cells.push(values(p.values).at(i, j), ...(intervals ? [at(p.low, i, j), at(p.high, i, j)] : []));
    const first = view.planes[0];
    rows.push({ cells, component: first.component ? first.component.replace("{row}", r).replace("{column}", c) : view.rows.components?.[i] });
  }));
  const isToken = !!view.columns.positions?.length;
  return build([view.rows.name, ...(isToken ? ["position"] : []), view.columns.name, ...view.planes.flatMap((p) => [p.name, ...(intervals ? ["low", "high"] : [])])], rows, isToken ? 2 : -1);
}

export function circuit(view: Circuit): Table {
  return build(["from", "to", "port", "score"], ranked(view).map((w) => ({ cells: [view.nodes[w.source].label, view.nodes[w.target].label, w.port, w.score], component: view.nodes[w.source].component })));
}

export function curves(view: Curves): Table {
  const intervals = view.lines.some((l) => l.low), rows: Row[] = [];
  for (const l of view.lines) {
    const x = list(l.x), y = list(l.y), low = l.low ? list(l.low) : [], high = l.high ? list(l.high) : [];
    x.forEach((v, i) => rows.push({ cells: [l.name, view.x.labels?.[v] ?? v, y[i], ...(intervals ? [low[i] ?? NaN, high[i] ?? NaN] : [])] }));
  }
  return build(["curve", view.x.name, view.y.name, ...(intervals ? ["low", "high"] : [])], rows);
}

export function neuron(view: Neuron): Table {
  const rows: Row[] = [];
  view.contexts.forEach((c, n) => { const v = list(c.values); c.tokens.forEach((t, i) => rows.push({ cells: [`context ${n + 1}`, t, v[i]] })); });
  for (const e of view.raises ?? []) rows.push({ cells: ["raises", e.word, e.value] });
  for (const e of view.lowers ?? []) rows.push({ cells: ["lowers", e.word, e.value] });
  if (view.counts && view.edges) { const e = list(view.edges); list(view.counts).forEach((c, i) => rows.push({ cells: [`count from ${e[i]}`, `to ${e[i + 1]}`, c] })); }
  return build(["what", "token", "value"], rows, 1);
}

export function traces(view: Traces): Table {
  const v = values(view.values), rows: Row[] = [];
  view.rows.labels.forEach((r, i) => view.tokens.forEach((t, j) => rows.push({ cells: [r, view.positions[j], t, v.at(i, j)], component: view.rows.components?.[i] })));
  return build([view.rows.name, "position", "token", view.unit || "value"], rows, 2);
}

export function anatomy(view: Anatomy): Table {
  const rows: Row[] = [];
  for (const s of view.stacks) for (const b of s.blocks) for (const layer of b.layers) for (const site of b.sites) rows.push({ cells: [s.name || "model", layer, site], component: `${s.name ? s.name + "." : ""}layers.${layer}.${site}` });
  return build(["stack", "layer", "site"], rows);
}

const at = (n: Numbers | null | undefined, i: number, j: number) => (n ? values(n).at(i, j) : NaN);

function build(names: string[], rows: Row[], ...tokens: number[]): Table {
  const columns: Column[] = names.map((name, c) => {
    const cells = rows.map((r) => r.cells[c]);
    if (cells.length && cells.every((x) => typeof x === "number")) return { name, numbers: pack(cells as number[]) };
    return { name, texts: cells.map(String), tokens: tokens.includes(c) };
  });
  const components = rows.some((r) => r.component) ? rows.map((r) => r.component ?? "") : undefined;
  return { kind: "table", columns, rows: rows.length, ...(components ? { components } : {}) };
}

export function pack(numbers: number[]): Numbers {
  const whole = numbers.every((x) => Number.isInteger(x) && Math.abs(x) < 2 ** 31);
  const view = new DataView(new ArrayBuffer(4 * numbers.length));
  numbers.forEach((x, i) => (whole ? view.setInt32(4 * i, x, true) : view.setFloat32(4 * i, x, true)));
  const bytes = new Uint8Array(view.buffer);
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return { dtype: whole ? "int32" : "float32", shape: [numbers.length], base64: btoa(text) };
}

