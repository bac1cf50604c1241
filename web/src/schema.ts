// Made by scripts/view_types.py from src/pellucid/views/schema.py. Do not edit.

/** The map of a model: its parts, what is proven of them, what is refused and why. */
export interface Anatomy {
  kind: "anatomy";
  model: string;
  stacks: Stack[];
  proofs: Proof[];
  refused?: Fact[];
}

/** Where heads look, in one stack or by choice in one of several. */
export interface Attention {
  kind: "attention";
  stacks: Looking[];
}

export interface Axis {
  name: string;
  labels: string[];
  components?: string[];
  positions?: number[];
  marked?: number[];
}

export interface Block {
  layers: number[];
  form: string;
  sites: string[];
  heads?: number;
  kv_heads?: number;
  neurons?: number;
  refused?: Fact[];
}

/** Who sends what to whom. */
export interface Circuit {
  kind: "circuit";
  nodes: Node[];
  sources: Numbers;
  targets: Numbers;
  ports: string[];
  scores: Numbers;
  about?: string;
}

export interface Code {
  python?: string;
  shell?: string;
}

export interface Column {
  name: string;
  numbers?: Numbers | null;
  texts?: string[] | null;
  bar?: number | null;
  tokens?: boolean;
}

export interface Context {
  tokens: string[];
  values: Numbers;
  note?: string;
}

/** Numbers that add up: what each part writes towards an answer. */
export interface Contributions {
  kind: "contributions";
  names: string[];
  components: string[];
  parts: string[];
  layer: Numbers;
  values: Numbers;
  total: number;
  unit: string;
  gap?: number;
}

/** Numbers along something, with their intervals. */
export interface Curves {
  kind: "curves";
  x: Ruler;
  y: Ruler;
  lines: Line[];
  levels?: Level[];
}

/** One view: its data, how to read it (`lead`), what can mislead (`care`), how to make it again, and its source. */
export interface Document {
  title: string;
  data: Neuron | Lens | Contributions | Traces | Attention | Tokens | Curves | Grid | Circuit | Anatomy | Table;
  "pellucid-view"?: 1;
  lead?: string;
  care?: string;
  code?: Code;
  provenance?: Origin;
}

export interface Effect {
  word: string;
  value: number;
}

export interface Fact {
  name: string;
  value: string;
}

export interface Flow {
  name: string;
  values: Numbers;
}

export interface Followed {
  word: string;
  rank: Numbers;
  log_probability: Numbers;
}

/** A number for every row and column: patching by layer and position, ablation by layer and head. */
export interface Grid {
  kind: "grid";
  rows: Axis;
  columns: Axis;
  planes: Plane[];
  unit: string;
  signed?: boolean;
  full?: number | null;
  prompts?: string[][];
  facts?: Fact[];
}

export interface Head {
  component: string;
  layer: number;
  head: number;
  role?: string;
}

/** What the model would say after each layer. */
export interface Lens {
  kind: "lens";
  tokens: string[];
  positions: number[];
  layers: string[];
  components: string[];
  words: string[];
  readings: Reading[];
  prediction: string[];
}

export interface Level {
  name: string;
  y: number;
}

export interface Line {
  name: string;
  x: Numbers;
  y: Numbers;
  low?: Numbers | null;
  high?: Numbers | null;
  dashed?: boolean;
}

export interface Looking {
  queries: string[];
  keys: string[];
  heads: Head[];
  pattern?: Numbers | null;
  rows?: Rows | null;
  name?: string;
  flows?: Flow[];
  first?: number;
  left_out?: number;
}

/** One neuron or feature: what excites it, how often, and what it writes. */
export interface Neuron {
  kind: "neuron";
  component: string;
  contexts: Context[];
  edges?: Numbers | null;
  counts?: Numbers | null;
  raises?: Effect[];
  lowers?: Effect[];
  facts?: Fact[];
}

export interface Node {
  component: string;
  label: string;
  type: string;
  layer: number;
  unit?: number;
  position?: string;
  group?: string;
}

/** An array of numbers; NaN where there is none. uint16 are whole numbers, uint8 stands for 0 to 1 in steps of 1/255. */
export interface Numbers {
  dtype: "float32" | "int32" | "uint16" | "uint8";
  shape: number[];
  base64: string;
}

export interface Origin {
  line?: string;
  facts?: Fact[];
}

export interface Plane {
  name: string;
  values: Numbers;
  low?: Numbers | null;
  high?: Numbers | null;
  component?: string;
  unit?: string;
}

export interface Proof {
  name: string;
  claim: string;
  holds: boolean | null;
  error?: number | null;
  detail?: string;
}

export interface Reading {
  name: string;
  top: Numbers;
  probability: Numbers;
  rank?: Numbers | null;
  kl?: Numbers | null;
  entropy?: Numbers | null;
  followed?: Followed[];
}

export interface Roc {
  false_positive: Numbers;
  true_positive: Numbers;
  area: number;
  low?: number | null;
  high?: number | null;
  control?: number | null;
  control_low?: number | null;
  control_high?: number | null;
}

export interface Rows {
  counts: Numbers;
  keys: Numbers;
  weights: Numbers;
  floor?: number;
}

export interface Ruler {
  name: string;
  log?: boolean;
  labels?: string[];
}

export interface Stack {
  name: string;
  width: number;
  blocks: Block[];
}

/** Any result, row by row. */
export interface Table {
  kind: "table";
  columns: Column[];
  rows: number;
  components?: string[];
}

/** A text whose tokens carry numbers: attributions by one or several methods, activations, surprise. */
export interface Tokens {
  kind: "tokens";
  tokens: string[];
  positions: number[];
  tracks: Track[];
  unit?: string;
  comparison?: Fact[];
  full?: number | null;
}

/** What a probe or monitor says at every token, by layer. */
export interface Traces {
  kind: "traces";
  tokens: string[];
  positions: number[];
  rows: Axis;
  values: Numbers;
  unit?: string;
  thresholds?: Numbers | null;
  rocs?: Roc[];
  signed?: boolean;
}

export interface Track {
  name: string;
  values: Numbers;
  signed?: boolean;
  note?: string;
}

export type View = Neuron | Lens | Contributions | Traces | Attention | Tokens | Curves | Grid | Circuit | Anatomy | Table;
export const VERSION = 1;
