// The loss curve on a canvas: axes, three series, and a crosshair for mouse, touch and arrow keys.

import { $, attribute, el, text } from "./dom.js";
import { clock, count, isNumber, loss, whole } from "./format.js";
import { decimals, extent, nearest, smooth, thin, ticks } from "./series.js";

const MARGIN = { top: 12, right: 14, bottom: 34, left: 50 };
const orNull = (value) => (isNumber(value) ? value : null);

export class LossChart {
  constructor() {
    this.canvas = $("canvas");
    this.known = new Map();
    this.points = [];
    this.evaluated = new Set();
    this.cursor = -1;
    this.tip = $("tip");
    this.pending = false;
    new ResizeObserver(() => this.refresh()).observe($("chart"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.refresh());
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerdown", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => this.move(-1));
    this.canvas.addEventListener("blur", () => this.move(-1));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
  }

  clear() {
    this.known.clear();
    this.move(-1);
    this.prepare();
  }

  // A held-out loss may come later than the training loss of its step, and a step taken again replaces the old one.
  add(points) {
    for (const point of points) {
      if (!isNumber(point?.step)) continue;
      const said = Object.entries(point).filter(([, value]) => value !== null);
      this.known.set(point.step, { ...this.known.get(point.step), ...Object.fromEntries(said) });
    }
    this.prepare();
  }

  // Steps whose published model somebody evaluated.
  mark(rows) {
    this.evaluated = new Set(rows.map((row) => row.step).filter(isNumber));
    this.refresh();
  }

  // The latest training loss, as the summary shows it.
  get latest() {
    const at = this.raw?.findLastIndex((value) => value !== null) ?? -1;
    return { raw: this.raw?.[at], smoothed: this.soft?.[at] };
  }

  prepare() {
    this.points = [...this.known.values()].sort((a, b) => a.step - b.step);
    this.steps = this.points.map((point) => point.step);
    this.raw = this.points.map((point) => orNull(point.train));
    this.held = this.points.map((point) => orNull(point.heldout));
    this.soft = smooth(this.raw);
    this.refresh();
  }

  refresh() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.pending = false;
      this.draw();
    });
  }

  scales() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const [inner, tall] = [width - MARGIN.left - MARGIN.right, height - MARGIN.top - MARGIN.bottom];
    const [low, high] = extent(this.raw, this.held) ?? [0, 1];
    const start = this.steps[0];
    const end = Math.max(this.steps.at(-1), start + 1);
    return {
      width, height, low, high, start, end,
      x: (step) => MARGIN.left + ((step - start) / (end - start)) * inner,
      y: (value) => MARGIN.top + (1 - (value - low) / (high - low)) * tall,
      step: (x) => start + ((x - MARGIN.left) / inner) * (end - start),
    };
  }

  draw() {
    const isEmpty = !this.points.length || !extent(this.raw, this.held);
    $("chart-empty").hidden = !isEmpty;
    this.canvas.hidden = isEmpty;
    if (isEmpty) return this.showTip(null);
    const to = (this.to = this.scales());
    if (to.width < 80 || to.height < 80) return undefined;
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(to.width * ratio);
    this.canvas.height = Math.round(to.height * ratio);
    const style = getComputedStyle(this.canvas);
    const pen = this.canvas.getContext("2d");
    const color = (name) => style.getPropertyValue(`--${name}`).trim();
    pen.scale(ratio, ratio);
    pen.font = `12px ${style.fontFamily}`;
    this.axes(pen, to, color);
    const xs = this.steps.map(to.x);
    this.line(pen, thin(xs, this.raw), to, color("raw"), 1);
    this.line(pen, thin(xs, this.soft), to, color("train"), 2);
    const held = xs.map((x, i) => [x, this.held[i]]).filter(([, value]) => value !== null);
    this.line(pen, held, to, color("held"), 1.5);
    if (held.length <= to.width / 12) held.forEach(([x, value]) => this.dot(pen, x, to.y(value), color("held"), color("card")));
    this.diamonds(pen, to, color("evaluated"));
    if (this.cursor >= 0) this.crosshair(pen, to, color);
    this.showTip(this.reading()); // drawn again after a resize, it must find its place again too
    this.describe();
    return undefined;
  }

  axes(pen, to, color) {
    const [left, bottom, right] = [MARGIN.left, to.height - MARGIN.bottom, to.width - MARGIN.right];
    pen.fillStyle = color("muted");
    pen.lineWidth = 1;
    const vertical = ticks(to.low, to.high, Math.floor(to.height / 45));
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    for (const value of vertical.values) {
      const y = Math.round(to.y(value)) + 0.5;
      this.stroke(pen, color("grid"), [[left, y], [right, y]]);
      pen.fillText(value.toFixed(decimals(vertical.step)), left - 9, y);
    }
    const across = ticks(to.start, to.end, Math.floor(to.width / 75), 1);
    pen.textAlign = "center";
    pen.textBaseline = "top";
    for (const value of across.values) {
      const x = Math.round(to.x(value)) + 0.5;
      this.stroke(pen, color("line"), [[x, bottom], [x, bottom + 5]]);
      const half = pen.measureText(whole(value)).width / 2;
      pen.fillText(whole(value), Math.min(x, to.width - half), bottom + 9);
    }
    this.stroke(pen, color("line"), [[left, bottom + 0.5], [right, bottom + 0.5]]);
  }

  stroke(pen, color, corners) {
    pen.strokeStyle = color;
    pen.beginPath();
    corners.forEach(([x, y], i) => (i ? pen.lineTo(x, y) : pen.moveTo(x, y)));
    pen.stroke();
  }

  line(pen, corners, to, color, width) {
    pen.lineWidth = width;
    pen.lineJoin = "round";
    this.stroke(pen, color, corners.map(([x, value]) => [x, to.y(value)]));
  }

  dot(pen, x, y, color, edge, radius = 3.5) {
    pen.beginPath();
    pen.arc(x, y, radius, 0, 2 * Math.PI);
    pen.fillStyle = color;
    pen.strokeStyle = edge;
    pen.lineWidth = 1.5;
    pen.fill();
    pen.stroke();
  }

  diamonds(pen, to, color) {
    const y = to.height - MARGIN.bottom;
    pen.fillStyle = color;
    for (const step of this.evaluated) {
      const x = to.x(step);
      if (x < MARGIN.left - 5 || x > to.width) continue;
      pen.beginPath();
      [[x, y - 5], [x + 5, y], [x, y + 5], [x - 5, y]].forEach(([a, b], i) => (i ? pen.lineTo(a, b) : pen.moveTo(a, b)));
      pen.fill();
    }
  }

  // What is known at the cursor: the training loss there, and the last held-out loss up to there.
  reading() {
    const point = this.points[this.cursor];
    if (!point) return null;
    const seen = this.held.slice(0, this.cursor + 1).findLastIndex((value) => value !== null);
    return { point, soft: this.soft[this.cursor], raw: this.raw[this.cursor], seen };
  }

  crosshair(pen, to, color) {
    const { point, soft, raw, seen } = this.reading();
    const x = to.x(point.step);
    pen.lineWidth = 1;
    this.stroke(pen, color("muted"), [[x, MARGIN.top], [x, to.height - MARGIN.bottom]]);
    if (raw !== null) this.dot(pen, x, to.y(raw), color("raw"), color("card"), 3);
    if (soft !== null) this.dot(pen, x, to.y(soft), color("train"), color("card"), 4.5);
    if (seen >= 0) this.dot(pen, to.x(this.steps[seen]), to.y(this.held[seen]), color("held"), color("card"), 5);
  }

  point(event) {
    if (this.to && this.points.length) this.move(nearest(this.steps, this.to.step(event.offsetX)));
  }

  key(event) {
    const last = this.points.length - 1;
    const at = this.cursor < 0 ? last : this.cursor;
    const stride = event.shiftKey ? Math.max(1, Math.round(last / 20)) : 1;
    const target = { ArrowLeft: at - stride, ArrowRight: at + stride, Home: 0, End: last, Escape: -1 }[event.key];
    if (target === undefined || last < 0) return;
    event.preventDefault();
    this.move(event.key === "Escape" ? -1 : Math.min(last, Math.max(0, target)));
    const now = this.reading();
    if (now) text($("chart-live"), `Step ${now.point.step}: training ${loss(now.raw)}, held-out ${loss(this.held[now.seen])}`);
  }

  move(cursor) {
    if (cursor === this.cursor) return;
    this.cursor = cursor;
    this.showTip(this.to ? this.reading() : null);
    this.refresh();
  }

  showTip(now) {
    this.tip.hidden = !now;
    if (!now) return;
    const { point, soft, raw, seen } = now;
    const row = (key, label, value) => el("p", "", el("i", key ? `key ${key}` : "key"), el("span", "", label), el("b", "", value));
    const held = seen >= 0 && seen !== this.cursor ? `held-out, step ${whole(this.steps[seen])}` : "held-out";
    const rows = [el("p", "when", `Step ${whole(point.step)}, ${clock(point.time)}`)];
    if (raw !== null) rows.push(row("raw", "training", loss(raw)), row("train", "smoothed", loss(soft)));
    if (seen >= 0) rows.push(row("held", held, loss(this.held[seen])));
    if (this.evaluated.has(point.step)) rows.push(row("evaluated", "evaluated", "see below"));
    if (isNumber(point.tokens)) rows.push(row("", "tokens", count(point.tokens)));
    this.tip.replaceChildren(...rows);
    const x = this.to.x(point.step);
    const { offsetWidth: wide } = this.tip;
    const beside = x > this.to.width / 2 ? x - 14 - wide : x + 14;
    this.tip.style.left = `${Math.max(0, Math.min(beside, this.to.width - wide))}px`;
  }

  describe() {
    const seen = this.held.findLast((value) => value !== null) ?? null;
    const last = this.points.at(-1);
    const range = `steps ${whole(this.to.start)} to ${whole(last.step)}`;
    const label = `Loss by step, ${range}: training ${loss(this.latest.smoothed)}, held-out ${loss(seen)}. Arrow keys read points.`;
    attribute(this.canvas, "aria-label", label);
  }
}
