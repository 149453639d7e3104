// Small charts over time, as SVG: lines, or bars that are stacked, with one reading line for mouse and arrow keys.

import { attribute, el, text } from "./dom.js";
import { isNumber } from "./format.js";
import { fit, stamp, svg } from "./detail.js";

const [TOP, BOTTOM, RIGHT] = [18, 18, 2];
const clockOf = (time, isLong) =>
  new Date(time * 1000).toLocaleString("en-GB", isLong ? { day: "numeric", month: "short" } : { hour: "2-digit", minute: "2-digit" });

// `points`: rising times, one value per series, null where nobody knows: [{time, seconds?, values}]. `series`: [{name,
// className}]. Bars end at their time, are `seconds` wide and stacked. `format` writes a value.
export function spark({ title, series, format, kind = "line", height = 104 }) {
  const reading = el("p", "muted reading");
  const keys = el("ul", "legend", ...(series.length > 1 ? series.map((one) => el("li", "", el("i", `key ${one.className}`), one.name)) : []));
  const heading = el("div", "spark-title", el("b", "", title), keys);
  const frame = el("div", "spark-frame");
  frame.tabIndex = 0;
  frame.setAttribute("role", "img");
  const node = el("figure", "spark", heading, reading, frame);
  let [points, cursor, scale] = [[], -1, null];

  const total = (point) => point.values.reduce((sum, value) => sum + (value ?? 0), 0);
  const topOf = (point) => (kind === "bars" ? total(point) : Math.max(...point.values.map((value) => value ?? 0)));
  const say = (point) => {
    const said = series.map((one, i) => `${series.length > 1 ? `${one.name} ` : ""}${format(point.values[i])}`);
    return `${stamp(point.time)}: ${said.join(", ")}`;
  };

  const again = fit(frame, (width) => {
    if (!points.length) return frame.replaceChildren();
    const [first, last] = [points[0].time - (points[0].seconds ?? 0), points.at(-1).time];
    const high = Math.max(...points.map(topOf)) || 1;
    const x = (time) => ((time - first) / (last - first || 1)) * (width - RIGHT - 1) + 0.5;
    const y = (value) => height - BOTTOM - (value / high) * (height - TOP - BOTTOM);
    scale = { x, width };
    const drawing = svg("svg", { width, height, "aria-hidden": "true" });
    drawing.append(svg("line", { class: "spark-axis", x1: 0, x2: width, y1: y(0), y2: y(0) }));
    drawing.append(svg("line", { class: "spark-grid", x1: 0, x2: width, y1: y(high), y2: y(high) }));
    if (kind === "bars") bars(drawing, x, y);
    else series.forEach((one, i) => line(drawing, one, i, x, y));
    const isLong = last - first > 2 * 86400;
    const label = (at, anchor, words) => drawing.append(svg("text", { x: at, y: height - 4, "text-anchor": anchor }, words));
    label(0, "start", clockOf(first, isLong));
    if (last > first) label(width, "end", clockOf(last, isLong));
    drawing.append(svg("text", { class: "spark-high", x: 0, y: TOP - 5 }, format(high)));
    drawing.append(svg("line", { class: "spark-cursor", y1: TOP, y2: y(0) }));
    frame.replaceChildren(drawing);
    point(cursor);
  });

  function bars(drawing, x, y) {
    for (const one of points) {
      const left = x(one.time - (one.seconds ?? 1));
      const width = Math.max(1, x(one.time) - left - 1);
      let base = 0;
      one.values.forEach((value, i) => {
        if (!(value > 0)) return;
        const top = y(base + value);
        drawing.append(svg("rect", { class: `fill ${series[i].className}`, x: left.toFixed(1), width: width.toFixed(1), y: top.toFixed(1), height: Math.max(0.5, y(base) - top).toFixed(1) }));
        base += value;
      });
    }
  }

  function line(drawing, one, i, x, y) {
    let [path, isOpen, lone] = ["", false, []];
    points.forEach((point, at) => {
      const value = point.values[i];
      if (!isNumber(value)) return (isOpen = false);
      const here = `${x(point.time).toFixed(1)} ${y(value).toFixed(1)}`;
      path += `${isOpen ? "L" : "M"}${here}`;
      if (!isOpen && !isNumber(points[at + 1]?.values[i])) lone.push([x(point.time), y(value)]);
      isOpen = true;
    });
    drawing.append(svg("path", { class: `stroke ${one.className}`, d: path || "M0 0" }));
    for (const [cx, cy] of lone) drawing.append(svg("circle", { class: `fill ${one.className}`, cx, cy, r: 2 }));
  }

  function point(at) {
    cursor = points.length ? Math.min(at, points.length - 1) : -1;
    const mark = frame.querySelector(".spark-cursor");
    const one = points[cursor] ?? points.at(-1);
    text(reading, one ? say(one) : "");
    if (!mark || !scale) return;
    mark.classList.toggle("on", cursor >= 0);
    if (cursor >= 0) for (const name of ["x1", "x2"]) attribute(mark, name, scale.x(one.time - (one.seconds ?? 0) / 2).toFixed(1));
  }

  frame.addEventListener("pointermove", (event) => {
    if (!scale) return;
    const at = event.clientX - frame.getBoundingClientRect().left;
    let best = -1;
    points.forEach((one, i) => {
      const away = (index) => Math.abs(scale.x(points[index].time - (points[index].seconds ?? 0) / 2) - at);
      if (best < 0 || away(i) < away(best)) best = i;
    });
    point(best);
  });
  for (const name of ["pointerleave", "blur"]) frame.addEventListener(name, () => point(-1));
  frame.addEventListener("keydown", (event) => {
    const last = points.length - 1;
    const from = cursor < 0 ? points.length : cursor;
    const next = { ArrowLeft: Math.max(0, from - 1), ArrowRight: Math.min(last, from + 1), Home: 0, End: last }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    point(next);
    attribute(frame, "aria-label", `${title}. ${points[cursor] ? say(points[cursor]) : ""}`);
  });

  return {
    node,
    show(all) {
      points = all;
      const high = points.length ? Math.max(...points.map(topOf)) : null;
      const about = points.length ? `${points.length} points, highest ${format(high)}, last ${say(points.at(-1))}. Arrow keys read them.` : "nothing yet";
      attribute(frame, "aria-label", `${title}: ${about}`);
      again();
      point(cursor);
    },
  };
}
