// The views, as views.js (loaded before this page's own script) leaves them.
import type { Page } from "../lib/page.svelte";
import type { Mounted } from "../main";
import type { Document } from "../schema";
import type { ViewRequest } from "./types";

interface Views { mount(element: HTMLElement, document: Document): Mounted; page: Page }

export const views = () => (globalThis as unknown as { pellucid: Views }).pellucid;
export type { Mounted };

export type View = "lens" | "chat" | Exclude<ViewRequest["view"], "neuron">;

export interface Panel {
  view: View;
  name: string;
  says: string; // what it shows, in a few words
  key?: string; // its shortcut
  costly?: boolean; // many passes: drawn again only when asked to
  pair?: boolean; // needs the second prompt
  fixed?: boolean; // depends on the model alone
  own?: boolean; // asks its own questions
  choice?: { option: string; name: string; values: readonly [value: string, text: string][] };
}

/** What can be looked at beside the prediction, in the order it is shown. */
export const PANELS: readonly Panel[] = [
  { view: "lens", name: "Lens", says: "what the model would say after each layer", key: "1" },
  { view: "tokens", name: "Words", says: "which words the answer comes from", key: "2", choice: { option: "method", name: "Method", values: [
    ["gradient_x_input", "gradient × input"], ["integrated_gradients", "integrated gradients"], ["saliency", "saliency"], ["smoothgrad", "SmoothGrad"],
    ["deeplift", "DeepLIFT"], ["relevance", "relevance (LRP)"], ["occlusion", "occlusion"], ["lime", "LIME"], ["kernel_shap", "kernel SHAP"],
    ["gradient_x_input integrated_gradients occlusion", "three side by side"]] } },
  { view: "attention", name: "Attention", says: "where each head looks", key: "3" },
  { view: "contributions", name: "Contributions", says: "what each part writes towards the answer", key: "4", choice: { option: "by", name: "By", values: [["head", "head"], ["layer", "layer"]] } },
  { view: "patching", name: "Patching", says: "which states carry the difference between the two prompts", key: "5", costly: true, pair: true,
    choice: { option: "over", name: "Patch", values: [["resid", "the residual stream"], ["attention", "attention outputs"], ["mlp", "MLP outputs"], ["heads", "heads"]] } },
  { view: "heads", name: "Heads", says: "what each head writes towards the answer", key: "6" },
  { view: "neurons", name: "Neurons", says: "which neurons are active, and what they add to the answer", key: "7" },
  { view: "anatomy", name: "Anatomy", says: "the map of the model, with its proofs", key: "8", fixed: true },
  { view: "chat", name: "Chat", says: "an answer as it is written, under monitors and steering", key: "9", own: true },
];
