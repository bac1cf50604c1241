// What can be done to a part of a model, and how it is said.
import { spoken } from "../lib/site";
import { number, visible } from "../lib/text";
import type { Edit, Kind, ModelCard } from "./types";

export interface Act { kind: Kind; name: string; says: string; range?: [low: number, high: number, step: number]; start: number; pair?: boolean }

export const ACTS: readonly Act[] = [
  { kind: "zero", name: "Zero", says: "switch it off: put zeros in its place", start: 1 },
  { kind: "mean", name: "Mean", says: "put its mean over the prompt in its place", start: 1 },
  { kind: "scale", name: "Scale", says: "multiply what it writes", range: [0, 3, 0.05], start: 0.5 },
  { kind: "steer", name: "Steer", says: "move it towards the second prompt, or along a random direction", range: [-4, 4, 0.1], start: 1 },
  { kind: "patch", name: "Patch", says: "put in its place what it is on the second prompt", start: 1, pair: true },
];
export const act = (kind: Kind) => ACTS.find((a) => a.kind === kind)!;

/** A new edit of a kind. Steering goes towards the second prompt where there is one, else along a random direction. */
export function made(component: string, kind: Kind, position: number | null, pair: boolean): Edit {
  return { component, kind, strength: act(kind).start, direction: kind === "steer" && !pair ? "random" : "contrast", position, seed: 0, on: true };
}

/** The list with an edit put in; one of the same part, kind and position takes the place of the older. */
export function withEdit(edits: readonly Edit[], edit: Edit): Edit[] {
  const same = (e: Edit) => e.component === edit.component && e.kind === edit.kind && e.position === edit.position;
  return edits.some(same) ? edits.map((e) => (same(e) ? edit : e)) : [...edits, edit];
}

export function said(edit: Edit, tokens: readonly string[] = []): string {
  const where = edit.position === null ? "" : ` at ${edit.position}${tokens[edit.position] === undefined ? "" : ` “${visible(tokens[edit.position])}”`}`;
  const what = { zero: "zeroed", mean: "set to its mean", scale: `times ${number(edit.strength)}`, steer: `steered ${number(edit.strength, undefined, true)} ${edit.direction === "random" ? "along a random direction" : "towards the second prompt"}`, patch: "patched from the second prompt" }[edit.kind];
  return `${spoken(edit.component)} ${what}${where}`;
}

/** Names of parts to offer while one is being typed. */
export function parts(model: ModelCard | undefined): string[] {
  if (!model) return [];
  const stacks = model.kind === "encoder-decoder" ? ["encoder.", "decoder."] : [""];
  const heads = model.layers * model.heads <= 2000 ? model.heads : 0;
  return stacks.flatMap((stack) => Array.from({ length: model.layers }, (_, i) => `${stack}layers.${i}`).flatMap((layer) => [
    `${layer}.resid_post`, `${layer}.attn.out`, `${layer}.mlp.out`, ...Array.from({ length: heads }, (_, h) => `${layer}.attn.heads.${h}`),
  ]));
}
