// A heat map as a grid that arrow keys walk through: one cell per ordered pair.

import { attribute, el, text } from "./dom.js";
import { isNumber } from "./format.js";

const STEPS = 6;
const ROOMY = 12; // columns up to which a cell has room for its number
const PATHS = [["direct", "●"], ["punched", "○"], ["relayed", "▲"]];
const GLYPHS = Object.fromEntries(PATHS);

export class Heat {
  // `describe(a, b)`: [[title, sentence]] of a pair of nodes, this way and back. `open(idA, idB)`: its cell was chosen.
  constructor({ describe, open }) {
    this.describe = describe;
    this.open = open;
    this.cells = new Map();
    this.place = [0, 0];
    this.shape = "";
    this.heads = el("tr");
    this.body = el("tbody");
    this.grid = el("table", "heat", el("thead", "", this.heads), this.body);
    this.grid.setAttribute("role", "grid");
    this.grid.setAttribute("aria-label", "Links: a row sends, a column receives. Arrow keys move, Enter opens the history.");
    this.scale = el("div", "heat-scale", el("span"), ...Array.from({ length: STEPS }, (_, i) => el("i", `heat-${i}`)), el("span"));
    const paths = PATHS.map(([name, glyph]) => el("li", "", el("span", "way-mark", glyph), name));
    const legend = el("div", "heat-legend", this.scale, el("ul", "legend", ...paths, el("li", "", el("i", "swatch none"), "not measured")));
    this.readout = el("dl", "readout");
    const scroll = el("div", "scroll heat-scroll", this.grid);
    this.node = el("div", "heat-map", legend, scroll, this.readout);
    this.grid.addEventListener("keydown", (event) => this.key(event));
    for (const [name, isOver] of [["pointerover", true], ["focusin", true], ["pointerleave", false]]) {
      this.grid.addEventListener(name, (event) => this.read(isOver ? event.target.closest?.("td")?.place : null));
    }
    this.grid.addEventListener("click", (event) => this.choose(event.target.closest?.("td")));
  }

  at(from, to) {
    return this.data.at(from, to);
  }

  get isGrouped() {
    return Boolean(this.data?.isGrouped);
  }

  // `rows`, `columns`: [{id, name, group}]; `at(from, to)`: a link or undefined; `by`: {value, short, says, isLog, isGood}.
  show(data) {
    this.data = data;
    const { rows, columns, by } = data;
    const shape = JSON.stringify([rows, columns]);
    if (shape !== this.shape) this.build(rows, columns);
    this.shape = shape;
    const known = rows.flatMap((a) => columns.map((b) => data.at(a.id, b.id))).filter(Boolean).map(by.value).filter(isNumber);
    const low = by.isLog ? known.reduce((a, b) => Math.min(a, b), Infinity) : 0;
    const high = by.isLog ? known.reduce((a, b) => Math.max(a, b), -Infinity) : 1;
    const size = (value) => (by.isLog ? Math.log(Math.max(value, 1e-9)) : value);
    const span = size(high) - size(low) || 1;
    const step = (value) => Math.max(0, Math.min(STEPS - 1, Math.floor(((size(value) - size(low)) / span) * STEPS)));
    this.node.classList.toggle("is-good", Boolean(by.isGood));
    text(this.scale.firstChild, known.length ? by.says(low) : "");
    text(this.scale.lastChild, known.length ? by.says(high) : "");
    for (const cell of this.cells.values()) {
      const [a, b] = cell.pair;
      const link = data.at(a.id, b.id);
      const value = link ? by.value(link) : null;
      const heat = isNumber(value) ? `heat-${step(value)}` : link ? "unknown" : a.id === b.id && !link ? "self" : "none";
      attribute(cell, "class", `${heat}${cell.dataset.edge ?? ""}`);
      text(cell.firstChild, columns.length <= ROOMY && isNumber(value) ? by.short(value) : "");
      text(cell.lastChild, link ? (GLYPHS[link.path] ?? "") : "");
      // Most cells of a large map say the same as before.
      const said = link ? JSON.stringify(link) : "";
      if (cell.said === said) continue;
      cell.said = said;
      const [[title, sentence]] = this.describe(a, b);
      attribute(cell, "aria-label", `${title}: ${sentence}`);
    }
    this.read();
  }

  build(rows, columns) {
    this.cells.clear();
    this.last = null;
    this.place = [0, 0];
    this.grid.classList.toggle("roomy", columns.length <= ROOMY);
    this.grid.classList.toggle("tight", columns.length > 30);
    this.node.classList.toggle("wide", columns.length > 30);
    const label = (node) => {
      const head = el("th", "", el("span", "peer-text", node.name));
      head.title = `${node.name}${node.group === "none" || node.id.startsWith("stage ") ? "" : `, stage ${node.group}`}`;
      return head;
    };
    const edge = (nodes, i) => i > 0 && nodes[i].group !== nodes[i - 1].group && !nodes[i].id.startsWith("stage ");
    this.heads.replaceChildren(el("td", "corner", "from ↓ to →"), ...columns.map((node) => Object.assign(label(node), { scope: "col" })));
    this.body.replaceChildren(...rows.map((a, i) => {
      const cells = columns.map((b, j) => {
        const cell = el("td", "", el("b"), el("span", "way-mark"));
        cell.dataset.edge = `${edge(rows, i) ? " gap-above" : ""}${edge(columns, j) ? " gap-left" : ""}`;
        cell.tabIndex = -1;
        cell.pair = [a, b];
        cell.place = [i, j];
        this.cells.set(`${i} ${j}`, cell);
        return cell;
      });
      return el("tr", "", Object.assign(label(a), { scope: "row" }), ...cells);
    }));
    this.cells.get("0 0")?.setAttribute("tabindex", "0");
  }

  key(event) {
    const [i, j] = this.place;
    const [last, end] = [this.data.rows.length - 1, this.data.columns.length - 1];
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      return this.choose(this.cells.get(`${i} ${j}`));
    }
    const far = event.ctrlKey;
    const next = {
      ArrowUp: [i - 1, j], ArrowDown: [i + 1, j], ArrowLeft: [i, j - 1], ArrowRight: [i, j + 1],
      Home: [far ? 0 : i, 0], End: [far ? last : i, end], PageUp: [i - 10, j], PageDown: [i + 10, j],
    }[event.key];
    if (!next) return;
    event.preventDefault();
    this.move([Math.max(0, Math.min(last, next[0])), Math.max(0, Math.min(end, next[1]))]);
  }

  move(place) {
    this.cells.get(this.place.join(" "))?.setAttribute("tabindex", "-1");
    this.place = place;
    this.focus();
  }

  focus() {
    const cell = this.cells.get(this.place.join(" "));
    cell?.setAttribute("tabindex", "0");
    cell?.focus();
  }

  choose(cell) {
    if (!cell?.pair) return;
    const [a, b] = cell.pair;
    this.cells.get(this.place.join(" "))?.setAttribute("tabindex", "-1");
    this.place = cell.place;
    cell.setAttribute("tabindex", "0");
    if (this.at(a.id, b.id) || this.at(b.id, a.id)) this.open(a.id, b.id);
  }

  // Both directions of the pair under the pointer or in focus, its row and column marked.
  read(place) {
    this.last = place ?? this.last;
    const cell = this.last && this.cells.get(this.last.join(" "));
    for (const head of this.grid.querySelectorAll("th.on")) head.classList.remove("on");
    if (!cell) return this.readout.replaceChildren(el("div", "", el("dt", "", "Point at a cell"), el("dd", "muted", "or walk with the arrow keys: both directions are told here; Enter opens their history.")));
    const [i, j] = cell.place;
    this.heads.children[j + 1].classList.add("on");
    this.body.children[i].firstChild.classList.add("on");
    const said = this.describe(...cell.pair);
    this.readout.replaceChildren(...said.map(([title, sentence]) => el("div", "", el("dt", "peer-text", title), el("dd", "", sentence))));
  }
}
