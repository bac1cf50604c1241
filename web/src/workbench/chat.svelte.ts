// A conversation whose answers are watched while they are written, and may be steered; see Chat.svelte.
import type { Curves, Document, Numbers } from "../schema";
import { number } from "../lib/text";
import type { Api } from "./api";
import { Superseded } from "./follow";
import type { ChatEnd, ChatRequest, ChatStep, ModelCard, MonitorCard, Price, Turn } from "./types";

export class ChatStore {
  turns = $state.raw<Turn[]>([]); // said before the answer that is shown
  steps = $state.raw<ChatStep[]>([]);
  end = $state.raw<ChatEnd | null>(null);
  busy = $state(false);
  error = $state("");
  draft = $state("");
  template = $state(true); // in turns, or as a continuation of the text
  temperature = $state(0);
  tokens = $state(160);
  seed = $state(0);
  off = $state.raw<string[]>([]); // monitors that do not watch
  vector = $state("");
  strength = $state(0);
  plain = $state.raw<{ asked: string; perplexity: number } | null>(null); // of the last answer without steering
  asked = $state.raw<ChatRequest | null>(null);

  #api: Api;
  #pane: string;
  #running: AbortController | null = null;

  constructor(api: Api, pane: string) {
    this.#api = api;
    this.#pane = pane;
  }

  get text(): string {
    return this.steps[this.steps.length - 1]?.text ?? "";
  }

  watching(model: ModelCard): MonitorCard[] {
    return model.chat.monitors.filter((m) => !this.off.includes(m.name));
  }

  /** Say something, and let the model answer. */
  say(model: ModelCard): Promise<void> {
    const said = this.draft;
    if (!said.trim()) return Promise.resolve();
    const before: Turn[] = this.end && this.template ? [...this.turns, { role: "assistant", content: this.end.shown }] : this.template ? this.turns : [];
    this.draft = this.template ? "" : said;
    this.turns = [...before, { role: "user", content: said }];
    return this.write(model);
  }

  /** The answer to what was said last, written (anew). */
  async write(model: ModelCard): Promise<void> {
    this.#running?.abort();
    const mine = (this.#running = new AbortController());
    const asked: ChatRequest = {
      tab: this.#api.tab, pane: this.#pane, model: model.id, turns: this.turns, chat: this.template && model.chat.template, monitors: this.watching(model).map((m) => m.name),
      vector: this.vector || null, strength: this.strength, temperature: this.temperature, max_new_tokens: this.tokens, seed: this.seed,
    };
    Object.assign(this, { asked, steps: [], end: null, error: "", busy: true });
    try {
      const end = await this.#api.chat(asked, mine.signal, (step) => { if (mine === this.#running) this.steps = [...this.steps, step]; });
      if (mine !== this.#running) return;
      this.end = end;
      if (!(asked.vector && asked.strength) && end.perplexity !== null) this.plain = { asked: question(asked), perplexity: end.perplexity };
    } catch (error) {
      if (mine !== this.#running || error instanceof Superseded || (error as Error).name === "AbortError") return;
      this.error = (error as Error).message;
    }
    this.busy = false;
  }

  /** Perplexity of the answer to the same question without steering, where that was written. */
  get unsteered(): number | null {
    return this.plain && this.asked && this.plain.asked === question(this.asked) ? this.plain.perplexity : null;
  }

  stop(): void {
    if (!this.busy) return;
    this.#running?.abort();
    this.#running = null;
    this.busy = false;
    const text = this.text;
    this.end = { text, shown: text, replaced: false, ended: "you", acted: [], tokens: this.steps.length, document: null, perplexity: null, repetition: null };
  }

  clear(): void {
    this.stop();
    Object.assign(this, { turns: [], steps: [], end: null, error: "", plain: null });
  }
}

/** What an answer without steering depends on. */
const question = (asked: ChatRequest) => JSON.stringify({ ...asked, vector: null, strength: 0, monitors: [] });

const does = (done: string) => ({ stop: "stop", say: "said something else", recorded: "recorded", redirect: "changed the course" })[done] ?? done;

/** Why an answer ended, in a sentence. */
export function reason(end: ChatEnd): string {
  if (end.ended === "you") return "You stopped it.";
  const said = end.acted.map((a) => `${a.monitor} read ${number(a.statistic, 3)}, above its threshold of ${number(a.threshold, 3)}, before token ${a.token + 1} (${does(a.does)}).`).join(" ");
  const ended = end.replaced ? "Replaced." : end.ended === "watcher" ? "Stopped." : end.ended === "length" ? `It ended at ${end.tokens} tokens, the most that were asked for.` : `It ended by itself after ${end.tokens} tokens.`;
  return [ended, said].filter(Boolean).join(" ");
}

/** The row of a sweep nearest to a strength; strength 0 has no price. */
export function priceAt(prices: readonly Price[], strength: number): Price | null {
  if (!strength) return null;
  const same = prices.filter((p) => Math.sign(p.strength) === Math.sign(strength));
  return same.reduce<Price | null>((best, p) => (!best || Math.abs(p.strength - strength) < Math.abs(best.strength - strength) ? p : best), null);
}

/** What one monitor read so far, as a document for the view of curves. */
export function trace(monitor: MonitorCard, index: number, steps: readonly ChatStep[], end: ChatEnd | null): Document {
  const y = steps.map((s) => s.statistic[index] ?? NaN), at = steps.findIndex((s) => s.fired[index]);
  const done = end?.acted.find((a) => a.monitor === monitor.name)?.does;
  const title = at < 0 ? `${monitor.name}: no alarm` : `${monitor.name}: fired before token ${at + 1}${done ? ` (${does(done)})` : ""}`;
  const x = numbers(steps.map((_, i) => i));
  const lines: Curves["lines"] = [{ name: `${monitor.name} (${monitor.rule || "rule"} over the ${monitor.reads})`, x, y: numbers(y) }];
  if (at >= 0) lines.push({ name: "fired", x: numbers([at]), y: numbers([y[at]]) });
  const labels = steps.map((s) => s.token || "…");
  return {
    "pellucid-view": 1, title,
    data: {
      kind: "curves", x: { name: "token", labels }, y: { name: "score" }, lines,
      levels: monitor.threshold === null ? [] : [{ name: "threshold", y: monitor.threshold }],
    },
  };
}

function numbers(values: number[]): Numbers {
  const bytes = new Uint8Array(new Float32Array(values).buffer);
  return { dtype: "float32", shape: [values.length], base64: btoa(String.fromCharCode(...bytes)) };
}
