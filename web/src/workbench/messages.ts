// Made by scripts/view_types.py from src/pellucid/workbench/messages.py. Do not edit.

import type { Document } from "../schema";

/** A strength of a vector that a sweep has tried: its effect on the judge, the furthest of the random vectors either way, and the perplexity of what was written, beside that of the model as it is. */
export interface Price {
  strength: number;
  effect: number;
  random_low: number;
  random_high: number;
  perplexity: number;
  base_perplexity: number;
}

/** A vector that may steer; `prices` of a sweep that was saved with it, `judge` what its effect was measured by. */
export interface VectorCard {
  name: string;
  site: string;
  judge: string;
  prices: Price[];
}

/** A monitor that may watch: its threshold and what that promises, which tokens count, and what it does. */
export interface MonitorCard {
  name: string;
  threshold: number | null;
  promise: string;
  reads: string;
  rule: string;
  does: string;
  sites: string[];
}

/** Who may watch and steer an answer of a model; `refused`: why it writes none. */
export interface ChatCard {
  refused: string;
  template: boolean;
  monitors: MonitorCard[];
  vectors: VectorCard[];
}

/** What can be asked about: an answer of this kind ("" where there is only one), with the `names` it is chosen from. */
export interface AnswerCard {
  kind: "" | "class" | "label" | "span" | "text" | "word";
  names: string[];
}

/** What the page knows of a model before it runs anything. */
export interface ModelCard {
  id: string;
  name: string;
  kind: "decoder" | "encoder" | "encoder-decoder";
  layers: number;
  heads: number;
  neurons: number;
  parameters: number;
  limit: number | null;
  generates: boolean;
  chat: ChatCard;
  answers: AnswerCard;
}

/** Which models are open here. */
export interface Models {
  models: ModelCard[];
  version: string;
}

/** What is done to a part of the model. `strength` is the factor of "scale", and of "steer" how many times the direction is added; `position` None is every position. */
export interface Edit {
  component: string;
  kind: "mean" | "patch" | "scale" | "steer" | "zero";
  strength?: number;
  direction?: "contrast" | "random";
  position?: number | null;
  seed?: number;
  on?: boolean;
}

/** A prompt as it is being typed; a newer one of the same tab and pane takes its place. Probabilities are those at a `temperature`; the text that goes on is the likeliest or, with a `seed`, drawn at it. */
export interface LiveRequest {
  tab: string;
  pane: string;
  model: string;
  prompt: string;
  other?: string | null;
  edits?: Edit[];
  lens?: boolean;
  generate?: number;
  temperature?: number;
  seed?: number | null;
  serial?: number;
}

/** An edit that is about to be made: can it be, on this model and these prompts? */
export interface EditRequest {
  tab: string;
  pane: string;
  model: string;
  edit: Edit;
  prompt?: string;
  other?: string | null;
}

/** One possible answer. */
export interface Choice {
  token: string;
  probability: number;
  logit: number;
  id: number;
}

/** What the model answers: its likeliest tokens (or classes), how sure it is (entropy in nats), how it goes on. */
export interface Answer {
  top: Choice[];
  entropy: number;
  generated: string;
  difference: number | null;
}

/** Where the time went: waiting for the model, in its passes, and in all. */
export interface Milliseconds {
  queue: number;
  forward: number;
  total: number;
}

/** The answer without and with the edits; `pair` are the two answers that `difference` compares, if there is a second prompt. With `more`, columns of the lens are left to compute: ask again for them. */
export interface LiveReply {
  serial: number;
  tokens: string[];
  clean: Answer;
  edited: Answer | null;
  lens: Document | null;
  milliseconds: Milliseconds;
  pair: string[];
  more: boolean;
  note: string;
}

/** A panel to be drawn. `answer` is what it is about: a word, a class or label by its name, words of the prompt, or for sentence embeddings a text to be similar to; empty, what the model says. `word` is the one whose label is asked for. */
export interface ViewRequest {
  tab: string;
  pane: string;
  model: string;
  view: "anatomy" | "attention" | "contributions" | "heads" | "neuron" | "neurons" | "patching" | "tokens";
  prompt: string;
  other?: string | null;
  edits?: Edit[];
  options?: Record<string, unknown>;
  answer?: string;
  word?: string;
}

/** One neuron on one token: its activation, and its direct effect on the answer. */
export interface NeuronRow {
  component: string;
  layer: number;
  neuron: number;
  position: number;
  activation: number;
  effect: number | null;
}

/** A panel; `note` is what a reader should know of it. `rows` come with "neurons" only. */
export interface ViewReply {
  document: Document;
  note: string;
  rows: NeuronRow[] | null;
}

/** What somebody said. */
export interface Turn {
  role: "assistant" | "system" | "user";
  content: string;
}

/** An answer to be written; a newer one of the same tab and pane takes its place. `chat`: in the turns of the tokenizer's template, else as a continuation of the text. `monitors` and `vector` by name; temperature 0 takes the likeliest token. */
export interface ChatRequest {
  tab: string;
  pane: string;
  model: string;
  turns: Turn[];
  chat?: boolean;
  monitors?: string[];
  vector?: string | null;
  strength?: number;
  temperature?: number;
  max_new_tokens?: number;
  seed?: number;
}

/** A token of the answer and the `text` so far, with what a monitor says `instead` of it; for each monitor its `statistic` before that token was written, and whether it fired. */
export interface ChatStep {
  step: number;
  token: string;
  text: string;
  instead: string;
  statistic: (number | null)[];
  fired: boolean[];
}

/** A monitor that fired before `token` (counted from 0): its statistic there, the threshold, and what it did. */
export interface Acted {
  monitor: string;
  token: number;
  statistic: number;
  threshold: number;
  does: string;
}

/** The end of an answer: why, what was written and what a reader is `shown` (where it was `replaced` another text), the monitors that fired, the view of the firings, and the text's perplexity and repetition under the model without steering. */
export interface ChatEnd {
  text: string;
  shown: string;
  replaced: boolean;
  ended: string;
  acted: Acted[];
  tokens: number;
  document: Document | null;
  perplexity: number | null;
  repetition: number | null;
}

/** Work that takes longer. */
export interface JobRequest {
  tab: string;
  model: string;
  kind: "circuit" | "head_ablation" | "neuron_ablation" | "patching";
  prompt: string;
  other?: string | null;
  options?: Record<string, unknown>;
  answer?: string;
  word?: string;
}

/** The job that was started. */
export interface Started {
  id: string;
}

/** How far a job is; `document` once it is done. */
export interface Job {
  id: string;
  kind: "circuit" | "head_ablation" | "neuron_ablation" | "patching";
  title: string;
  model: string;
  prompt: string;
  state: "cancelled" | "done" | "failed" | "queued" | "running";
  done: number;
  total: number | null;
  error: string;
  seconds: number;
  document: Document | null;
}

/** All jobs of this server, the newest first. */
export interface Jobs {
  jobs: Job[];
}

/** One prompt and what is looked at; `model` is a name. */
export interface Pane {
  pane: string;
  model: string;
  prompt: string;
  other?: string | null;
  edits?: Edit[];
  views?: string[];
  generate?: number;
  temperature?: number;
  seed?: number | null;
  answer?: string;
  word?: string;
}

/** What is selected in every view. */
export interface Selection {
  component?: string | null;
  position?: number | null;
}

/** All that a workspace, a link or a notebook needs to come back to the same place. */
export interface State {
  panes: Pane[];
  version?: 1;
  selection?: Selection;
  neurons?: Record<string, unknown>;
}

/** What a workspace file holds. */
export interface Workspace {
  state: State;
  documents?: Document[];
}

/** A saved workspace; `modified` in seconds since 1970. */
export interface WorkspaceEntry {
  name: string;
  modified: number;
}

/** The saved workspaces. */
export interface Workspaces {
  folder: string;
  workspaces: WorkspaceEntry[];
}

/** Views to be written into one HTML file. */
export interface PageRequest {
  title?: string;
  documents?: Document[];
}

/** What went wrong, in one sentence. */
export interface Problem {
  error: string;
  superseded: boolean;
}
