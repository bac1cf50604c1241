// The messages as the page holds them: with every field that the server would fill in.
import type * as messages from "./messages";

export type Edit = Required<messages.Edit>;
export type Kind = Edit["kind"];
export type PaneState = Required<Omit<messages.Pane, "edits">> & { edits: Edit[] };
export interface Neurons { sort: "activation" | "effect"; layer: number | null }
export interface State { version: 1; panes: PaneState[]; selection: { component: string | null; position: number | null }; neurons: Neurons }
export type { Answer, EditRequest, Job, JobRequest, Jobs, LiveReply, LiveRequest, ModelCard, Models, NeuronRow, ViewReply, ViewRequest, Workspace, Workspaces } from "./messages";
export type { ChatEnd, ChatRequest, ChatStep, MonitorCard, Price, Turn, VectorCard } from "./messages";
