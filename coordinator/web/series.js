// Arithmetic of the loss curve: no drawing, no document.

// Exponential average whose half-life is a share of the steps so far: quick where the loss falls fast, calm
// later, and a point once drawn never moves. Null where the series has no value.
export function smooth(values, share = 0.025) {
  let [sum, weight, seen] = [0, 0, 0];
  return values.map((value) => {
    if (value === null) return null;
    seen += 1;
    const keep = 0.5 ** (1 / Math.max(1, seen * share));
    sum = keep * sum + value;
    weight = keep * weight + 1;
    return sum / weight;
  });
}

// Round numbers inside [low, high], about `wanted` of them.
export function ticks(low, high, wanted, least = 0) {
  const rough = (high - low) / Math.max(1, wanted);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(least, [1, 2, 2.5, 5, 10].map((m) => m * power).find((size) => size >= rough * 0.999));
  const first = Math.ceil(low / step - 1e-9);
  const result = [];
  for (let i = first; i * step <= high + step * 1e-9; i += 1) result.push(i * step + 0); // + 0: never "-0"
  return { step, values: result };
}

export const decimals = (step) => {
  const power = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return Math.abs(step * 10 ** power - Math.round(step * 10 ** power)) > 1e-6 ? power + 1 : power;
};

// Lowest and highest value of all the series given, with a little air; never of zero height.
export function extent(...series) {
  let [low, high] = [Infinity, -Infinity];
  for (const values of series) {
    for (const value of values) {
      if (value === null) continue;
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  if (low > high) return null;
  const air = (high - low) * 0.06 || Math.max(Math.abs(high) * 0.05, 0.05);
  return [low - air, high + air];
}

// Keeps the shape at one pixel per column: first, lowest, highest and last value of each column.
export function thin(xs, ys) {
  const result = [];
  let column = null;
  const flush = () => {
    if (column === null) return;
    const { first, last, low, high } = column;
    const chosen = [...new Set([first, low, high, last])].sort((a, b) => a - b);
    for (const i of chosen) result.push([xs[i], ys[i]]);
  };
  for (let i = 0; i < xs.length; i += 1) {
    if (ys[i] === null) continue;
    const at = Math.round(xs[i]);
    if (column === null || column.at !== at) {
      flush();
      column = { at, first: i, last: i, low: i, high: i };
    }
    column.last = i;
    if (ys[i] < ys[column.low]) column.low = i;
    if (ys[i] > ys[column.high]) column.high = i;
  }
  flush();
  return result;
}

// Index of the point whose step is nearest to `step`.
export function nearest(steps, step) {
  let best = -1;
  for (let i = 0; i < steps.length; i += 1) {
    if (best < 0 || Math.abs(steps[i] - step) <= Math.abs(steps[best] - step)) best = i;
  }
  return best;
}
