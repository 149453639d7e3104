// The operations of one step, a lane per replica, as SVG; the critical path is drawn over it.

import { el, text } from "./dom.js";
import { plural, whole } from "./format.js";
import { brief, fit, place, shortId, svg } from "./detail.js";

const [ROW, OP, TOP, LEAST] = [24, 16, 20, 520]; // pixels: a lane, an operation in it, the axis, the least width
const SHOWN = 16; // lanes before those off the path are folded
const KINDS = { forward: "forward", backward: "backward", update: "update" };

export function ganttLegend() {
  const ops = Object.entries(KINDS).map(([kind, name]) => el("li", "", sample(kind), name));
  return el("ul", "legend gantt-legend", ...ops, el("li", "", pathSample(), "critical path: to shorten anything else would not have helped"));
}

// Round seconds, about one in every 90 pixels.
function ticks(end, width) {
  const rough = (end * 90) / width;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((size) => size * power).find((size) => size >= rough * 0.999);
  return Array.from({ length: Math.floor(end / step + 1e-9) + 1 }, (_, i) => i * step);
}

function sample(kind) {
  return svg("svg", { width: 22, height: 12, "aria-hidden": "true" }, patterns(`key-${kind}`), svg("rect", { class: `op ${kind}`, x: 0.5, y: 0.5, width: 21, height: 11 }), hatch(kind, `key-${kind}`, { x: 0.5, y: 0.5, width: 21, height: 11 }));
}

const pathSample = () => svg("svg", { width: 22, height: 12, "aria-hidden": "true" }, svg("path", { class: "critical", d: "M0 9 H9 L13 3 H22" }));

// Backward is hatched one way and update both ways, so that neither needs its colour.
function patterns(id) {
  const lines = (name, d) => svg("pattern", { id: `${id}-${name}`, width: 6, height: 6, patternUnits: "userSpaceOnUse" }, svg("path", { class: "hatch", d }));
  return svg("defs", {}, lines("backward", "M0 6 L6 0"), lines("update", "M0 0 L6 6 M0 6 L6 0"));
}

function hatch(kind, id, box) {
  return kind === "forward" ? svg("g") : svg("rect", { fill: `url(#${id}-${kind})`, ...box });
}

// Why a lane shows nothing: workers tell of every few steps and of slow ones, and replicas wait for each other at rounds
// alone, so that one may be done before the slowest has begun.
function absent({ ops }) {
  if (!ops.length) return "did not tell of this step";
  const end = Math.max(...ops.map((op) => op.end));
  return end <= 0 ? `was done with it ${brief(-end)} before` : "";
}

export class Gantt {
  constructor(note) {
    this.note = note;
    this.isOpen = false;
    this.data = null;
    this.names = el("ul", "gantt-names");
    this.frame = el("div", "gantt-frame");
    this.frame.tabIndex = 0;
    this.frame.setAttribute("role", "region");
    this.more = el("button", "more");
    this.more.type = "button";
    this.more.addEventListener("click", () => {
      this.isOpen = !this.isOpen;
      this.show(this.data);
    });
    this.node = el("div", "gantt", el("div", "gantt-rows", this.names, this.frame), this.more);
    this.again = fit(this.frame, (width) => this.draw(width));
  }

  // `seconds`: the step's length; `nameOf(id)`: a peer's name.
  show(data) {
    this.data = data;
    const { lanes, path, nameOf, page } = data;
    const onPath = new Set(path.map((one) => one.peer));
    const all = [...lanes].sort((a, b) => a.stage - b.stage || (a.name || a.peer).localeCompare(b.name || b.peer));
    const folded = all.filter((lane) => onPath.has(lane.peer));
    this.lanes = this.isOpen || all.length <= SHOWN || !folded.length ? all.slice(0, this.isOpen ? undefined : Math.max(SHOWN, folded.length)) : folded;
    this.more.hidden = all.length === this.lanes.length && !this.isOpen;
    text(this.more, this.isOpen ? "Show the critical path's lanes only" : `${all.length - this.lanes.length} more lanes, off the critical path`);
    text(this.note, plural(all.length, "lane"));
    const shape = JSON.stringify(this.lanes.map(({ stage, peer, name }) => [stage, peer, name]));
    if (shape !== this.shape) this.nameLanes(page);
    this.shape = shape;
    this.frame.setAttribute("aria-label", `${this.sentence(nameOf)} The table below holds the same path.`);
    this.again();
  }

  nameLanes(page) {
    this.names.replaceChildren(...this.lanes.map((lane, i) => {
      const link = el("a", "peer-text", lane.name || shortId(lane.peer));
      link.href = place(page, `peer/${encodeURIComponent(lane.peer)}`);
      link.title = lane.peer;
      const isFirst = i === 0 || this.lanes[i - 1].stage !== lane.stage;
      return el("li", isFirst && i ? "first" : "", el("small", "", isFirst ? `stage ${whole(lane.stage)}` : ""), link);
    }));
  }

  sentence(nameOf) {
    const { path, seconds } = this.data;
    const spent = new Map();
    for (const one of path) {
      const name = one.receiver ? `wire ${nameOf(one.peer)} to ${nameOf(one.receiver)}` : `${one.what} at ${nameOf(one.peer)}`;
      spent.set(name, (spent.get(name) ?? 0) + one.end - one.start);
    }
    const most = [...spent].sort((a, b) => b[1] - a[1]).slice(0, 3).map(([name, time]) => `${name} ${brief(time)}`);
    return `A step of ${brief(seconds)} in ${plural(this.lanes.length, "lane")}. Longest on the critical path: ${most.join(", ") || "unknown"}.`;
  }

  draw(room) {
    const { path, seconds, nameOf } = this.data ?? {};
    if (!this.data) return;
    const width = Math.max(LEAST, room);
    const height = TOP + this.lanes.length * ROW + 2;
    const end = Math.max(seconds, ...this.lanes.flatMap((lane) => lane.ops.map((op) => op.end)), ...path.map((one) => one.end), 1e-9);
    const x = (time) => 1 + (time / end) * (width - 4);
    const top = (index) => TOP + index * ROW + (ROW - OP) / 2;
    const index = new Map(this.lanes.map((lane, i) => [lane.peer, i]));
    const drawing = svg("svg", { width, height, "aria-hidden": "true" }, patterns("op"));
    for (const value of ticks(end, width)) {
      drawing.append(svg("line", { class: "gantt-grid", x1: x(value), x2: x(value), y1: TOP - 4, y2: height }));
      const anchor = x(value) > width - 24 ? "end" : value === 0 ? "start" : "middle";
      drawing.append(svg("text", { x: x(value), y: 12, "text-anchor": anchor }, value === 0 ? "0" : brief(value)));
    }
    this.lanes.forEach((lane, i) => {
      if (i && this.lanes[i - 1].stage !== lane.stage) drawing.append(svg("line", { class: "gantt-stage", x1: 0, x2: width, y1: TOP + i * ROW, y2: TOP + i * ROW }));
      const why = absent(lane);
      if (why) drawing.append(svg("text", { x: x(0) + 6, y: TOP + i * ROW + ROW / 2 + 4 }, why));
      for (const op of lane.ops) drawing.append(...this.operation(op, lane, x, top(i)));
    });
    drawing.append(...this.critical(path, index, x, (i) => TOP + i * ROW + ROW / 2, nameOf));
    this.frame.replaceChildren(drawing);
  }

  operation(op, lane, x, y) {
    const box = { x: x(op.start).toFixed(1), y, width: Math.max(1, x(op.end) - x(op.start) - 0.5).toFixed(1), height: OP };
    const shape = svg("rect", { class: `op ${op.kind}`, rx: 1.5, ...box }, svg("title", {}, `${lane.name || shortId(lane.peer)}: ${op.kind}${op.microbatch === null ? "" : ` of microbatch ${op.microbatch}`}, ${brief(op.end - op.start)}`));
    return [shape, hatch(op.kind, "op", { ...box, class: "hatching" })];
  }

  // Along a lane while a peer works, across while the wire carries; who is folded away leaves a gap.
  critical(path, index, x, middle, nameOf) {
    const drawn = [];
    let before = null;
    for (const one of [...path].sort((a, b) => a.start - b.start)) {
      const [from, to] = [index.get(one.peer), index.get(one.receiver ?? one.peer)];
      if (from === undefined || to === undefined) {
        before = null;
        continue;
      }
      const [start, stop] = [[x(one.start), middle(from)], [x(one.end), middle(to)]];
      const join = before && (Math.abs(before[0] - start[0]) > 0.5 || before[1] !== start[1]) ? `M${before.join(" ")} L` : "M";
      const d = `${join}${start.join(" ")} L${stop.join(" ")}`;
      const who = one.receiver ? `${nameOf(one.peer)} to ${nameOf(one.receiver)}` : nameOf(one.peer);
      drawn.push(svg("path", { class: "critical-halo", d }), svg("path", { class: `critical ${one.what === "wire" ? "on-wire" : ""}`, d }, svg("title", {}, `critical path, ${one.what}, ${who}: ${brief(one.end - one.start)}`)));
      before = stop;
    }
    // All halos first, else one covers its neighbour's line.
    return [...drawn.filter((_, i) => i % 2 === 0), ...drawn.filter((_, i) => i % 2)];
  }
}
