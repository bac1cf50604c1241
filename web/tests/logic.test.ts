import { describe, expect, test } from "vitest";
import { fit, squeeze, svgBrush, xml } from "../src/lib/brush";
import { amount, contrast, signed } from "../src/lib/colour";
import { draw, type Heat, hit, layout, step } from "../src/lib/heat";
import { extent, list, steady, values } from "../src/lib/numbers";
import { patterns } from "../src/lib/patterns";
import { csv } from "../src/lib/saving";
import { parse, related, spoken } from "../src/lib/site";
import { kindOf, KINDS } from "../src/kinds";
import { pack } from "../src/lib/tables";
import { cell, number, percent, tick, visible } from "../src/lib/text";
import { ticks } from "../src/lib/ticks";
import { portAt, ranked, wiring } from "../src/lib/wiring";
import type { Circuit, Lens, Looking, View } from "../src/schema";

describe("numbers", () => {
  test("arrays come back as they were packed, missing ones as NaN", () => {
    expect(list(pack([1, -2, 3]))).toEqual([1, -2, 3]);
    expect(list(pack([0.5, NaN]))).toEqual([0.5, NaN]);
    const grid = values({ ...pack([1, 2, 3, 4, 5, 6]), shape: [2, 3] });
    expect([grid.at(1, 0), grid.at(0, 2), grid.at(2, 0), grid.at(0, -1)]).toEqual([4, 3, NaN, NaN]);
  });
  test("bytes stand for 0 to 1", () => expect(list({ dtype: "uint8", shape: [3], base64: btoa("\x00\x33\xff") })).toEqual([0, 0.2, 1]));
  test("float32 is read as little-endian", () => expect(list({ dtype: "float32", shape: [1], base64: btoa("\x00\x00\x80\x3f") })).toEqual([1]));
  test("an array that is shorter than its shape is an error, not zeros", () => expect(() => values({ ...pack([1]), shape: [2] })).toThrow(/shape/));
  test("one outlier among hundreds does not bleach the rest", () => {
    expect(extent([...Array(400).fill(1), 1000])).toBe(1);
    expect(extent([NaN, -3, 2])).toBe(3);
    expect(extent([])).toBe(1);
    expect(steady([1, -1, 2, 1, 400, -390])).toBe(16);
    expect(steady([1, -3, 2])).toBe(3);
    expect(steady([0, 0, 0, 5])).toBe(5);
  });
});

describe("text", () => {
  test("what cannot be seen in a token is made visible", () => {
    expect(visible(" Paris")).toBe("␣Paris");
    expect(visible("\n  ")).toBe("⏎␣␣");
    expect(visible("a\u202eb")).toBe("a\\u202eb");
    expect(visible("new york")).toBe("new york");
    expect(visible("")).toBe("∅");
  });
  test("numbers carry as many digits as they need", () => {
    expect([number(-0.251, 2), number(3, 2, true), number(-0.001, 2), number(NaN), number(1e-9)]).toEqual(["−0.25", "+3.00", "0.00", "", "1.0e−9"]);
    expect([cell(0.251, 1), cell(-0.001, 1), cell(NaN, 1)]).toEqual([".25", "·", ""]);
    expect([percent(0.702), percent(0.0312), percent(0.0002), percent(0.9996), percent(1)]).toEqual(["70%", "3.1%", "<0.1%", ">99.9%", "100%"]);
    expect([tick(0.8), tick(-0.5), tick(0)]).toEqual(["0.8", "−0.5", "0"]);
  });
  test("ticks are round and inside", () => {
    expect(ticks(0, 1, 5)).toEqual([0, 0.2, 0.4, 0.6, 0.8, 1]);
    expect(ticks(0.001, 1, 5, true)).toEqual([0.001, 0.01, 0.1, 1]);
    for (const t of ticks(-3.7, 9.2, 6)) expect(t).toBeGreaterThanOrEqual(-3.7);
  });
});

describe("colours", () => {
  for (const theme of ["light", "dark"] as const)
    test(`every step of both scales has text that can be read on it (${theme})`, () => {
      for (let t = -1; t <= 1; t += 1 / 64)
        for (const paint of [signed(t, theme)!, amount(Math.abs(t), theme)!]) expect(contrast(paint.fill, paint.ink)).toBeGreaterThan(4.5);
    });
  test("a larger amount is further from the paper", () => {
    for (const theme of ["light", "dark"] as const)
      for (const scale of [amount, signed, (t: number, th: "light" | "dark") => signed(-t, th)]) {
        const away = [0, 0.25, 0.5, 0.75, 1].map((t) => contrast(scale(t, theme)!.fill, scale(0, theme)!.fill));
        expect(away).toEqual([...away].sort((a, b) => a - b));
      }
  });
  test("no number has no colour", () => expect(signed(NaN, "light")).toBeNull());
});

describe("sites", () => {
  test("a site says its layer and unit", () => {
    expect(parse("decoder.layers.5.attn.heads.9")).toEqual({ stack: "decoder", layer: 5, part: "attn", unit: 9 });
    expect(parse("layers.3.resid_post")).toEqual({ stack: "", layer: 3, part: "resid_post", unit: -1 });
    expect(spoken("layers.5.attn.heads.9")).toBe("head 5.9");
    expect(spoken("layers.5.mlp.neurons.12")).toBe("neuron 5.12");
  });
  test("a head is itself however it is written, part of its attention, and of its layer; not of another", () => {
    expect(related("layers.5.attn.heads.9", "layers.5.attn.z_out.9")).toBe(2);
    expect(related("layers.5.attn.heads.9", "layers.5.attn.out")).toBe(1);
    expect(related("layers.5.attn.heads.9", "layers.5.resid_post")).toBe(1);
    expect(related("layers.5.attn.heads.9", "layers.5.attn.heads.8")).toBe(0);
    expect(related("layers.5.attn.heads.9", "layers.5.mlp.out")).toBe(0);
    expect(related("encoder.layers.5.mlp.out", "layers.5.mlp.out")).toBe(0);
  });
});

const heat = (rows: number, columns: number): Heat => ({
  rows: Array.from({ length: rows }, (_, i) => String(i)), columns: Array.from({ length: columns }, (_, i) => `t${i}`), rowName: "layer", columnName: "token",
  cell: { width: [40, 80], height: 20 }, paint: () => ({ fill: "#ffffff", ink: "#000000" }), text: (i, j) => `${i},${j}`, tell: () => ({ title: "", lines: [] }),
});

describe("heat", () => {
  test("keys stay inside the grid", () => {
    expect(step("ArrowUp", [0, 0], 3, 4)).toEqual([0, 0]);
    expect(step("ArrowRight", [0, 0], 3, 4)).toEqual([0, 1]);
    expect(step("End", [1, 0], 3, 4)).toEqual([1, 3]);
    expect(step("x", [1, 0], 3, 4)).toBeNull();
  });
  test("the cell under the pointer is the one drawn there, scrolled or not", () => {
    const h = heat(30, 512), at = layout(h, 600);
    expect(hit(h, at, at.left + 1, at.top + 1, 0, 0)).toEqual([0, 0]);
    expect(hit(h, at, at.left + 1, at.top + 1, 10 * at.w, 5 * at.h)).toEqual([5, 10]);
    expect(hit(h, at, 2, at.top + 1, 0, 0)).toBeNull();
  });
  test("of a long prompt only what is in sight is drawn", () => {
    const h = heat(30, 512), at = layout(h, 600), brush = svgBrush();
    draw(brush, h, at, { paper: "#fff", ink: "#000", soft: "#888", accent: "#00f", rule: "#ccc" }, 100 * at.w, 0, 600, 400);
    const svg = brush.svg(600, 400, "#fff");
    expect(svg).toContain(">0,100<");
    expect(svg).not.toContain(">0,0<");
    expect((svg.match(/<rect/g) ?? []).length).toBeLessThan(600);
  });
  test("a number that has no room loses digits, not its meaning", () => {
    expect(squeeze("−1.37", 100, 10)).toBe("−1.37");
    expect(squeeze("−1.37", 5.5 * 4, 10)).toBe("−1.4");
    expect(squeeze("−1.37", 5.5 * 2, 10)).toBe("−1");
  });
  test("text is cut where there is no room, and markup in it stays text", () => {
    expect(fit("abcdefghij", 30, 10)).toMatch(/^abc?d?…$/);
    expect(xml("<script>&\u0000")).toBe("&lt;script&gt;&amp;\ufffd");
  });
});

const circuit: Circuit = {
  kind: "circuit", about: "",
  nodes: [
    { component: "embed", label: "embed", type: "embed", layer: -1 },
    { component: "layers.0.attn.heads.0", label: "0.0", type: "head", layer: 0, unit: 0 },
    { component: "layers.0.attn.heads.1", label: "0.1", type: "head", layer: 0, unit: 1 },
    { component: "layers.0.mlp", label: "MLP 0", type: "mlp", layer: 0 },
    { component: "logits", label: "logits", type: "logits", layer: 1 },
  ],
  sources: pack([0, 0, 1, 2, 3]), targets: pack([1, 2, 3, 4, 4]), ports: ["q", "v", "", "", ""], scores: pack([0.5, -2, 0.1, 1.5, 0.3]),
};

describe("circuit", () => {
  test("edges are ranked by size", () => expect(ranked(circuit).map((w) => w.score)).toEqual([-2, 1.5, 0.5, expect.closeTo(0.3), expect.closeTo(0.1)]));
  test("weak edges take their loose nodes with them, depth runs upwards, boxes do not overlap", () => {
    const two = wiring(circuit, ranked(circuit).slice(0, 2), new Map(), 400);
    expect(two.boxes.map((b) => b.label).sort()).toEqual(["0.1", "embed", "logits"]);
    const all = wiring(circuit, ranked(circuit), new Map(), 400);
    const y = Object.fromEntries(all.boxes.map((b) => [b.label, b.y]));
    expect(y.embed).toBeGreaterThan(y["0.0"]);
    expect(y["0.0"]).toBeGreaterThan(y.logits);
    for (const a of all.boxes) for (const b of all.boxes) if (a !== b && a.y === b.y) expect(a.x + a.width <= b.x || b.x + b.width <= a.x).toBe(true);
  });
  test("nodes of one name become one box whose edges add up", () => {
    const one = wiring(circuit, ranked(circuit), new Map([[1, "movers"], [2, "movers"]]), 400);
    expect(one.boxes.filter((b) => b.label === "movers")).toHaveLength(1);
    const into = one.wires.filter((w) => one.boxes[w.target].label === "movers");
    expect(into).toHaveLength(1);
    expect(into[0].score).toBeCloseTo(-1.5);
  });
  test("parts at the same position stand in one column", () => {
    const nodes = circuit.nodes.map((n, i) => ({ ...n, position: i % 2 ? "subject" : "end" }));
    const { boxes, columns } = wiring({ ...circuit, nodes }, ranked(circuit), new Map(), 600);
    expect(columns.map((c) => c.position)).toEqual(["end", "subject"]);
    for (const b of boxes) expect(b.x >= columns[1].x).toBe(b.position === "subject");
  });
  test("a query's wire ends left of a value's", () => {
    const { boxes } = wiring(circuit, ranked(circuit), new Map(), 400), head = boxes.find((b) => b.label === "0.0")!;
    expect(portAt(head, "q")).toBeLessThan(portAt(head, "v"));
  });
});

describe("attention", () => {
  // one head, three tokens: [1 0 0] [.5 .5 0] [0 .2 .8], whole and in rows
  const tokens = { queries: ["a", "b", "c"], keys: ["a", "b", "c"], heads: [{ component: "layers.0.attn.heads.0", layer: 0, head: 0 }] };
  const whole: Looking = { ...tokens, pattern: { dtype: "uint8", shape: [1, 3, 3], base64: btoa(String.fromCharCode(255, 0, 0, 128, 128, 0, 0, 51, 204)) } };
  const short = (n: number[]) => btoa(n.map((x) => String.fromCharCode(x & 255, x >> 8)).join(""));
  const rows: Looking = { ...tokens, rows: { floor: 0, counts: { dtype: "uint16", shape: [1, 3], base64: short([1, 2, 2]) }, keys: { dtype: "uint16", shape: [5], base64: short([0, 0, 1, 1, 2]) },
    weights: { dtype: "uint8", shape: [5], base64: btoa(String.fromCharCode(255, 128, 128, 51, 204)) } } };
  test("rows say what the whole pattern says", () => {
    for (let q = 0; q < 3; q++) for (let k = 0; k < 3; k++) expect(patterns(rows).at(0, q, k)).toBeCloseTo(patterns(whole).at(0, q, k), 6);
    expect(patterns(rows).at(0, 3, 0)).toBeNaN();
    expect([...patterns(rows).small(0, 1, 3)]).toEqual([...patterns(whole).small(0, 1, 3)]);
    const seen: number[] = [];
    patterns(rows).each(0, 0.3, (q, k) => seen.push(10 * q + k));
    expect(seen).toEqual([0, 10, 11, 22]);
  });
});

describe("tables", () => {
  const lens: Lens = {
    kind: "lens", tokens: ["a", "b"], positions: [0, 1], layers: ["0"], components: ["layers.0.resid_post"], words: ["x", "y"], prediction: ["x", "y"],
    readings: [{ name: "logit", top: { ...pack([0, 1]), shape: [1, 2, 1] }, probability: { ...pack([0.25, 0.5]), shape: [1, 2, 1] } }],
  };
  test("every drawing has a table with one cell per column and row", () => {
    const views: View[] = [circuit, lens, { kind: "tokens", tokens: ["a"], positions: [0], tracks: [{ name: "t", values: pack([0.5]) }] },
      { kind: "curves", x: { name: "x" }, y: { name: "y" }, lines: [{ name: "l", x: pack([1]), y: pack([2]) }] }];
    for (const view of views) {
      const table = kindOf(view)!.table(view);
      expect(table.rows).toBeGreaterThan(0);
      for (const c of table.columns) expect((c.numbers ? list(c.numbers) : c.texts!).length).toBe(table.rows);
    }
    expect(KINDS.lens.table(lens).columns.find((c) => c.name === "best guess")!.texts).toEqual(["x", "y"]);
  });
  test("a kind is added in one row", () => {
    const made = { kind: "made-up", words: ["a", "b"] } as unknown as View, kinds = KINDS as unknown as Record<string, (typeof KINDS)["table"]>;
    expect(kindOf(made)).toBeUndefined();
    kinds["made-up"] = { read: "", table: (v) => ({ kind: "table", rows: 2, columns: [{ name: "word", texts: (v as unknown as { words: string[] }).words }] }) };
    expect(kindOf(made)!.table(made).columns[0].texts).toEqual(["a", "b"]);
    delete kinds["made-up"];
  });
  test("a spreadsheet cannot be made to run what a token says", () => {
    const text = csv({ kind: "table", rows: 2, columns: [{ name: "t", texts: ['=cmd("x")', 'a,"b"\n'] }, { name: "n", numbers: pack([-1, NaN]) }] });
    expect(text).toBe('t,n\r\n"\'=cmd(""x"")",-1\r\n"a,""b""\n",\r\n');
  });
});
