// What a view may ask of the frame it stands in.
import type { Ink, Told } from "./heat";
import type { View } from "../schema";
import type { Page } from "./page.svelte";

export const FRAME = Symbol("frame");

export interface Frame {
  readonly page: Page;
  readonly ink: () => Ink;
  readonly tip: { show(told: Told, at: { left: number; top: number; width: number; height: number }): void; hide(): void };
  /** Makes the SVG file of the figure, where a view can draw itself. */
  exporter: (() => string) | null;
  /** The document's data with what a reader has added to it (names in a circuit). */
  amended: (() => View) | null;
}
