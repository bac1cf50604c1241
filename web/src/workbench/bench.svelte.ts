// The whole page: its models, panes and selection; the state that goes into links and files; the jobs of the server.
import type { Document } from "../schema";
import type { Api } from "./api";
import { checked, pack, unpack } from "./link";
import { FRESH, PaneStore } from "./pane.svelte";
import type { Job, ModelCard, State } from "./types";
import { views } from "./views";

export const START = "The capital of France is";

export class Bench {
  readonly api: Api;
  models = $state.raw<ModelCard[]>([]);
  version = $state("");
  panes = $state.raw<PaneStore[]>([]);
  component = $state<string | null>(null);
  place = $state.raw<{ position: number; token: string } | null>(null);
  jobs = $state.raw<Job[]>([]);
  results = $state.raw<Record<string, Document>>({});
  message = $state(""); // one sentence for everybody, said aloud as well
  failed = $state("");
  #saving: ReturnType<typeof setTimeout> | undefined;
  #polling: ReturnType<typeof setTimeout> | undefined;
  #awaited = new Set<string>(); // jobs whose end is told and shown, however soon it comes
  #hash = "";
  #position: number | null = null; // a selection that waits for the tokens

  constructor(api: Api) {
    this.api = api;
    views().page.onselect(() => {
      this.component = views().page.component;
      this.place = views().page.place;
      this.changed();
    });
  }

  async start(): Promise<void> {
    try {
      const { models, version } = await this.api.models();
      this.models = models;
      this.version = version;
      let state: State | null = null;
      try {
        state = await unpack(location.hash);
      } catch {
        this.message = "The link could not be read; this is a fresh page.";
      }
      this.restore(state ?? this.#fresh());
    } catch (error) {
      this.failed = (error as Error).message;
    }
    void this.poll();
  }

  #fresh(): State {
    const pane = { ...FRESH, pane: "a", model: this.models[0].name, prompt: this.models[0].generates ? START : "" };
    return { version: 1, panes: [pane], selection: { component: null, position: null }, neurons: { sort: "effect", layer: null } };
  }

  get state(): State {
    return {
      version: 1, panes: this.panes.map((p) => p.state), selection: { component: this.component, position: this.place?.position ?? null },
      neurons: this.panes[0]?.neurons ?? { sort: "effect", layer: null },
    };
  }

  get documents(): Document[] {
    return [...this.panes.flatMap((p) => p.documents), ...Object.values(this.results)];
  }

  /** Make the page what a state says. A model that is not open here is replaced by the first one, which the page says. */
  restore(given: unknown): void {
    const state = checked(given);
    if (!state.panes.length) state.panes = this.#fresh().panes;
    this.panes.forEach((p) => p.stop());
    const missing = new Set<string>();
    this.panes = state.panes.map((p, i) => {
      const model = this.models.find((m) => m.name === p.model) ?? (missing.add(p.model), this.models[0]);
      const pane = new PaneStore(this.api, model, { ...p, pane: String.fromCharCode(97 + i) }, () => this.changed());
      pane.neurons = state.neurons;
      return pane;
    });
    if (missing.size) this.message = `Not open here: ${[...missing].join(", ")}. Shown with ${this.models[0].name} instead.`;
    this.#position = state.selection.position;
    this.select(state.selection.component, null);
    for (const pane of this.panes) {
      pane.ask();
      pane.views.forEach((view) => pane.draw(view));
    }
  }

  select(component: string | null | undefined, place?: { position: number; token: string } | null): void {
    views().page.select(component, place, false);
  }

  /** A restored selection names a position only; its token is known once the model has answered. */
  settle(tokens: readonly string[]): void {
    const position = this.#position;
    this.#position = null;
    if (position !== null && tokens[position] !== undefined) this.select(undefined, { position, token: tokens[position] });
  }

  addPane(): void {
    const last = this.panes[this.panes.length - 1];
    const model = this.models[(this.models.indexOf(last.model) + 1) % this.models.length];
    const used = this.panes.map((p) => p.id);
    const id = [..."abcdefgh"].find((c) => !used.includes(c));
    if (!id) return;
    const pane = new PaneStore(this.api, model, { ...last.state, pane: id, model: model.name }, () => this.changed());
    this.panes = [...this.panes, pane];
    pane.ask();
    pane.views.forEach((view) => pane.draw(view));
  }

  removePane(pane: PaneStore): void {
    pane.stop();
    this.panes = this.panes.filter((p) => p !== pane);
    this.changed();
  }

  async link(): Promise<string> {
    return `${location.origin}/${await pack(this.state)}`;
  }

  /** The address follows the state, so that a reload comes back to it. */
  changed(): void {
    clearTimeout(this.#saving);
    this.#saving = setTimeout(() => void this.keep(), 400);
  }

  async keep(): Promise<void> {
    clearTimeout(this.#saving);
    this.#hash = await pack(this.state);
    if (this.#hash !== location.hash) history.replaceState(null, "", this.#hash);
  }

  /** Somebody put another state behind the address: show it. */
  async follow(): Promise<void> {
    if (location.hash === this.#hash) return;
    try {
      const state = await unpack(location.hash);
      if (state) this.restore(state);
    } catch {
      this.message = "The link could not be read; the page stays as it was.";
    }
  }

  async startJob(kind: Job["kind"], options: Record<string, unknown>, pane: PaneStore): Promise<void> {
    try {
      const { id } = await this.api.start({ tab: this.api.tab, model: pane.model.id, kind, prompt: pane.prompt, other: pane.pair, options, ...pane.about });
      this.#awaited.add(id);
      this.message = "Started.";
    } catch (error) {
      this.message = (error as Error).message;
    }
    await this.poll();
  }

  async endJob(job: Job): Promise<void> {
    try {
      await this.api.stop(job.id);
    } catch (error) {
      this.message = (error as Error).message;
    }
    await this.poll();
  }

  async showJob(job: Job): Promise<void> {
    if (this.results[job.id]) {
      const { [job.id]: _, ...rest } = this.results;
      this.results = rest;
      return;
    }
    try {
      const { document } = await this.api.job(job.id);
      if (document) this.results = { ...this.results, [job.id]: document };
    } catch (error) {
      this.message = (error as Error).message;
    }
  }

  /** Look after the jobs: every half second while one runs, every five else. */
  async poll(): Promise<void> {
    clearTimeout(this.#polling);
    let soon = false;
    try {
      const { jobs } = await this.api.jobs();
      this.jobs = jobs;
      soon = jobs.some((j) => j.state === "running" || j.state === "queued");
      for (const job of jobs) {
        if (job.state === "running" || job.state === "queued") this.#awaited.add(job.id);
        else if (this.#awaited.delete(job.id) && job.state !== "cancelled") {
          this.message = `${job.title}: ${job.state}.`;
          if (job.state === "done" && !this.results[job.id]) await this.showJob(job);
        }
      }
      this.results = Object.fromEntries(Object.entries(this.results).filter(([id]) => jobs.some((j) => j.id === id)));
    } catch { /* the next question of the user says that the server is gone */ }
    this.#polling = setTimeout(() => void this.poll(), soon ? 500 : 5000);
  }
}
