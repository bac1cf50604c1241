// One prompt on one model: what is typed, what is done to the model, what it answers, and the views opened on it.
import type { Document } from "../schema";
import type { Api } from "./api";
import { ChatStore } from "./chat.svelte";
import { made, withEdit } from "./edits";
import { Follow, type Pace, Superseded } from "./follow";
import { PanelStore } from "./panel.svelte";
import type { Edit, Kind, LiveReply, LiveRequest, ModelCard, Neurons, PaneState, ViewRequest } from "./types";
import { PANELS, type View } from "./views";

export const FRESH: Omit<PaneState, "pane" | "model"> = { prompt: "", other: null, edits: [], views: ["lens"], generate: 0, temperature: 1, seed: null, answer: "", word: "" };

export class PaneStore {
  readonly id: string;
  model = $state.raw<ModelCard>() as ModelCard;
  prompt = $state("");
  other = $state<string | null>(null);
  edits = $state.raw<Edit[]>([]);
  views = $state.raw<View[]>(["lens"]);
  generate = $state(0);
  temperature = $state(1); // of the probabilities shown, and of text that is drawn
  seed = $state<number | null>(null); // of text that is drawn; null writes the likeliest
  answer = $state(""); // what the views are about: empty, what the model says
  word = $state(""); // the word whose label is asked about
  chosen = $state.raw<Partial<Record<View, string>>>({}); // how a view is drawn, where that can be chosen
  neurons = $state.raw<Neurons>({ sort: "effect", layer: null });

  reply = $state.raw<LiveReply | null>(null);
  answered = $state(""); // the prompt that `reply` answers
  error = $state("");
  refused = $state(""); // why the edit that was last asked for cannot be made
  busy = $state(false);
  readonly panels: Record<string, PanelStore>;
  readonly chat: ChatStore;
  readonly neuron: PanelStore; // the page of the neuron that was opened

  #api: Api;
  #live: Follow<LiveRequest, [LiveReply, LiveRequest]>;
  #changed: () => void;
  #opened = ""; // the neuron whose page is open
  #rests = new WeakSet<LiveRequest>(); // questions for the rest of what is shown
  #asked = $state(""); // the question that was last asked, and the one that `reply` answers
  #heardOf = $state("");
  #written = false; // the text shown is that of the question that was answered

  constructor(api: Api, model: ModelCard, given: PaneState, changed: () => void) {
    this.#api = api;
    this.#changed = changed;
    this.id = given.pane;
    this.model = model;
    Object.assign(this, { prompt: given.prompt, other: given.other, edits: given.edits, generate: given.generate, temperature: given.temperature, seed: given.seed, answer: given.answer, word: given.word });
    this.views = PANELS.map((p) => p.view).filter((v) => given.views.includes(v));
    const panel = () => new PanelStore(api.view);
    this.panels = Object.fromEntries(PANELS.filter((p) => p.view !== "lens" && !p.own).map((p) => [p.view, panel()]));
    this.neuron = panel();
    this.chat = new ChatStore(api, this.id);
    this.#live = new Follow(
      async (question, signal, serial) => [await api.live({ ...question, serial }, signal), question],
      { answered: ([reply, question]) => this.#heard(reply, question), failed: (error) => { this.error = error.message; }, busy: (now) => { this.busy = now; } },
    );
  }

  /** Is what is shown the answer to another question than the one that was last asked, or to none that could be answered? */
  get old(): boolean {
    return !!this.reply && (!!this.error || this.#asked !== this.#heardOf);
  }

  get state(): PaneState {
    return { pane: this.id, model: this.model.name, prompt: this.prompt, other: this.other, edits: this.edits, views: this.views, generate: this.generate, temperature: this.temperature, seed: this.seed, answer: this.answer, word: this.word };
  }

  /** What this pane shows now. */
  get documents(): Document[] {
    const shown = this.views.map((v) => (v === "lens" ? this.reply?.lens : v === "chat" ? this.chat.end?.document : this.panels[v].document));
    return [...shown, this.views.includes("neurons") ? this.neuron.document : null].filter((d): d is Document => !!d);
  }

  /** Ask for the answer, as it is typed or slid. While sliding, the text waits until the slider rests. */
  ask(pace: Pace = "now"): void {
    this.#changed();
    if (!this.prompt.trim()) {
      this.#live.stop();
      this.reply = null;
      this.error = "";
      return;
    }
    const question = {
      tab: this.#api.tab, pane: this.id, model: this.model.id, prompt: this.prompt, other: this.pair, edits: this.edits.filter((e) => e.on),
      lens: this.views.includes("lens"), generate: pace === "sliding" ? 0 : this.generate,
      temperature: this.temperature, seed: this.seed,
    };
    this.#asked = essence(question);
    this.#live.ask(question, pace);
  }

  /** What is asked about; of a model with one kind of answer only, nothing. */
  get about(): { answer: string; word: string } {
    const { kind } = this.model.answers;
    return { answer: kind ? this.answer : "", word: kind === "label" ? this.word.trim() : "" };
  }

  asksAbout(more: Partial<{ answer: string; word: string }>): void {
    Object.assign(this, more);
    this.#changed();
    this.#redraw();
  }

  get pair(): string | null {
    return this.other?.trim() ? this.other : null;
  }

  #heard(reply: LiveReply, question: LiveRequest): void {
    const rest = this.#rests.has(question);
    if (!question.generate && this.answered === question.prompt && this.reply) {
      reply.clean.generated = this.reply.clean.generated;
      if (rest && reply.edited) reply.edited.generated = this.reply.edited?.generated ?? "";
    }
    this.#written = question.generate! > 0 || (rest && this.#written);
    this.reply = reply;
    this.answered = question.prompt;
    this.#heardOf = essence(question);
    this.error = "";
    if (reply.more) this.#askRest({ ...question, generate: 0 });
    else if (this.generate && !this.#written) this.#askRest({ ...question, generate: this.generate });
    else this.#redraw();
  }

  /** What takes longer follows when nothing else is asked: the rest of a long prompt's lens, the text at a slider's place. */
  #askRest(question: LiveRequest): void {
    this.#rests.add(question);
    this.#live.ask(question, "idle");
  }

  #redraw(): void {
    for (const { view, costly, own } of PANELS) if (!costly && !own && this.views.includes(view)) this.draw(view, "typing");
    if (this.#opened && this.views.includes("neurons")) this.neuron.ask(this.question("neuron", { component: this.#opened }), "typing");
  }

  question(view: ViewRequest["view"], options: Record<string, unknown> = {}): ViewRequest {
    const { fixed, choice } = PANELS.find((p) => p.view === view) ?? {};
    const value = choice && (this.chosen[view as View] ?? choice.values[0][0]);
    const own = choice ? { [choice.option]: value!.includes(" ") ? value!.split(" ") : value } : view === "neurons" ? { ...this.neurons, position: null, top: 50 } : {};
    return {
      tab: this.#api.tab, pane: this.id, model: this.model.id, view, prompt: fixed ? "" : this.prompt, other: fixed ? null : this.pair,
      edits: fixed ? [] : this.edits.filter((e) => e.on), options: { ...own, ...options }, ...(fixed ? {} : this.about),
    };
  }

  draw(view: View, pace: Pace = "now"): void {
    if (view === "lens" || view === "chat" || (!this.prompt.trim() && view !== "anatomy")) return;
    if (PANELS.find((p) => p.view === view)?.pair && !this.pair) return;
    this.panels[view].ask(this.question(view), pace);
  }

  choose(view: View, value: string): void {
    this.chosen = { ...this.chosen, [view]: value };
    this.draw(view);
  }

  openNeuron(component: string): void {
    this.#opened = component;
    this.neuron.ask(this.question("neuron", { component }));
  }

  toggle(view: View): void {
    const open = this.views.includes(view);
    this.views = PANELS.map((p) => p.view).filter((v) => (v === view ? !open : this.views.includes(v)));
    if (open) (view === "chat" ? this.chat : this.panels[view])?.stop();
    else if (view !== "lens") this.draw(view);
    if (view === "lens" && !open) this.ask();
    else this.#changed();
  }

  setModel(model: ModelCard): void {
    this.model = model;
    this.reply = null;
    this.refused = this.answer = this.word = "";
    Object.values(this.panels).forEach((p) => { p.stop(); p.document = p.rows = null; });
    this.chat.clear();
    Object.assign(this.chat, { vector: "", strength: 0, off: [] });
    this.#opened = "";
    this.neuron.stop();
    this.neuron.document = null;
    this.ask();
    if (this.views.includes("anatomy")) this.draw("anatomy");
  }

  /** Do something to a part, if the model has it and this can be done to it. */
  async act(component: string, kind: Kind, position: number | null): Promise<void> {
    const edit = made(component, kind, position, !!this.pair);
    if (!(await this.takes(edit))) return;
    this.edits = withEdit(this.edits, edit);
    this.ask();
  }

  /** Whether an edit can be made; why not is `refused`. */
  async takes(edit: Edit): Promise<boolean> {
    try {
      await this.#api.check({ tab: this.#api.tab, pane: this.id, model: this.model.id, edit, prompt: this.prompt, other: this.pair });
      this.refused = "";
    } catch (error) {
      if (!(error instanceof Superseded)) this.refused = (error as Error).message;
      return false;
    }
    return true;
  }

  change(i: number, more: Partial<Edit>, pace: Pace = "now"): void {
    this.edits = this.edits.map((e, j) => (j === i ? { ...e, ...more } : e));
    this.ask(pace);
  }

  remove(i: number): void {
    this.edits = this.edits.filter((_, j) => j !== i);
    this.ask();
  }

  /** All edits off, or all on. */
  bypass(): void {
    const on = !this.edits.some((e) => e.on);
    this.edits = this.edits.map((e) => ({ ...e, on }));
    this.ask();
  }

  stop(): void {
    this.#live.stop();
    this.chat.stop();
    [...Object.values(this.panels), this.neuron].forEach((p) => p.stop());
  }
}

/** What an answer depends on. */
const essence = ({ model, prompt, other, edits, temperature, seed }: LiveRequest) => JSON.stringify([model, prompt, other, edits, temperature, seed]);
