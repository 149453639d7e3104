// What the run sends: bytes per token by purpose beside what they would be uncompressed, and both summed over tokens.

import { $, attribute, el, emptyOr, list, text } from "./dom.js";
import { bytes, count, isNumber, times, words } from "./format.js";
import { AXIS, color, plot, SIDE } from "./plot.js";
import { logTicks, nearest, ticks } from "./series.js";

const MOST = 400;
const positive = (value) => isNumber(value) && value > 0;
const sum = (rows, field) => rows.reduce((all, row) => all + (positive(row[field]) ? row[field] : 0), 0);
// What has no uncompressed counterpart would have been sent as it is.
const dense = (rows) => rows.reduce((all, row) => all + Math.max(positive(row.dense_nbytes) ? row.dense_nbytes : 0, positive(row.nbytes) ? row.nbytes : 0), 0);

// Sent and uncompressed bytes per token on one logarithmic line per purpose.
export function showTraffic(state) {
  const rows = (state.traffic ?? []).filter((row) => positive(row.nbytes) || positive(row.dense_nbytes));
  const perToken = positive(state.tokens) ? state.tokens : null;
  emptyOr("traffic", !rows.length || !perToken, ["traffic", "traffic-axis"]);
  if (!perToken || !rows.length) return;
  const sizes = rows.flatMap((row) => [row.nbytes, row.dense_nbytes]).filter(positive).map((nbytes) => Math.log10(nbytes / perToken));
  const low = Math.floor(Math.min(...sizes, 0));
  const high = Math.max(Math.ceil(Math.max(...sizes)), low + 1);
  const place = (nbytes) => ((Math.log10(nbytes / perToken) - low) / (high - low)) * 100;
  list($("traffic"), rows, (row) => row.purpose, makeTraffic, (node, row) => fillTraffic(node, row, perToken, place));
  const every = high - low > 5 ? 2 : 1;
  const decades = Array.from({ length: Math.floor((high - low) / every) + 1 }, (_, i) => low + i * every);
  list($("traffic-axis"), decades, (power) => power, () => el("span"), (node, power) => {
    node.style.left = `${((power - low) / (high - low)) * 100}%`;
    text(node, power < 0 ? `${(10 ** power).toFixed(-power)} B` : bytes(10 ** power).replace(/\.0+/, ""));
  });
}

function makeTraffic() {
  const track = el("div", "track", el("i", "span"), el("i", "dot dense"), el("i", "dot sent"));
  const node = el("div", "purpose", el("b"), el("span", "figures"), track);
  node.setAttribute("role", "listitem");
  return node;
}

function fillTraffic(node, row, tokens, place) {
  const [name, figures, track] = node.children;
  const [span, without, sent] = track.children;
  const isCompared = positive(row.dense_nbytes) && positive(row.nbytes) && row.dense_nbytes > row.nbytes;
  text(name, words(row.purpose));
  const gain = isCompared ? ` of ${bytes(row.dense_nbytes / tokens)}, ${times(row.dense_nbytes / row.nbytes)} fewer` : "";
  text(figures, `${bytes(row.nbytes / tokens)}${gain}`);
  const [from, to] = [positive(row.nbytes) ? place(row.nbytes) : 0, isCompared ? place(row.dense_nbytes) : null];
  sent.hidden = !positive(row.nbytes);
  sent.style.left = `${from}%`;
  span.hidden = without.hidden = to === null;
  span.style.left = `${from}%`;
  span.style.width = `${(to ?? from) - from}%`;
  without.style.left = `${to ?? 0}%`;
}

// Cumulative bytes over tokens on a logarithmic axis: the area between is what compression saved.
export class BytesChart {
  constructor(source) {
    this.source = source;
    this.points = [];
    this.root = $("bytes-plot");
    this.at = this.timer = null;
  }

  clear() {
    this.points = [];
    this.data = null;
  }

  async load() {
    try {
      this.points = await this.source.get(`api/traffic?most=${MOST}`);
    } catch {
      // Then the graph begins where the page does; the panel beside it needs no past.
    }
    this.draw();
  }

  // The state carries the totals, so the live end costs no question.
  add(state) {
    const last = this.points.at(-1);
    if (!positive(state.tokens) || !state.traffic?.length || state.tokens <= (last?.tokens ?? 0)) return;
    this.points.push({ time: state.now, step: state.step, tokens: state.tokens, traffic: state.traffic });
    if (this.points.length > 2 * MOST) this.points = this.points.filter((_, i) => i % 2 || i === this.points.length - 1);
    this.timer ??= setTimeout(() => this.draw(), 1000);
  }

  show(at) {
    if (at === this.at) return;
    this.at = at;
    this.tell();
    this.plot?.redraw(false);
  }

  draw() {
    clearTimeout(this.timer);
    this.timer = null;
    const rows = this.points.filter((point) => positive(point.tokens) && sum(point.traffic, "nbytes") > 0).sort((a, b) => a.tokens - b.tokens);
    this.rows = rows;
    emptyOr("bytes", rows.length < 2, ["bytes-plot", "bytes-total"]);
    if (rows.length < 2) return;
    this.data = [rows.map((row) => row.tokens), rows.map((row) => dense(row.traffic)), rows.map((row) => sum(row.traffic, "nbytes"))];
    if (this.plot) this.plot.setData(this.data);
    else this.plot = plot(this.root, this.options(), this.data);
    this.tell();
  }

  tell() {
    if (!this.data) return;
    const place = this.hover ?? (this.at === null ? this.rows.length - 1 : Math.max(0, this.rows.findLastIndex((row) => row.time <= this.at)));
    const [tokens, without, sent] = this.data.map((column) => column[place]);
    text($("bytes-sent"), bytes(sent));
    text($("bytes-dense"), bytes(without));
    text($("bytes-gain"), `${times(without / sent)} fewer, at ${count(tokens)} tokens`);
    attribute(this.root, "aria-label", `All bytes sent by tokens: ${bytes(sent)} instead of ${bytes(without)} uncompressed after ${count(tokens)} tokens`);
  }

  options() {
    const line = (name, width, dash) => ({ stroke: () => color(name), width, dash, points: { show: false } });
    return {
      padding: [8, 26, 0, 4],
      cursor: { y: false, points: { show: false }, drag: { x: false, y: false } },
      scales: {
        x: { time: false, range: (u, low, high) => [low, Math.max(high, low + 1)] },
        y: { distr: 3, range: (u, low, high) => [low / 1.3, high * 1.5] },
      },
      axes: [
        { ...AXIS, size: 32, splits: (u, _, low, high) => ticks(low, high, Math.max(2, Math.floor(u.width / 90)), 1).values, values: (u, values) => values.map(count) },
        { ...SIDE, size: 58, splits: (u, _, low, high) => logTicks(low, high, Math.floor(u.height / 34)), values: (u, values) => values.map((value) => bytes(value).replace(/\.0+(?= )/, "")), filter: (u, values) => values },
      ],
      series: [{}, line("dense", 1.5, [5, 4]), line("train", 2)],
      bands: [{ series: [1, 2], fill: () => color("saved") }],
      hooks: {
        setCursor: [(u) => this.follow(u)],
        draw: [(u) => this.over(u)],
      },
    };
  }

  follow(u) {
    const at = u.cursor.left < 0 ? null : nearest(this.data[0], u.posToVal(u.cursor.left, "x"));
    if (at === (this.hover ?? null)) return;
    this.hover = at ?? undefined;
    this.tell();
  }

  over(u) {
    if (this.at === null) return;
    const now = this.rows.findLastIndex((row) => row.time <= this.at);
    const { ctx: pen, bbox } = u;
    const x = now < 0 ? bbox.left : u.valToPos(this.rows[now].tokens, "x", true);
    pen.save();
    pen.fillStyle = color("veil");
    pen.fillRect(x, bbox.top, bbox.left + bbox.width - x, bbox.height);
    pen.fillStyle = color("ink");
    pen.fillRect(x - devicePixelRatio / 2, bbox.top, devicePixelRatio, bbox.height);
    pen.restore();
  }
}
