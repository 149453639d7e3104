// What the views behind the first screen share: asking, cards, definition lists, sortable tables, SVG.

import { attribute, el, list, text } from "./dom.js";
import { duration, isNumber, NONE, whole, words } from "./format.js";

const NAMESPACE = "http://www.w3.org/2000/svg";
const AGAIN_AFTER = 5_000; // ms between two questions for the same answer
export const SELDOM = 30_000; // the same for what hardly ever changes
let headings = 0;

export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(NAMESPACE, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, String(value));
  node.append(...children);
  return node;
}

// A path of the API at the moment that is looked at; `name` is what the endpoint calls it.
export function moment(page, path, name = "at") {
  if (page.at === null || page.at === undefined) return path;
  return `${path}${path.includes("?") ? "&" : "?"}${name}=${page.at}`;
}

// A place of this page, at the same moment.
export const place = (page, path) => moment(page, `#/${path}`);

// Asks now, and again when the state has moved on, `every` so many ms at most. What went wrong is told in `trouble`;
// what is on the screen stays when a later question fails.
export function asking(page, load, draw, trouble, every = AGAIN_AFTER) {
  let [isOver, isAsking, isDrawn, askedAt, version] = [false, false, false, 0, null];
  async function ask() {
    [isAsking, askedAt] = [true, performance.now()];
    let answer = null;
    try {
      answer = await load();
    } catch (error) {
      if (!isOver && !isDrawn) tell(trouble, error);
      return;
    } finally {
      isAsking = false;
    }
    if (isOver) return;
    if (!isDrawn) trouble.replaceChildren();
    isDrawn = true;
    draw(answer);
  }
  ask();
  return {
    show(state) {
      const isFixed = page.at !== null || page.source.live === false;
      if (isFixed || isAsking || state?.version === version || performance.now() - askedAt < every) return;
      version = state?.version;
      ask();
    },
    unmount: () => (isOver = true),
  };
}

function tell(trouble, error) {
  const node = problem(error);
  if (trouble.textContent !== node.textContent) trouble.replaceChildren(node);
}

// What went wrong, with the way out if the coordinator named one.
export function problem(error) {
  const node = el("div", "problem", el("p", "", words(error?.message ?? error)));
  if (error?.hint) node.append(el("p", "muted", String(error.hint)));
  node.setAttribute("role", "status");
  return node;
}

export function card(title, ...children) {
  headings += 1;
  const heading = el("h3", "", title);
  heading.id = `card-${headings}`;
  const note = el("p", "muted");
  const node = el("section", "card", el("div", "head", heading, note), ...children);
  node.setAttribute("aria-labelledby", heading.id);
  return { node, heading, note, head: node.firstChild };
}

export function viewHead(title, about = "") {
  const heading = el("h2", "peer-text", title);
  const sub = el("p", "muted", about);
  const side = el("div", "side");
  const trouble = el("div");
  return { node: el("div", "", el("div", "view-head", el("div", "", heading, sub), side), trouble), heading, sub, side, trouble };
}

// Earlier and later of what is shown, as links; a missing one leaves its place.
export function besides(page, kind, before, after) {
  const make = (step, label) => {
    if (step === null || step === undefined) return el("span", "muted", label);
    const link = el("a", "", label);
    link.href = place(page, `${kind}/${step}`);
    return link;
  };
  const node = el("div", "besides", make(before, "← earlier"), make(after, "later →"));
  node.setAttribute("role", "navigation");
  node.setAttribute("aria-label", `The ${kind} before and after`);
  return node;
}

export function downloads(page, path) {
  const link = el("a", "download", "CSV");
  if (page.source.live) link.href = page.source.url(path);
  else {
    // A report writes the table when it is asked for.
    link.href = `#${path}`;
    link.addEventListener("click", (event) => {
      event.preventDefault();
      const saved = el("a");
      saved.href = page.source.url(path);
      saved.download = path.split("?")[0].replace(/^api\//, "potluck-").replaceAll("/", "-");
      saved.click();
    });
  }
  return link;
}

// Facts as a definition list: pairs of a word and a text or node. What is null is left out.
export function facts(node, pairs) {
  list(node, pairs.filter(([, value]) => value !== null), ([name]) => name, ([name]) => el("div", "", el("dt", "", name), el("dd")), (row, [, value]) => {
    const cell = row.lastChild;
    if (typeof value === "string") text(cell, value);
    else if (cell.firstChild !== value) cell.replaceChildren(value);
  });
  return node;
}

export function peerLink(page, id, name) {
  const link = el("a", "peer-text");
  return fillPeerLink(link, page, id, name);
}

export function fillPeerLink(link, page, id, name) {
  attribute(link, "href", place(page, `peer/${encodeURIComponent(id)}`));
  attribute(link, "title", String(id));
  text(link, words(name || shortId(id)));
  return link;
}

export const shortId = (id) => String(id ?? "").slice(0, 8);

// Names by id. Two peers of one name are told apart by the beginning of their id.
const met = new Map(); // names of who may be gone, but is still waited for or linked to

export function namesOf(state) {
  const peers = state?.peers ?? [];
  const seen = new Map();
  for (const peer of peers) seen.set(peer.name, (seen.get(peer.name) ?? 0) + 1);
  const full = (peer) => (seen.get(peer.name) > 1 ? `${peer.name} ${String(peer.id).slice(0, 4)}` : peer.name);
  const known = new Map(peers.map((peer) => [peer.id, peer.name ? full(peer) : shortId(peer.id)]));
  for (const peer of peers) if (peer.name) met.set(peer.id, peer.name);
  return (id) => known.get(id) ?? met.get(id) ?? shortId(id);
}

const least = (value) => (value === null || value === undefined ? -Infinity : value);
const compare = (a, b) => (typeof a === "string" && typeof b === "string" ? a.localeCompare(b) : least(a) < least(b) ? -1 : least(a) > least(b) ? 1 : 0);

// A table that is sorted by the heading that is pressed. A column: {title, n (right-aligned), value(row), fill(cell, row)}.
export function table(label, columns, { key, sort = 0, isDown = false } = {}) {
  const order = { column: sort, isDown, rows: [] };
  const body = el("tbody");
  const heads = columns.map((column, index) => {
    const button = el("button", "sort", column.title);
    button.type = "button";
    button.addEventListener("click", () => {
      order.isDown = order.column === index ? !order.isDown : Boolean(column.n);
      order.column = index;
      draw();
    });
    const head = el("th", column.n ? "n" : "", column.value ? button : column.title);
    head.scope = "col";
    return head;
  });
  const node = el("div", "scroll", el("table", "", el("thead", "", el("tr", "", ...heads)), body));
  node.tabIndex = 0;
  node.setAttribute("role", "region");
  node.setAttribute("aria-label", label);
  const make = () => {
    const cells = columns.map((column, index) => el(index ? "td" : "th", column.n ? "n" : column.className ?? ""));
    cells[0].scope = "row";
    return el("tr", "", ...cells);
  };
  const fill = (row, item) => columns.forEach((column, index) => {
    if (column.fill) column.fill(row.children[index], item);
    else text(row.children[index], column.text ? column.text(item) : words(column.value(item)));
  });
  function draw() {
    const { value } = columns[order.column];
    const sorted = value ? [...order.rows].sort((a, b) => compare(value(a), value(b)) * (order.isDown ? -1 : 1)) : order.rows;
    columns.forEach((column, index) => {
      if (column.value) attribute(heads[index], "aria-sort", index === order.column ? (order.isDown ? "descending" : "ascending") : "none");
    });
    list(body, sorted, key, make, fill);
  }
  return {
    node,
    show: (rows) => ((order.rows = rows), draw()),
    order: (column, isDown = true) => Object.assign(order, { column, isDown }),
  };
}

// A link in a cell that is kept while its row is.
export function linkCell(cell, address, label) {
  const link = cell.firstElementChild ?? cell.appendChild(el("a", "peer-text"));
  attribute(link, "href", address);
  text(link, label);
}

// A bar in a cell, `share` of its track, with its words beside it.
export function barCell(cell, share, label, className = "") {
  if (!cell.firstElementChild) cell.append(el("span", "bar", el("i")), el("span", "bar-words"));
  attribute(cell, "class", "with-bar");
  attribute(cell.firstChild.firstChild, "class", className);
  cell.firstChild.firstChild.style.width = `${Math.min(1, Math.max(0, share || 0)) * 100}%`;
  text(cell.lastChild, label);
}

// One of several, as a row of buttons: [[value, label]].
export function choice(label, options, chosen, choose) {
  const node = el("div", "switch");
  node.setAttribute("role", "group");
  node.setAttribute("aria-label", label);
  const mark = (value) => {
    for (const button of node.children) attribute(button, "aria-pressed", String(button.dataset.value === value));
  };
  for (const [value, name] of options) {
    const button = el("button", "", name);
    button.type = "button";
    button.dataset.value = value;
    button.addEventListener("click", () => (mark(value), choose(value)));
    node.append(button);
  }
  mark(chosen);
  return { node, mark };
}

// Calls `draw(width)` whenever the width of `node` differs; a node that is gone is forgotten.
export function fit(node, draw) {
  let last = 0;
  new ResizeObserver(() => {
    const width = Math.floor(node.clientWidth);
    if (width && width !== last) draw((last = width));
  }).observe(node);
  return () => last && draw(last);
}

export function mbit(rate) {
  if (!isNumber(rate)) return NONE;
  const value = (rate * 8) / 1e6;
  return value >= 99.5 ? whole(value) : value >= 9.95 ? value.toFixed(0) : value.toFixed(value < 0.095 ? 2 : 1);
}
export const rate = (value) => (isNumber(value) ? `${mbit(value)} Mbit/s` : NONE);
export const ms = (seconds) => (isNumber(seconds) ? `${seconds < 0.0095 ? (seconds * 1000).toFixed(1) : whole(seconds * 1000)} ms` : NONE);
// Short times too: 0 s, 23 ms, 0.42 s, 9.1 s, 2 min 5 s.
export function brief(seconds) {
  if (!isNumber(seconds) || seconds >= 0.995) return duration(seconds);
  if (seconds <= 0) return "0 s";
  return seconds < 0.0995 ? ms(seconds) : `${seconds.toFixed(2)} s`;
}

export function stamp(time) {
  if (!isNumber(time)) return NONE;
  const date = new Date(time * 1000);
  if (Number.isNaN(date.getTime())) return NONE;
  return date.toLocaleString("en-GB", { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit", second: "2-digit" });
}
