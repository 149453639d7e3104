// The history of one link, there and back: its rate and its round trip over time.

import { el, text } from "./dom.js";
import { plural } from "./format.js";
import { asking, card, downloads, ms, peerLink, place, rate } from "./detail.js";
import { spark } from "./spark.js";

// `ways`: [{from, to, isKnown}], one or both directions.
export function history(page, ways, names, close) {
  const [{ from, to }] = ways;
  const box = card(`${names(from)} and ${names(to)}`);
  const address = el("a", "", "link to this");
  address.href = place(page, `links/${encodeURIComponent(from)}/${encodeURIComponent(to)}`);
  const shut = el("button", "more", "close");
  shut.type = "button";
  shut.addEventListener("click", close);
  box.node.addEventListener("keydown", (event) => event.key === "Escape" && close());
  box.note.replaceWith(el("div", "side", address, shut));
  const halves = ways.map((one) => way(page, one, names));
  box.node.append(el("div", "two", ...halves.map((one) => one.node)));
  box.node.tabIndex = -1;
  return {
    node: box.node,
    focus: () => box.node.focus(),
    unmount: () => halves.forEach((one) => one.unmount()),
  };
}

function way(page, { from, to, isKnown }, names) {
  const path = `${encodeURIComponent(from)}/${encodeURIComponent(to)}`;
  const title = el("h4", "", peerLink(page, from, names(from)), " → ", peerLink(page, to, names(to)), " ", downloads(page, `api/links/${path}.csv`));
  const speed = spark({ title: "Mbit/s", series: [{ name: "rate", className: "compute" }], format: rate });
  const trip = spark({ title: "There and back", series: [{ name: "round trip", className: "wait" }], format: ms });
  const [empty, trouble] = [el("p", "muted"), el("div")];
  const charts = el("div", "", speed.node, trip.node);
  charts.hidden = true;
  const draw = (all) => {
    const points = page.at === null ? all : all.filter((point) => point.time <= page.at);
    charts.hidden = !points.length;
    text(empty, points.length ? plural(points.length, "measurement") : "Nothing measured in this direction.");
    if (!points.length) return;
    speed.show(points.map((point) => ({ time: point.time, values: [point.bytes_per_second] })));
    trip.show(points.map((point) => ({ time: point.time, values: [point.rtt_seconds] })));
  };
  const load = async () => (isKnown ? page.source.get(`api/links/${path}`) : []);
  const asked = asking(page, load, draw, trouble);
  return { node: el("div", "way", title, empty, trouble, charts), unmount: asked.unmount };
}
