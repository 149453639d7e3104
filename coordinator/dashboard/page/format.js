// Numbers for people. Whatever is missing or not finite reads as a dash.

export const NONE = "–";
const PREFIXES = ["", "k", "M", "G", "T", "P"];

export const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

function scaled(value, unit) {
  let size = Math.abs(value);
  let prefix = 0;
  // 999.5 would be written "1000".
  while (size >= 999.5 && prefix < PREFIXES.length - 1) {
    size /= 1000;
    prefix += 1;
  }
  const digits = (prefix === 0 && Number.isInteger(value)) || size >= 99.95 ? 0 : size >= 9.995 ? 1 : 2;
  const number = (value < 0 ? "−" : "") + size.toFixed(digits);
  return `${number} ${PREFIXES[prefix]}${unit}`.trimEnd();
}

export const count = (value) => (isNumber(value) ? scaled(value, "") : NONE);
export const bytes = (value) => (isNumber(value) ? scaled(value, "B") : NONE);
export const loss = (value) => (isNumber(value) ? value.toFixed(3) : NONE);
export const whole = (value) => (isNumber(value) ? Math.round(value).toLocaleString("en").replaceAll(",", " ") : NONE);
export const percent = (value) => (isNumber(value) ? `${Math.round(value * 100)} %` : NONE);

// How many times smaller: "23×", "4.1×".
export function times(value) {
  if (!isNumber(value)) return NONE;
  return `${value >= 20 ? whole(value) : value.toFixed(1)}×`;
}

export function duration(seconds) {
  if (!isNumber(seconds) || seconds < 0) return NONE;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  const all = Math.round(seconds);
  const [days, hours, minutes] = [Math.floor(all / 86400), Math.floor(all / 3600) % 24, Math.floor(all / 60) % 60];
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  if (minutes) return minutes < 10 ? `${minutes} min ${all % 60} s` : `${minutes} min`;
  return `${all} s`;
}

// Whole seconds, for what has passed since something.
export const elapsed = (seconds) => (isNumber(seconds) ? duration(Math.max(0, Math.round(seconds))).replace(".0 s", " s") : NONE);

export function ago(seconds) {
  if (!isNumber(seconds)) return NONE;
  return seconds < 2 ? "now" : `${elapsed(seconds)} ago`;
}

// For estimates, which deserve no more than this: 5 s, 40 s, 5 min, 3 h 10 min.
export function roughly(seconds) {
  const grain = seconds < 90 ? 5 : seconds < 7200 ? 60 : 600;
  return elapsed(Math.max(grain, Math.round(seconds / grain) * grain)).replace(" min 0 s", " min");
}

export function clock(time) {
  if (!isNumber(time)) return NONE;
  const date = new Date(time * 1000);
  return Number.isNaN(date.getTime()) ? NONE : date.toLocaleTimeString("en-GB");
}

// A name or sentence from outside, as text; the caller puts it into textContent.
export const words = (value) => (value === null || value === undefined || value === "" ? NONE : String(value));
export const plural = (number, one, many = `${one}s`) => `${whole(number)} ${number === 1 ? one : many}`;
