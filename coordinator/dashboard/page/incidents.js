// What happened to the run, as small coloured shapes along the curve's x axis and as a list of sentences.

import { $, attribute, el, list, shape, text } from "./dom.js";
import { clock, plural, whole, words } from "./format.js";

// Shape and word for each group; the colour is its class in style.css.
export const GROUPS = {
  lost: ["M2 2 L10 10 M10 2 L2 10", "lost"],
  joined: ["M6 1.5 L11 10.5 H1 Z", "joined"],
  left: ["M6 10.5 L11 1.5 H1 Z", "left"],
  divided: ["M1.5 1.5 H10.5 V10.5 H1.5 Z", "new division"],
  degraded: ["M6 1 A5 5 0 1 0 6 11 A5 5 0 1 0 6 1 M6 1 V11", "degraded round"],
  back: ["M1 6 L10.5 1 V11 Z", "taken back"],
  fault: ["M6 0.5 V11.5 M0.5 6 H11.5 M2.2 2.2 L9.8 9.8 M9.8 2.2 L2.2 9.8", "fault"],
  paused: ["M3 1.5 V10.5 M9 1.5 V10.5", "paused"],
  disk: ["M2 1.5 H10 V10.5 H2 Z M2 6 H10", "disk"],
};
const APART = 12; // pixels; nearer ones share a mark
const CROWDED = 60; // incidents; of more than these only marks with room for their number
const TOLD = 4; // sentences in a mark's tip
const LISTED = 100;

export const group = (incident) => (Object.hasOwn(GROUPS, incident?.group) ? incident.group : "fault");
export const glyph = (incident) => shape(GROUPS[group(incident)][0], `glyph ${group(incident)}`);
export const headline = (incident) => `${clock(incident.time)}, step ${whole(incident.step)}: ${words(incident.text)}`;

export class Incidents {
  // `go(time)` shows a moment; `over(x)` draws a line through the plot there, null takes it away.
  constructor({ go, over }) {
    this.rows = [];
    this.marks = [];
    this.go = go;
    this.over = over;
    this.strip = $("incidents");
    this.tip = $("incident-tip");
    this.strip.addEventListener("keydown", (event) => this.key(event));
    this.strip.addEventListener("mouseleave", () => this.tell(null));
    $("incident-list").addEventListener("toggle", () => this.showList());
  }

  set(rows) {
    this.rows = [...rows].sort((a, b) => a.time - b.time || a.id - b.id);
    const kinds = new Set(this.rows.map(group));
    $("incident-list").hidden = this.strip.hidden = !this.rows.length;
    text($("incident-count"), plural(this.rows.length, "incident"));
    list($("incident-key"), Object.keys(GROUPS).filter((name) => kinds.has(name)), (name) => name, (name) => el("li", "", glyph({ group: name }), GROUPS[name][1]), () => {});
    this.showList();
  }

  // The newest up to a moment, and those on either side of it.
  around(at) {
    const place = this.rows.findLastIndex((row) => row.time <= at + 0.001);
    const before = this.rows.findLast((row) => row.time < at - 0.001);
    return { now: this.rows[place] ?? null, before: before ?? null, after: this.rows.find((row) => row.time > at + 0.001) ?? null };
  }

  // `place(incident)`: where it is along the strip in pixels, or null where the plot does not show it.
  draw(place, at) {
    const marks = [];
    const apart = this.rows.length > CROWDED ? 2.8 * APART : APART;
    for (const row of this.rows) {
      const x = place(row);
      if (x === null) continue;
      const last = marks.at(-1);
      if (last && x - last.x < apart) last.rows.push(row);
      else marks.push({ x: Math.round(x), rows: [row] });
    }
    this.marks = marks;
    this.at = at;
    list(this.strip, marks, (mark) => mark.rows[0].id, () => this.make(), (node, mark) => this.fill(node, mark), (mark) => [mark.x, mark.rows.length, mark.rows.at(-1).id, at !== null && mark.rows[0].time > at]);
    const nodes = [...this.strip.children];
    if (nodes.length && !nodes.some((node) => node.tabIndex === 0)) nodes.at(-1).tabIndex = 0;
  }

  make() {
    const node = el("button", "mark");
    node.type = "button";
    node.tabIndex = -1;
    node.addEventListener("mouseenter", () => this.tell(node));
    node.addEventListener("focus", () => this.focus(node));
    node.addEventListener("blur", () => this.tell(null));
    node.addEventListener("click", () => this.go(node.mark.rows.at(-1).time));
    return node;
  }

  fill(node, mark) {
    node.mark = mark;
    node.style.left = `${mark.x}px`;
    // The worst of several gives the shape: whoever was lost says more than who joined.
    const order = Object.keys(GROUPS);
    const worst = mark.rows.toSorted((a, b) => rank(order, a) - rank(order, b))[0];
    if (node.firstChild?.classList.contains(group(worst)) !== true) node.replaceChildren(glyph(worst));
    attribute(node, "data-many", mark.rows.length > 1 ? String(mark.rows.length) : "");
    attribute(node, "aria-label", `${headline(mark.rows.at(-1))}${mark.rows.length > 1 ? `, and ${mark.rows.length - 1} more` : ""}. Show this moment`);
    node.classList.toggle("later", this.at !== null && mark.rows[0].time > this.at);
  }

  focus(node) {
    for (const other of this.strip.children) other.tabIndex = other === node ? 0 : -1;
    this.tell(node);
  }

  tell(node) {
    this.tip.hidden = !node;
    this.over(node ? node.mark.x : null);
    if (!node) return;
    const { rows, x } = node.mark;
    const told = rows.slice(-TOLD).map((row) => el("p", "", glyph(row), el("span", "peer-text", headline(row))));
    if (rows.length > TOLD) told.unshift(el("p", "when", `${whole(rows.length - TOLD)} more before`));
    this.tip.replaceChildren(...told);
    const room = this.strip.clientWidth;
    this.tip.style.left = `${Math.max(0, Math.min(x - this.tip.offsetWidth / 2, room - this.tip.offsetWidth))}px`;
  }

  key(event) {
    const nodes = [...this.strip.children];
    const at = nodes.indexOf(document.activeElement);
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: nodes.length - 1 }[event.key];
    if (to === undefined || at < 0) return;
    event.preventDefault();
    nodes[Math.max(0, Math.min(nodes.length - 1, to))].focus();
  }

  showList() {
    if (!$("incident-list").open) return;
    const rows = this.rows.slice(-LISTED).reverse();
    list($("incident-rows"), rows, (row) => row.id, () => el("li"), (node, row) => {
      const link = el("a", "", el("time", "", clock(row.time)), el("span", "step", `step ${whole(row.step)}`), glyph(row), el("span", "peer-text", words(row.text)));
      link.href = `#/?at=${row.time}`;
      node.replaceChildren(link);
    }, (row) => [row.id, row.text]);
    text($("incident-more"), this.rows.length > LISTED ? `The newest ${LISTED} of ${whole(this.rows.length)}; the rest is in the CSV.` : "");
  }
}

const rank = (order, row) => ["lost", "fault", "back", "disk"].includes(group(row)) ? order.indexOf(group(row)) - 100 : order.indexOf(group(row));
