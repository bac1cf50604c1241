// Attention patterns of a document, whole or in rows of what is not next to nothing, and a small picture of each head.
import type { Looking } from "../schema";
import { list, values } from "./numbers";

export interface Patterns {
  /** How much head `n` looks from query `q` to key `k`; 0 for what was not kept. */
  at(n: number, q: number, k: number): number;
  /** The largest weight in each of `rows` x `columns` fields of a head, row by row. */
  small(n: number, rows: number, columns: number): Float32Array;
  /** Every weight of a head from `least` on. */
  each(n: number, least: number, visit: (q: number, k: number, w: number) => void): void;
}

const known = new WeakMap<Looking, Patterns>();

export function patterns(looking: Looking): Patterns {
  let found = known.get(looking);
  if (!found) known.set(looking, (found = pictured(looking.rows ? fromRows(looking) : whole(looking), looking)));
  return found;
}

/** Pictures are asked for at every redraw: each is made once. */
function pictured(read: Reader, { queries, keys }: Looking): Patterns {
  const pictures = new Map<string, Float32Array>();
  return {
    ...read,
    small(n, rows, columns) {
      const key = `${n} ${rows} ${columns}`;
      let found = pictures.get(key);
      if (!found) {
        if (pictures.size > 4000) pictures.clear();
        const made = (found = new Float32Array(rows * columns));
        read.each(n, 0, (q, k, w) => {
          const at = Math.floor((q * rows) / queries.length) * columns + Math.floor((k * columns) / keys.length);
          if (w > made[at]) made[at] = w;
        });
        pictures.set(key, found);
      }
      return found;
    },
  };
}

type Reader = Pick<Patterns, "at" | "each">;

function whole({ pattern, queries, keys }: Looking): Reader {
  const v = values(pattern!);
  return {
    at: (n, q, k) => v.at(n, q, k),
    each(n, least, visit) {
      for (let q = 0; q < queries.length; q++)
        for (let k = 0; k < keys.length; k++) { const w = v.at(n, q, k); if (w >= least) visit(q, k, w); }
    },
  };
}

function fromRows({ rows, queries, keys }: Looking): Reader {
  const counts = list(rows!.counts), where = Uint16Array.from(list(rows!.keys)), weights = Float32Array.from(list(rows!.weights));
  const starts = new Uint32Array(counts.length + 1);
  counts.forEach((c, i) => { starts[i + 1] = starts[i] + c; });
  return {
    at(n, q, k) {
      if (!(q >= 0 && q < queries.length && k >= 0 && k < keys.length)) return NaN;
      const row = n * queries.length + q;
      let low = starts[row], high = starts[row + 1];
      while (low < high) {
        const middle = (low + high) >> 1;
        if (where[middle] < k) low = middle + 1;
        else high = middle;
      }
      return low < starts[row + 1] && where[low] === k ? weights[low] : 0;
    },
    each(n, least, visit) {
      for (let q = 0; q < queries.length; q++)
        for (let e = starts[n * queries.length + q]; e < starts[n * queries.length + q + 1]; e++) if (weights[e] >= least) visit(q, where[e], weights[e]);
    },
  };
}
