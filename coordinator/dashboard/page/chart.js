// The loss curve: training (thin, and its extremes), smoothed, held-out, evaluated steps; a crosshair for mouse, touch
// and arrow keys; what came after the moment shown is faded.

import { $, attribute, el, text } from "./dom.js";
import { columns } from "./curve.js";
import { clock, count, isNumber, loss, whole } from "./format.js";
import { AXIS, bindChoice, color, plot, remember, remembered, SIDE } from "./plot.js";
import { airy, decimals, extent, logTicks, nearest, smooth, ticks, timeLabel, timeTicks } from "./series.js";

const AXES = { step: "step", tokens: "tokens", time: "time" };
const SHARES = [0, 0.006, 0.025, 0.07]; // half-life of the smoothing, of the steps so far
const EVERY = 250; // milliseconds between two drawings of what streams in
const NOTHING = { rows: [], x: [], steps: [], raw: [], low: [], high: [], held: [] };

export class LossChart {
  // `incidents` are drawn below the axis; `go(time)` shows a moment; `redrawn()` hears of it.
  constructor(curve, incidents, { go, redrawn }) {
    this.curve = curve;
    this.incidents = incidents;
    Object.assign(this, { go, redrawn });
    this.evaluated = new Set();
    this.data = { ...NOTHING, soft: [] };
    this.at = null;
    this.zoom = null;
    this.cursor = -1;
    this.shown = "";
    this.tip = $("tip");
    this.root = $("plot");
    this.choose();
    this.root.addEventListener("keydown", (event) => this.key(event));
    this.root.addEventListener("blur", () => this.move(-1));
    this.root.addEventListener("pointerdown", (event) => event.pointerType !== "mouse" && this.touch(event));
    this.root.addEventListener("pointermove", (event) => event.pointerType !== "mouse" && this.touch(event));
    $("whole-run").addEventListener("click", () => this.zoomTo(null));
  }

  choose() {
    this.axis = remembered("x", "step", Object.keys(AXES));
    this.scale = remembered("y", "linear", ["linear", "log"]);
    this.share = SHARES[Number(remembered("smoothing", "2", ["0", "1", "2", "3"]))];
    const set = (name, field, rebuild) => (value) => {
      this[field] = value;
      remember(name, value);
      if (field === "axis") this.zoom = null;
      if (rebuild) this.drop();
      this.changed();
    };
    bindChoice(document, "x-axis", this.axis, set("x", "axis", false));
    bindChoice(document, "y-scale", this.scale, set("y", "scale", true));
    const slider = $("smoothing");
    slider.value = String(SHARES.indexOf(this.share));
    const say = () => attribute(slider, "aria-valuetext", ["none", "little", "usual", "strong"][Number(slider.value)]);
    say();
    slider.addEventListener("input", () => {
      this.share = SHARES[Number(slider.value)];
      remember("smoothing", slider.value);
      say();
      this.changed();
    });
  }

  // Steps whose published model somebody evaluated.
  mark(rows) {
    this.evaluated = new Set(rows.map((row) => row.step).filter(isNumber));
    this.plot?.redraw(false);
  }

  // Draws the points anew, as of a moment (null: now). Often called: what streams in is drawn four times a second.
  show(at) {
    if (this.shown === `${this.curve.version} ${at}`) return;
    const isMoved = at !== this.at;
    this.at = at;
    clearTimeout(this.timer);
    const wait = isMoved ? 0 : EVERY - (performance.now() - (this.drawnAt ?? -EVERY));
    if (wait <= 0) this.refresh();
    else this.timer = setTimeout(() => this.changed(), wait);
  }

  // Drawn anew outside `show`: the summary tells the smoothed loss too.
  changed() {
    this.refresh();
    this.redrawn();
  }

  // The newest training loss up to the moment shown, as the summary tells it.
  get latest() {
    const { rows, raw, soft } = this.data;
    const at = this.at === null ? raw.length - 1 : rows.findLastIndex((row) => !(row.time > this.at));
    const seen = raw.slice(0, at + 1).findLastIndex((value) => value !== null);
    return { raw: this.at === null ? (this.curve.latest ?? undefined) : raw[seen], smoothed: soft[seen] };
  }

  refresh() {
    clearTimeout(this.timer);
    this.drawnAt = performance.now();
    this.shown = `${this.curve.version} ${this.at}`;
    const data = columns(this.curve.points, AXES[this.axis]);
    this.data = { ...data, soft: smooth(data.raw, data.steps, this.share) };
    const isEmpty = !extent([data.raw, data.held]);
    $("chart-empty").hidden = !isEmpty;
    this.root.hidden = isEmpty;
    if (isEmpty) return;
    const { x, high, low, raw, soft, held } = this.data;
    const series = [x, high, low, raw, soft, held];
    if (this.plot) this.plot.setData(series);
    else this.plot = plot(this.root, this.options(), series);
    text($("h-loss"), `Loss by ${this.axis}`);
    this.describe();
  }

  drop() {
    this.plot?.destroy();
    this.plot = null;
    this.root.replaceChildren();
  }

  get isLog() {
    return this.scale === "log" && (extent([this.data.low, this.data.held])?.[0] ?? 0) > 0;
  }

  options() {
    const line = (name, width, more = {}) => ({ stroke: () => color(name), width, spanGaps: true, points: { show: false }, ...more });
    const none = { stroke: null, width: 0, points: { show: false }, spanGaps: true };
    return {
      padding: [10, 26, 0, 4],
      cursor: { y: false, points: { show: false }, drag: { x: true, y: false, setScale: false }, bind: { dblclick: () => () => this.zoomTo(null) } },
      scales: {
        x: { time: false, range: () => this.zoom ?? this.span() },
        y: { distr: this.isLog ? 3 : 1, range: () => this.height() },
      },
      axes: [
        { ...AXIS, size: 34, splits: (u, _, low, high) => this.across(u, low, high).values, values: (u, values) => this.labels(u, values) },
        {
          ...SIDE,
          size: 50,
          splits: (u, _, low, high) => (this.isLog ? logTicks(low, high, Math.floor(u.height / 40)) : ticks(low, high, Math.floor(u.height / 45)).values),
          values: (u, values) => values.map((value) => value.toFixed(this.digits(values))),
          filter: (u, values) => values,
        },
      ],
      series: [
        {},
        none,
        none,
        line("raw", 1),
        line("train", 2),
        line("held", 1.5, { points: { show: (u) => this.data.held.filter((value) => value !== null).length <= u.bbox.width / devicePixelRatio / 12, size: 7, width: 1.5, stroke: () => color("card"), fill: () => color("held") } }),
      ],
      bands: [{ series: [1, 2], fill: () => color("band") }],
      hooks: {
        setCursor: [(u) => this.follow(u)],
        setSelect: [(u) => this.select(u)],
        draw: [(u) => this.over(u)],
      },
    };
  }

  // As few decimals as tell the labels apart.
  digits(values) {
    const gaps = values.slice(1).map((value, i) => value - values[i]);
    return gaps.length ? Math.max(...[Math.min(...gaps)].map(decimals)) : 2;
  }

  span() {
    const { x } = this.data;
    return [x[0], Math.max(x.at(-1), x[0] + 1)];
  }

  height() {
    const { x, low, high, held } = this.data;
    const [from, to] = this.zoom ? [nearest(x, this.zoom[0]), nearest(x, this.zoom[1])] : [0, Infinity];
    return airy(extent([low, high, held], from, to) ?? extent([low, high, held]) ?? [0, 1], this.isLog);
  }

  across(u, low, high) {
    const wanted = Math.max(2, Math.floor(u.bbox.width / devicePixelRatio / 80));
    this.across.last = this.axis === "time" ? timeTicks(low, high, wanted) : ticks(low, high, wanted, 1);
    return this.across.last;
  }

  labels(u, values) {
    const word = { step: whole, tokens: count, time: (value) => timeLabel(value, this.across.last.step) }[this.axis];
    return values.map(word);
  }

  // Where an incident is on the x axis; null where that is not known or not shown.
  placeOf(incident) {
    const value = this.axis === "time" ? incident.time : this.axis === "step" ? incident.step : this.curve.tokensAt(incident.step);
    const { min, max } = this.plot.scales.x;
    if (!isNumber(value) || value < min - (max - min) / 100 || value > max + (max - min) / 100) return null;
    return this.plot.valToPos(Math.min(max, Math.max(min, value)), "x");
  }

  // Drawn over the curves: evaluated steps, the moment shown with what came later faded, and the incidents below.
  over(u) {
    const { ctx: pen, bbox } = u;
    const ratio = devicePixelRatio;
    pen.save();
    const now = this.at === null ? -1 : this.data.rows.findLastIndex((row) => !(row.time > this.at));
    if (this.at !== null) {
      const x = now < 0 ? bbox.left : u.valToPos(this.axis === "time" ? this.at : this.data.x[now], "x", true);
      const edge = Math.min(bbox.left + bbox.width, Math.max(bbox.left, x));
      pen.fillStyle = color("veil");
      pen.fillRect(edge, bbox.top, bbox.left + bbox.width + 6 * ratio - edge, bbox.height);
      pen.fillStyle = color("ink");
      pen.fillRect(edge - ratio / 2, bbox.top, ratio, bbox.height);
    }
    pen.fillStyle = color("evaluated");
    for (const [i, step] of this.data.steps.entries()) {
      if (!this.evaluated.has(step) || this.data.x[i] < u.scales.x.min || this.data.x[i] > u.scales.x.max) continue;
      pen.globalAlpha = this.at !== null && i > now ? 0.3 : 1;
      const [x, y, r] = [u.valToPos(this.data.x[i], "x", true), bbox.top + bbox.height, 5 * ratio];
      pen.beginPath();
      [[x, y - r], [x + r, y], [x, y + r], [x - r, y]].forEach(([a, b], k) => (k ? pen.lineTo(a, b) : pen.moveTo(a, b)));
      pen.fill();
    }
    pen.restore();
    this.left = bbox.left / ratio;
    $("incidents").style.left = `${this.left}px`;
    $("incidents").style.width = `${bbox.width / ratio}px`;
    this.incidents.draw((incident) => this.placeOf(incident), this.at);
    if (this.cursor >= 0) this.showTip(); // after a resize it must find its place again
  }

  // A line through the plot above an incident; null takes it away.
  hair(x) {
    $("hair").hidden = x === null || !this.plot;
    if (x !== null) $("hair").style.left = `${this.left + x}px`;
  }

  select(u) {
    if (u.select.width < 4) return;
    this.zoomTo([u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")]);
    u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
  }

  zoomTo(range) {
    this.zoom = range;
    $("whole-run").hidden = !range;
    this.refresh();
  }

  touch(event) {
    const { left } = this.plot.over.getBoundingClientRect();
    this.plot.setCursor({ left: event.clientX - left, top: 10 });
  }

  follow(u) {
    if (this.isMoving) return;
    this.cursor = u.cursor.left < 0 || !isNumber(u.cursor.idx) ? -1 : u.cursor.idx;
    this.showTip();
  }

  move(cursor) {
    this.cursor = cursor;
    this.isMoving = true;
    this.plot?.setCursor({ left: cursor < 0 ? -10 : this.plot.valToPos(this.data.x[cursor], "x"), top: cursor < 0 ? -10 : 10 });
    this.isMoving = false;
    this.showTip();
  }

  key(event) {
    const last = this.data.x.length - 1;
    const at = this.cursor < 0 ? last : this.cursor;
    const stride = event.shiftKey ? Math.max(1, Math.round(last / 20)) : 1;
    if (event.key === "Enter" && this.cursor >= 0) return this.go(this.data.rows[this.cursor].time);
    if (event.key === "Escape" && this.cursor < 0 && this.zoom) return this.zoomTo(null);
    const target = { ArrowLeft: at - stride, ArrowRight: at + stride, Home: 0, End: last, Escape: -1 }[event.key];
    if (target === undefined || last < 0) return undefined;
    event.preventDefault();
    this.move(event.key === "Escape" ? -1 : Math.min(last, Math.max(0, target)));
    const now = this.reading();
    if (now) text($("chart-live"), `Step ${now.point.step}: training ${loss(now.raw)}, held-out ${loss(this.data.held[now.seen])}`);
    return undefined;
  }

  // What is known at the cursor: the training loss there, and the last held-out loss up to there.
  reading() {
    const point = this.data.rows[this.cursor];
    if (!point) return null;
    const seen = this.data.held.slice(0, this.cursor + 1).findLastIndex((value) => value !== null);
    return { point, soft: this.data.soft[this.cursor], raw: this.data.raw[this.cursor], seen };
  }

  showTip() {
    const now = this.plot ? this.reading() : null;
    this.tip.hidden = !now;
    for (const name of ["raw", "train", "held"]) $(`dot-${name}`).hidden = true;
    if (!now) return;
    const { point, soft, raw, seen } = now;
    const row = (key, label, value) => el("p", "", el("i", key ? `key ${key}` : "key"), el("span", "", label), el("b", "", value));
    const { steps, held, x: xs } = this.data;
    const label = seen >= 0 && seen !== this.cursor ? `held-out, step ${whole(steps[seen])}` : "held-out";
    const rows = [el("p", "when", `Step ${whole(point.step)}, ${clock(point.time)}`)];
    if (raw !== null) rows.push(row("raw", "training", loss(raw)), row("train", "smoothed", loss(soft)));
    if (isNumber(point.low) && point.low < point.high) rows.push(row("", "lowest to highest", `${loss(point.low)} – ${loss(point.high)}`));
    if (seen >= 0) rows.push(row("held", label, loss(held[seen])));
    if (this.evaluated.has(point.step)) rows.push(row("evaluated", "evaluated", "see below"));
    if (isNumber(point.tokens)) rows.push(row("", "tokens", count(point.tokens)));
    this.tip.replaceChildren(...rows);
    this.dot("raw", this.cursor, raw);
    this.dot("train", this.cursor, soft);
    if (seen >= 0) this.dot("held", seen, held[seen]);
    const x = this.left + this.plot.valToPos(xs[this.cursor], "x");
    const { offsetWidth: wide } = this.tip;
    const beside = x > this.plot.width / 2 ? x - 14 - wide : x + 14;
    this.tip.style.left = `${Math.max(0, Math.min(beside, this.plot.width - wide))}px`;
  }

  dot(name, at, value) {
    const [x, y] = [this.plot.valToPos(this.data.x[at], "x"), this.plot.valToPos(value ?? 0, "y")];
    const { min, max } = this.plot.scales.x;
    const node = $(`dot-${name}`);
    node.hidden = !isNumber(value) || this.data.x[at] < min || this.data.x[at] > max;
    node.style.transform = `translate(${this.left + x}px, ${this.plot.bbox.top / devicePixelRatio + y}px)`;
  }

  describe() {
    const { steps, held } = this.data;
    const seen = held.findLast((value) => value !== null) ?? null;
    const range = `steps ${whole(Math.min(steps[0], steps.at(-1)))} to ${whole(Math.max(steps[0], steps.at(-1)))}`;
    const smoothed = this.data.soft.findLast((value) => value !== null);
    const label = `Loss by ${this.axis}, ${range}: training ${loss(smoothed)}, held-out ${loss(seen)}. Arrow keys read points, Enter shows that moment.`;
    attribute(this.root, "aria-label", label);
  }
}
