// Which kinds of view are there? One row for each: how it is drawn, and the same as a table. To add a kind, write its
// component and its table and add a row here; its schema and what makes it stand in a row of pellucid/views/kinds.py.
import type { Component } from "svelte";
import * as tables from "./lib/tables";
import type { Table, View } from "./schema";
import Anatomy from "./views/Anatomy.svelte";
import Attention from "./views/Attention.svelte";
import Circuit from "./views/Circuit.svelte";
import Contributions from "./views/Contributions.svelte";
import Curves from "./views/Curves.svelte";
import Grid from "./views/Grid.svelte";
import Lens from "./views/Lens.svelte";
import Neuron from "./views/Neuron.svelte";
import Tokens from "./views/Tokens.svelte";
import Traces from "./views/Traces.svelte";

/** `read`: how to read it. What is not drawn is shown as its table. */
export interface Kind<T> { drawn?: Component<any>; table(view: T): Table; read: string }

export const KINDS: { [K in View["kind"]]: Kind<Extract<View, { kind: K }>> } = {
  anatomy: { drawn: Anatomy, table: tables.anatomy,
    read: "Each box is a layer: dots are its heads (neighbours of one colour share their keys and values), the hatching beneath is as tall as it has neurons, and the line is the residual stream from layer to layer. Choose a layer to see what is written where. A ✓ was proven on these weights; what rests on a ✗ is refused." },
  attention: { drawn: Attention, table: tables.attention,
    read: "Each small picture is a head: rows are the tokens that look, columns the tokens looked at, and every row adds up to 100 %. Choose a head, then a token: its colours say how much it looks at each other one. Much attention is not much effect: whether a head matters, patching and switching off tell." },
  circuit: { drawn: Circuit, table: tables.circuit,
    read: "Read from the bottom up: each row is a layer, each box a part that passes the answer on, each line says what one part writes that another reads (as query, key or value), thicker where more depends on it. Move the slider to keep only the strongest; choose a box to see what enters and leaves it. Whether these edges are enough, the figures beside it say, not the drawing." },
  contributions: { drawn: Contributions, table: tables.contributions,
    read: "Read from the top down: each bar begins where the one above it ended, and is what one part writes directly towards the answer; the last is the sum. What a part does through later parts is not in its own bar but in theirs." },
  curves: { drawn: Curves, table: tables.curves,
    read: "One line for each name in the legend, with its interval as a band where one is known. Point at a place to read the numbers there." },
  grid: { drawn: Grid, table: tables.grid,
    read: "Each cell is a number for its row and column: the darker, the further from zero; the scale stands underneath. Point or move with the arrow keys to read it; Enter selects the part or token in all views." },
  lens: { drawn: Lens, table: tables.lens,
    read: "Read from the bottom up: each row is a layer, each column a token, each cell what the model would say if it stopped there. Dark is near the model’s own answer there, which is outlined; by probability, dark is sure, and early rows are often sure of words that mean nothing. Choose a cell to follow its word through the layers." },
  neuron: { drawn: Neuron, table: tables.neuron,
    read: "What excites this neuron, most first: texts in which the colour of a token is its activation there. The words it raises and lowers are its direct effect alone. A story that fits the top texts may not fit the others." },
  table: { table: (view) => view,
    read: "One row for each case; a click on a heading sorts by it." },
  tokens: { drawn: Tokens, table: tables.tokens,
    read: "The colour of a token says how much of the answer it carries: one colour speaks for the answer, the other against it; the scale stands underneath. Several methods stand beneath one another: where they disagree, none is to be believed by itself." },
  traces: { drawn: Traces, table: tables.traces,
    read: "A score over the tokens, with the threshold as a line; a mark stands where it was passed." },
};

/** The row of a kind; undefined for one that this library does not have. */
export const kindOf = (view: View): Kind<any> | undefined => (Object.hasOwn(KINDS, view.kind) ? KINDS[view.kind] : undefined);
