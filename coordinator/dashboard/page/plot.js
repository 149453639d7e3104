// What the plots share: uPlot in our colours, as wide as its place, drawn again when the colours change.

/* global uPlot */

const FONT = '12px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif';
const palette = new Map();
const drawn = new Set();

// A colour of style.css, by its name.
export function color(name) {
  if (!palette.size) palette.set("", getComputedStyle(document.documentElement));
  if (!palette.has(name)) palette.set(name, palette.get("").getPropertyValue(`--${name}`).trim());
  return palette.get(name);
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  palette.clear();
  for (const plot of drawn) plot.redraw(false);
});

export const AXIS = {
  font: FONT,
  stroke: () => color("muted"),
  grid: { show: false },
  ticks: { stroke: () => color("line"), width: 1, size: 5 },
  border: { show: true, stroke: () => color("line"), width: 1 },
  gap: 4,
};
export const SIDE = {
  ...AXIS,
  grid: { show: true, stroke: () => color("grid"), width: 1 },
  ticks: { show: false },
  border: { show: false },
  gap: 8,
};

// Several hooks share one plot's options; `root` gives the size.
export function plot(root, options, data) {
  const size = () => ({ width: Math.max(120, root.clientWidth), height: Math.max(80, root.clientHeight) });
  const made = new uPlot({ legend: { show: false }, ...options, ...size() }, data, root);
  drawn.add(made);
  let isWaiting = false;
  new ResizeObserver(() => {
    const now = size();
    if (isWaiting || !root.clientWidth || (now.width === made.width && now.height === made.height)) return;
    isWaiting = true;
    requestAnimationFrame(() => {
      isWaiting = false;
      made.setSize(size());
    });
  }).observe(root);
  return made;
}

// Radio buttons that look like one switch: [[value, label], ...]; native ones, so arrows and Space work.
export function bindChoice(root, name, chosen, choose) {
  for (const input of root.querySelectorAll(`input[name="${name}"]`)) {
    input.checked = input.value === chosen;
    input.addEventListener("change", () => input.checked && choose(input.value));
  }
}

// What a reader likes is remembered where the browser allows it.
export function remembered(name, usual, allowed) {
  try {
    const kept = localStorage.getItem(`potluck-${name}`);
    return allowed.includes(kept) ? kept : usual;
  } catch {
    return usual;
  }
}

export function remember(name, value) {
  try {
    localStorage.setItem(`potluck-${name}`, value);
  } catch {
    // A private window, or a report opened as a file: the choice lasts as long as the page.
  }
}
