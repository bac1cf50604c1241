// One view on demand: asked for, shown, and out of date once the prompt or the edits have changed.
import type { Document } from "../schema";
import { Follow, type Pace } from "./follow";
import type { NeuronRow, ViewReply, ViewRequest } from "./types";

export class PanelStore {
  document = $state.raw<Document | null>(null);
  rows = $state.raw<NeuronRow[] | null>(null);
  note = $state("");
  error = $state("");
  busy = $state(false);
  #asked = $state("");
  #follow: Follow<ViewRequest, ViewReply>;

  constructor(send: (question: ViewRequest, signal: AbortSignal) => Promise<ViewReply>) {
    this.#follow = new Follow((question, signal) => send(question, signal), {
      answered: (reply) => { this.document = reply.document; this.rows = reply.rows ?? null; this.note = reply.note ?? ""; this.error = ""; },
      failed: (error) => { this.error = error.message; },
      busy: (now) => { this.busy = now; },
    }, 300);
  }

  /** Is what is shown the answer to another question than this one? */
  stale(question: ViewRequest): boolean {
    return this.#asked !== "" && this.#asked !== JSON.stringify(question);
  }

  ask(question: ViewRequest, pace: Pace = "now"): void {
    const key = JSON.stringify(question);
    if (key === this.#asked && !this.error) return;
    this.#asked = key;
    this.#follow.ask(question, pace);
  }

  stop(): void {
    this.#asked = "";
    this.#follow.stop();
  }
}
