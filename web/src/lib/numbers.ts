// Typed arrays out of a document.
import type { Numbers } from "../schema";

export interface Values {
  readonly shape: readonly number[];
  readonly length: number;
  /** The number at some indices; NaN beyond the ends. */
  at(...index: number[]): number;
}

const decoded = new WeakMap<Numbers, Values>();

export function values(numbers: Numbers): Values {
  let found = decoded.get(numbers);
  if (!found) decoded.set(numbers, (found = decode(numbers)));
  return found;
}

function decode(numbers: Numbers): Values {
  const text = atob(numbers.base64);
  const bytes = Uint8Array.from(text, (c) => c.charCodeAt(0));
  const { shape } = numbers;
  const size = shape.reduce((a, b) => a * b, 1);
  const width = numbers.dtype === "uint8" ? 1 : numbers.dtype === "uint16" ? 2 : 4;
  if (bytes.length !== size * width) throw new Error(`an array of shape [${shape}] does not have ${bytes.length} bytes`);
  const view = new DataView(bytes.buffer); // little-endian wherever this runs
  const read: (i: number) => number =
    numbers.dtype === "uint8" ? (i) => bytes[i] / 255
    : numbers.dtype === "uint16" ? (i) => view.getUint16(2 * i, true)
    : numbers.dtype === "int32" ? (i) => view.getInt32(4 * i, true)
    : (i) => view.getFloat32(4 * i, true);
  return {
    shape,
    length: size,
    at(...index) {
      let flat = 0;
      for (let d = 0; d < shape.length; d++) {
        const i = index[d];
        if (!(i >= 0 && i < shape[d])) return NaN;
        flat = flat * shape[d] + i;
      }
      return read(flat);
    },
  };
}

/** All numbers in order. */
export function list(numbers: Numbers): number[] {
  const found = values(numbers);
  const flat = { ...numbers, shape: [found.length] };
  const v = decode(flat);
  return Array.from({ length: found.length }, (_, i) => v.at(i));
}

/** The largest size among finite numbers, leaving out the most extreme hundredth of many. */
export function extent(numbers: Iterable<number>): number {
  const sizes = [...numbers].filter(Number.isFinite).map(Math.abs).sort((a, b) => a - b);
  if (!sizes.length) return 1;
  const at = sizes.length > 100 ? Math.floor(0.995 * (sizes.length - 1)) : sizes.length - 1;
  return sizes[at] || sizes[sizes.length - 1] || 1;
}

/** Does a scale that ends at `full` leave out this number? (Numbers come as float32.) */
export const beyond = (x: number, full: number) => Math.abs(x) > full * (1 + 1e-6);

/** `extent`, unless a few numbers (the first token's, mostly) are so far out that they would bleach all others. */
export function steady(numbers: number[]): number {
  const sizes = numbers.filter(Number.isFinite).map(Math.abs).sort((a, b) => a - b);
  const middle = sizes[sizes.length >> 1] || 0;
  return middle ? Math.min(extent(numbers), 8 * middle) : extent(numbers);
}
