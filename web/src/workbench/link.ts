// The state of the page as text for a link: `#w=` and the state as JSON, deflated, in the base64 of URLs. What comes out of a
// link or a file was written by anybody: `checked` takes over what has the right form and nothing else.
import type { Edit, PaneState, State } from "./types";

export const LIMIT = 200_000; // characters of a link that are read at all

export async function pack(state: State): Promise<string> {
  const bytes = await through(new TextEncoder().encode(JSON.stringify(state)), new CompressionStream("deflate-raw"));
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return `#w=${btoa(text).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "")}`;
}

/** The state in a link; null where there is none. Throws for one that cannot be read. */
export async function unpack(hash: string): Promise<State | null> {
  const found = /^#w=([A-Za-z0-9_-]+)$/.exec(hash);
  if (!found) return null;
  if (hash.length > LIMIT) throw new Error("the link is too long to be one of the workbench's");
  const text = atob(found[1].replaceAll("-", "+").replaceAll("_", "/"));
  const bytes = await through(Uint8Array.from(text, (c) => c.charCodeAt(0)), new DecompressionStream("deflate-raw"), 40 * LIMIT);
  return checked(JSON.parse(new TextDecoder().decode(bytes)));
}

async function through(bytes: Uint8Array, stream: CompressionStream | DecompressionStream, most = Infinity): Promise<Uint8Array> {
  const reader = new Blob([bytes as BlobPart]).stream().pipeThrough(stream as ReadableWritablePair<Uint8Array, Uint8Array>).getReader();
  const parts: Uint8Array[] = [];
  let size = 0;
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    parts.push(part.value);
    size += part.value.length;
    if (size > most) throw new Error("the link holds more than a workbench's state");
  }
  const all = new Uint8Array(size);
  let at = 0;
  for (const part of parts) { all.set(part, at); at += part.length; }
  return all;
}

type Loose = Record<string, unknown>;
const text = (x: unknown, most = 100_000) => (typeof x === "string" ? x.slice(0, most) : "");
const finite = (x: unknown, otherwise: number) => (typeof x === "number" && Number.isFinite(x) ? x : otherwise);
const whole = (x: unknown) => (typeof x === "number" && Number.isInteger(x) && x >= 0 ? x : null);
const among = <T extends string>(x: unknown, all: readonly T[]): T => (all.includes(x as T) ? (x as T) : all[0]);
const list = (x: unknown): Loose[] => (Array.isArray(x) ? x.filter((e) => e !== null && typeof e === "object") : []);

/** A state as it must be, made of what was given; throws where it is none at all. */
export function checked(given: unknown): State {
  const all = given as Loose;
  if (all?.version !== 1) throw new Error("this is not a workbench's state of version 1");
  const panes = list(all.panes).slice(0, 8).map((p): PaneState => ({
    pane: text(p.pane, 8), model: text(p.model, 300), prompt: text(p.prompt), other: typeof p.other === "string" ? text(p.other) : null,
    edits: list(p.edits).slice(0, 64).map(edit), views: (Array.isArray(p.views) ? p.views : []).map((v) => text(v, 40)),
    generate: Math.max(0, Math.min(64, Math.round(finite(p.generate, 0)))),
    temperature: Math.max(0.1, Math.min(4, finite(p.temperature, 1))), seed: whole(p.seed), answer: text(p.answer, 2000), word: text(p.word, 2000),
  }));
  const selection = (all.selection ?? {}) as Loose, neurons = (all.neurons ?? {}) as Loose;
  return {
    version: 1, panes,
    selection: { component: text(selection.component, 300) || null, position: whole(selection.position) },
    neurons: { sort: among(neurons.sort, ["activation", "effect"]), layer: whole(neurons.layer) },
  };
}

const edit = (e: Loose): Edit => ({
  component: text(e.component, 300), kind: among(e.kind, ["zero", "mean", "scale", "steer", "patch"]), strength: finite(e.strength, 1),
  direction: among(e.direction, ["contrast", "random"]), position: whole(e.position), seed: Math.round(finite(e.seed, 0)), on: e.on !== false,
});
