// One question at a time, and only the newest answer counts: what the prediction follows the typing with.
//
//   ask(q)                  typing: waits for a pause, then gives up the question that is still running
//   ask(q, "sliding")       a slider: never gives up a running question, or a slow model would not answer until one lets go;
//                           the newest question waits until the running one is answered
//   ask(q, "now")           at once, giving up the running question
//   ask(q, "idle")          only if nothing else is asked or about to be; given up for anything else
//
// An answer that comes after a newer question was sent is dropped, whatever the order in which answers arrive.

export type Pace = "typing" | "sliding" | "now" | "idle";

export interface Ear<A> {
  answered(answer: A): void;
  failed(error: Error): void;
  busy?(now: boolean): void;
}

export class Follow<Q, A> {
  #send: (question: Q, signal: AbortSignal, serial: number) => Promise<A>;
  #ear: Ear<A>;
  #pause: number;
  #serial = 0;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #running: AbortController | null = null;
  #next: { question: Q } | null = null;
  #idle = false; // is it an idle question that runs?

  constructor(send: (question: Q, signal: AbortSignal, serial: number) => Promise<A>, ear: Ear<A>, pause = 150) {
    this.#send = send;
    this.#ear = ear;
    this.#pause = pause;
  }

  ask(question: Q, pace: Pace = "typing"): void {
    if (pace === "idle" && (this.#timer !== undefined || this.#running || this.#next)) return;
    this.#still();
    if (pace === "typing") this.#timer = setTimeout(() => { this.#timer = undefined; void this.#start(question); }, this.#pause);
    else if (pace === "sliding" && this.#running && !this.#idle) this.#next = { question };
    else void this.#start(question, pace === "idle");
  }

  /** Forget what was asked; an answer still to come is dropped. */
  stop(): void {
    this.#still();
    this.#serial++;
    this.#running?.abort();
    this.#running = null;
    this.#ear.busy?.(false);
  }

  async #start(question: Q, idle = false): Promise<void> {
    this.#idle = idle;
    this.#running?.abort();
    const mine = (this.#running = new AbortController());
    const serial = ++this.#serial;
    this.#ear.busy?.(true);
    let tell: () => void = () => {};
    try {
      const answer = await this.#send(question, mine.signal, serial);
      tell = () => this.#ear.answered(answer);
    } catch (error) {
      if (!outdated(error)) tell = () => this.#ear.failed(error as Error);
    }
    if (serial !== this.#serial) return;
    this.#running = null;
    tell();
    if (serial !== this.#serial) return; // who heard the answer asked on
    const next = this.#next;
    this.#next = null;
    if (next) void this.#start(next.question);
    else this.#ear.busy?.(false);
  }

  #still(): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.#next = null;
  }
}

/** Thrown for an answer that nobody waits for any more. */
export class Superseded extends Error {}

const outdated = (error: unknown) => error instanceof Superseded || (error as Error)?.name === "AbortError";
