// The workbench's server as the page sees it: every answer is JSON, every error one sentence.
import type { Document } from "../schema";
import { Superseded } from "./follow";
import type { ChatEnd, ChatRequest, ChatStep, EditRequest, Job, JobRequest, Jobs, LiveReply, LiveRequest, Models, State, ViewReply, ViewRequest, Workspace, Workspaces } from "./types";

/** A name no other page has: the server gives up a page's older questions by it, and never those of a neighbour. */
const tab = Array.from(crypto.getRandomValues(new Uint8Array(12)), (b) => b.toString(16).padStart(2, "0")).join("");

export class Api {
  readonly tab = tab;
  #token: string;
  constructor(token: string) { this.#token = token; }

  models = () => this.#json<Models>("GET", "/api/models");
  live = (question: LiveRequest, signal: AbortSignal) => this.#json<LiveReply>("POST", "/api/live", question, signal);
  check = (question: EditRequest) => this.#json<unknown>("POST", "/api/edit", question);
  view = (question: ViewRequest, signal: AbortSignal) => this.#json<ViewReply>("POST", "/api/view", question, signal);
  /** An answer as it is written: `told` hears of each token. */
  async chat(question: ChatRequest, signal: AbortSignal, told: (step: ChatStep) => void): Promise<ChatEnd> {
    const reader = (await this.#ask("POST", "/api/chat", question, signal)).body!.pipeThrough(new TextDecoderStream() as ReadableWritablePair<string, Uint8Array>).getReader();
    let rest = "";
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      const lines = (rest + part.value).split("\n");
      rest = lines.pop()!;
      for (const line of lines) {
        const said = JSON.parse(line) as ChatStep | ChatEnd | { error: string; superseded: boolean };
        if ("step" in said) told(said);
        else if ("error" in said) throw said.superseded ? new Superseded() : new Error(sentence(said.error));
        else return said;
      }
    }
    throw new Error("The answer broke off: is the command that started the workbench still running?");
  }
  start = (job: JobRequest) => this.#json<{ id: string }>("POST", "/api/jobs", job);
  jobs = () => this.#json<Jobs>("GET", "/api/jobs");
  job = (id: string) => this.#json<Job>("GET", `/api/jobs/${encodeURIComponent(id)}`);
  stop = (id: string) => this.#json<unknown>("DELETE", `/api/jobs/${encodeURIComponent(id)}`);
  workspaces = () => this.#json<Workspaces>("GET", "/api/workspaces");
  open = (name: string) => this.#json<Workspace>("GET", `/api/workspaces/${encodeURIComponent(name)}`);
  store = (name: string, state: State, documents: Document[]) => this.#json<unknown>("PUT", `/api/workspaces/${encodeURIComponent(name)}`, { state, documents });
  forget = (name: string) => this.#json<unknown>("DELETE", `/api/workspaces/${encodeURIComponent(name)}`);
  html = async (title: string, documents: Document[]) => (await this.#ask("POST", "/api/export/html", { title, documents })).blob();
  notebook = async (state: State, documents: Document[]) => (await this.#ask("POST", "/api/export/notebook", { state, documents })).blob();

  async #json<T>(method: string, path: string, body?: unknown, signal?: AbortSignal): Promise<T> {
    const answer = await this.#ask(method, path, body, signal);
    const text = await answer.text();
    return (text ? JSON.parse(text) : null) as T;
  }

  async #ask(method: string, path: string, body?: unknown, signal?: AbortSignal): Promise<Response> {
    let answer: Response;
    try {
      answer = await fetch(path, {
        method, signal, body: body === undefined ? undefined : JSON.stringify(body),
        headers: { "X-Pellucid-Token": this.#token, ...(body === undefined ? {} : { "Content-Type": "application/json" }) },
      });
    } catch (error) {
      if ((error as Error).name === "AbortError") throw error;
      throw new Error("The workbench does not answer: is the command that started it still running?");
    }
    if (answer.ok) return answer;
    const said = await answer.json().catch(() => ({}));
    if (answer.status === 409 && said.superseded) throw new Superseded();
    throw new Error(sentence(said.error || `the workbench answered ${answer.status} to ${path}`));
  }
}

const sentence = (text: string) => text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
