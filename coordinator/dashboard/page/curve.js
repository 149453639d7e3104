// The loss curve's points: one per step, thinned as the run grows.

import { isNumber } from "./format.js";

export const MOST = 2000;
const known = (value) => (isNumber(value) ? value : null);
const low = (point) => known(point.low) ?? known(point.train);
const high = (point) => known(point.high) ?? known(point.train);

export class Curve {
  constructor() {
    this.clear();
  }

  clear() {
    this.points = [];
    this.latest = null; // the newest training loss as it was sent
    this.version = (this.version ?? 0) + 1;
  }

  // A held-out loss may come later than the training loss of its step, and a step taken again replaces the old one.
  add(points) {
    let isSorted = true;
    let top = this.points.at(-1)?.step ?? -Infinity;
    const places = points.length > 8 ? new Map(this.points.map((point, i) => [point.step, i])) : null;
    for (const point of points) {
      if (!isNumber(point?.step)) continue;
      if (isNumber(point.train)) this.latest = point.train;
      const place = point.step > top ? -1 : (places?.get(point.step) ?? this.points.findLastIndex((old) => old.step === point.step));
      if (place >= 0) {
        const said = Object.entries(point).filter(([, value]) => value !== null);
        this.points[place] = { ...this.points[place], ...Object.fromEntries(said) };
      } else {
        isSorted &&= point.step > top;
        top = Math.max(top, point.step);
        places?.set(point.step, this.points.length);
        this.points.push({ ...point });
      }
    }
    if (!isSorted) this.points.sort((a, b) => a.step - b.step);
    if (this.points.length > 2 * MOST) this.points = thinned(this.points);
    this.version += 1;
  }

  // Index of the newest point that was known at a moment.
  until(at) {
    return this.points.findLastIndex((point) => !(point.time > at));
  }

  // Tokens at a step, between the points around it.
  tokensAt(step) {
    const next = this.points.findIndex((point) => point.step >= step);
    if (next <= 0) return this.points.at(next)?.tokens ?? null;
    const [a, b] = [this.points[next - 1], this.points[next]];
    return a.tokens + ((step - a.step) / (b.step - a.step)) * (b.tokens - a.tokens);
  }
}

// Two neighbours become one point with both extremes; a held-out loss keeps its step while most have none.
export function thinned(points) {
  const isRare = points.filter((point) => isNumber(point.heldout)).length < points.length / 8;
  const result = [];
  for (let i = 0; i < points.length; i += 1) {
    const [a, b] = [points[i], points[i + 1]];
    if (!b || (isRare && (isNumber(a.heldout) || isNumber(b.heldout)))) {
      result.push(a);
      continue;
    }
    result.push(joined(a, b));
    i += 1;
  }
  return result;
}

function joined(a, b) {
  const losses = [a.train, b.train].filter(isNumber);
  const [lows, highs] = [[low(a), low(b)].filter(isNumber), [high(a), high(b)].filter(isNumber)];
  return {
    ...b,
    train: losses.length ? losses.reduce((sum, loss) => sum + loss, 0) / losses.length : null,
    heldout: known(b.heldout) ?? known(a.heldout),
    low: lows.length ? Math.min(...lows) : null,
    high: highs.length ? Math.max(...highs) : null,
  };
}

// Columns for the plot, sorted by `axis` (step, tokens or time).
export function columns(points, axis) {
  const placed = points.filter((point) => isNumber(point[axis]));
  const isSorted = placed.every((point, i) => !i || point[axis] >= placed[i - 1][axis]);
  const rows = isSorted ? placed : placed.toSorted((a, b) => a[axis] - b[axis]);
  return {
    rows,
    x: rows.map((point) => point[axis]),
    steps: rows.map((point) => point.step),
    raw: rows.map((point) => known(point.train)),
    low: rows.map(low),
    high: rows.map(high),
    held: rows.map((point) => known(point.heldout)),
  };
}
