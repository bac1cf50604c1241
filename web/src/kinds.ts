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

export interface Kind<T> { drawn?: Component<any>; table(view: T): Table } // what is not drawn is shown as its table

export const KINDS: { [K in View["kind"]]: Kind<Extract<View, { kind: K }>> } = {
  anatomy: { drawn: Anatomy, table: tables.anatomy },
  attention: { drawn: Attention, table: tables.attention },
  circuit: { drawn: Circuit, table: tables.circuit },
  contributions: { drawn: Contributions, table: tables.contributions },
  curves: { drawn: Curves, table: tables.curves },
  grid: { drawn: Grid, table: tables.grid },
  lens: { drawn: Lens, table: tables.lens },
  neuron: { drawn: Neuron, table: tables.neuron },
  table: { table: (view) => view },
  tokens: { drawn: Tokens, table: tables.tokens },
  traces: { drawn: Traces, table: tables.traces },
};

/** The row of a kind; undefined for one that this library does not have. */
export const kindOf = (view: View): Kind<any> | undefined => (Object.hasOwn(KINDS, view.kind) ? KINDS[view.kind] : undefined);
