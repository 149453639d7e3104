// Arithmetic of the curves: no drawing, no document.

// Exponential average over steps whose half-life is a share of the steps so far: quick where the loss falls fast,
// calm later, and a point once drawn never moves. It does not matter how thinly a stretch is sampled. Null where the
// series has no value.
export function smooth(values, steps, share = 0.025) {
  let [sum, weight, before] = [0, 0, null];
  const first = steps[0] ?? 0;
  return values.map((value, i) => {
    if (value === null) return null;
    const passed = before === null ? 1 : Math.max(1, steps[i] - before);
    before = steps[i];
    const keep = share > 0 ? 0.5 ** (passed / Math.max(1, (steps[i] - first + 1) * share)) : 0;
    sum = keep * sum + passed * value;
    weight = keep * weight + passed;
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

// For a logarithmic axis: whole decades if there are many, else round numbers within them.
export function logTicks(low, high, wanted) {
  const decades = [];
  for (let power = Math.ceil(Math.log10(low) - 1e-9); 10 ** power <= high * (1 + 1e-9); power += 1) decades.push(10 ** power);
  if (decades.length > wanted) return decades.filter((_, i) => i % Math.ceil(decades.length / wanted) === 0);
  const around = [Math.floor(Math.log10(low)), Math.floor(Math.log10(high))];
  const among = (steps) => {
    const all = [];
    for (let power = around[0]; power <= around[1]; power += 1) all.push(...steps.map((m) => m * 10 ** power));
    return all.filter((value) => value >= low * (1 - 1e-9) && value <= high * (1 + 1e-9));
  };
  const choices = [[1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 8], [1, 2, 3, 5], [1, 2, 5], [1, 3]];
  const found = choices.map(among).find((values) => values.length <= wanted) ?? decades;
  return found.length >= 2 || decades.length >= 2 ? found : ticks(low, high, wanted).values;
}

const MINUTE = 60;
const DAY = 86400;
const SPANS = [1, 2, 5, 10, 15, 30, ...[1, 2, 5, 10, 15, 30, 60, 120, 180, 360, 720].map((m) => m * MINUTE), ...[1, 2, 4, 7, 14, 28].map((d) => d * DAY)];

// Moments at round local times between two Unix times.
export function timeTicks(low, high, wanted) {
  const step = SPANS.find((span) => (high - low) / span <= wanted) ?? Math.ceil((high - low) / wanted / DAY) * DAY;
  const shift = new Date(low * 1000).getTimezoneOffset() * MINUTE;
  const result = [];
  for (let at = Math.ceil((low - shift) / step) * step + shift; at <= high; at += step) result.push(at);
  return { step, values: result };
}

export function timeLabel(time, step) {
  const date = new Date(time * 1000);
  const isMidnight = step >= MINUTE && !date.getHours() && !date.getMinutes();
  if (step >= DAY || isMidnight) return date.toLocaleDateString("en-GB", { day: "numeric", month: "short" });
  return date.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit", ...(step < MINUTE && { second: "2-digit" }) });
}

export const decimals = (step) => {
  const power = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return Math.abs(step * 10 ** power - Math.round(step * 10 ** power)) > 1e-6 ? power + 1 : power;
};

// Lowest and highest value of all the series given between two indices.
export function extent(series, from = 0, to = Infinity) {
  let [low, high] = [Infinity, -Infinity];
  for (const values of series) {
    for (let i = from; i <= Math.min(to, values.length - 1); i += 1) {
      const value = values[i];
      if (value === null) continue;
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  return low > high ? null : [low, high];
}

// A little air above and below; never of zero height.
export function airy([low, high], isLog) {
  if (isLog && low > 0) {
    const air = Math.max((high / low) ** 0.06, 1.02);
    return [low / air, high * air];
  }
  const air = (high - low) * 0.06 || Math.max(Math.abs(high) * 0.05, 0.05);
  return [low - air, high + air];
}

// Index of the value nearest to `wanted`, in an ascending list.
export function nearest(values, wanted) {
  let [low, high] = [0, values.length - 1];
  if (high < 0) return -1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (values[middle] <= wanted) low = middle;
    else high = middle;
  }
  return Math.abs(values[high] - wanted) <= Math.abs(values[low] - wanted) ? high : low;
}
