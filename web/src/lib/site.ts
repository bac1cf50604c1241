// The addresses of a model's parts, as far as views need them: `decoder.layers.5.attn.heads.9`.

export interface Site {
  stack: string;
  layer: number; // -1: not in a layer
  part: string; // "attn", "mlp", "resid_post" ...
  unit: number; // -1: none
}

export function parse(component: string): Site {
  const m = /^(?:(\w+)\.)?layers\.(\d+)(?:\.([\w#]+))?(?:\.(?:heads|kv_heads|neurons|z_out|experts))?(?:\.(\d+))?/.exec(component);
  if (!m) return { stack: "", layer: -1, part: component, unit: -1 };
  return { stack: m[1] ?? "", layer: +m[2], part: m[3] ?? "", unit: m[4] === undefined ? -1 : +m[4] };
}

/** `layers.5.attn.heads.9` as people say it: head 5.9. */
export function spoken(component: string): string {
  const s = parse(component);
  if (s.layer < 0) return component;
  const area = s.part.split("#")[0];
  const name = s.unit >= 0 ? ({ attn: "head", cross: "cross head", mlp: "neuron" }[area] ?? area)
    : ({ attn: "attention", mlp: "MLP", cross: "cross-attention", resid_post: "after layer", resid_pre: "before layer", resid_mid: "inside layer", "": "layer" }[area] ?? area);
  return [s.stack, name, s.unit >= 0 ? `${s.layer}.${s.unit}` : s.layer].filter((x) => x !== "").join(" ");
}

/** 2: the same part; 1: one holds the other (a layer and its head); 0: unrelated. */
export function related(a: string | null | undefined, b: string | null | undefined): 0 | 1 | 2 {
  if (!a || !b) return 0;
  if (a === b) return 2;
  const x = parse(a), y = parse(b);
  if (x.layer < 0 || x.layer !== y.layer || x.stack !== y.stack) return 0;
  if (x.part.split("#")[0] === y.part.split("#")[0]) return x.unit === y.unit ? 2 : x.unit < 0 || y.unit < 0 ? 1 : 0;
  return [x.part, y.part].some((p) => p === "" || p.startsWith("resid")) ? 1 : 0;
}
