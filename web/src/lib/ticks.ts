/** Round numbers between two ends, about `count` of them. */
export function ticks(low: number, high: number, count: number, log = false): number[] {
  if (!(high > low)) return [low];
  if (log) {
    const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
    const every = Math.max(1, Math.ceil((last - first + 1) / count));
    const found: number[] = [];
    for (let e = last; e >= first; e -= every) found.unshift(10 ** e);
    return found.length > 1 ? found : ticks(low, high, count);
  }
  const raw = (high - low) / Math.max(1, count), size = 10 ** Math.floor(Math.log10(raw));
  const unit = [1, 2, 5, 10].find((u) => u * size >= raw * 0.999)! * size;
  const found: number[] = [];
  for (let i = Math.ceil(low / unit - 1e-9); i * unit <= high + 1e-9 * unit; i++) found.push(+(i * unit).toPrecision(12));
  return found;
}
