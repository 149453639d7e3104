// Who reaches whom how well: a heat map of the links between peers, or the same as a table; a link opens its history.

import { attribute, el, text } from "./dom.js";
import { isNumber, NONE, percent, plural, words } from "./format.js";
import { asking, card, choice, downloads, linkCell, mbit, moment, ms, namesOf, place, rate, stamp, table, viewHead } from "./detail.js";
import { Heat } from "./heat.js";
import { history } from "./linkhistory.js";

const MOST = 60; // peers in one picture; more are grouped by stage
const METRICS = {
  rate: { label: "Mbit/s", value: (link) => link.bytes_per_second, short: mbit, isGood: true, isLog: true, says: rate },
  rtt: { label: "ms", value: (link) => link.rtt_seconds, short: (value) => (isNumber(value) ? ms(value).replace(" ms", "") : NONE), isLog: true, says: ms },
  share: { label: "share of cap", value: (link) => link.share, short: (value) => percent(value).replace(" %", ""), isLog: false, says: percent },
};
export const GLYPHS = { direct: "●", punched: "○", relayed: "▲" };

export function mount(root, params, page) {
  const view = { metric: "rate", form: "matrix", group: null, links: [], open: null };
  const head = viewHead("Links", "What each peer last measured on its way to another: row sends, column receives.");
  const metric = choice("Shown", Object.entries(METRICS).map(([name, { label }]) => [name, label]), view.metric, (name) => ((view.metric = name), draw()));
  const form = choice("As", [["matrix", "Matrix"], ["table", "Table"]], view.form, (name) => ((view.form = name), draw()));
  head.side.append(metric.node, form.node, downloads(page, moment(page, "api/links.csv")));
  const body = card("");
  const back = el("button", "more", "← all stages");
  back.type = "button";
  back.addEventListener("click", () => ((view.group = null), draw(), heat.focus()));
  const empty = el("p", "empty");
  const heat = new Heat({ describe: (a, b) => describe(a, b), open: (a, b) => open(a, b) });
  const rows = linkTable(page, () => names, (link) => open(link.sender, link.receiver));
  body.node.append(empty, back, heat.node, rows.node);
  const past = el("div", "past");
  root.append(head.node, body.node, past);
  let names = namesOf(page.state?.());

  function draw() {
    names = namesOf(page.state?.());
    const { links } = view;
    const isTable = view.form === "table";
    empty.hidden = links.length > 0;
    text(empty, page.at === null ? "No link has been measured yet. A peer measures the lines that it uses." : "No link had been measured by then.");
    heat.node.hidden = isTable || !links.length;
    rows.node.hidden = !isTable || !links.length;
    back.hidden = isTable || !view.group;
    metric.node.hidden = isTable;
    if (isTable) {
      text(body.heading, plural(links.length, "link"));
      text(body.note, "");
      rows.show(links);
      return;
    }
    if (links.length) drawHeat();
  }

  function drawHeat() {
    const peers = among(page.state?.()?.peers ?? [], view.links, names);
    const grouped = peers.length > MOST;
    const by = METRICS[view.metric];
    if (!grouped) view.group = null;
    text(body.heading, view.group ? `${groupName(view.group[0])} to ${groupName(view.group[1])}` : grouped ? "Between stages, the median of their links" : "Between peers");
    text(body.note, `${plural(peers.length, "peer")}, ${plural(view.links.length, "link")}`);
    if (grouped && !view.group) heat.show({ ...stageGrid(peers, view.links), by });
    else {
      const inside = (group) => (view.group ? peers.filter((peer) => peer.group === group) : peers);
      const cells = new Map(view.links.map((link) => [`${link.sender} ${link.receiver}`, link]));
      heat.show({ rows: inside(view.group?.[0]), columns: inside(view.group?.[1]), at: (a, b) => cells.get(`${a} ${b}`), by });
    }
  }

  function describe(a, b) {
    return [[a, b], [b, a]].map(([from, to]) => {
      const link = heat.at(from.id, to.id);
      const title = `${from.name} → ${to.name}`;
      if (!link) return [title, from.id === to.id ? "the same peer" : "not measured"];
      return [title, sayLink(link)];
    }).slice(0, a.id === b.id ? 1 : 2);
  }

  function open(a, b) {
    if (heat.isGrouped && a.startsWith("stage ") && view.form === "matrix") {
      view.group = [groupOf(a), groupOf(b)];
      draw();
      heat.focus();
      return;
    }
    view.open?.unmount();
    view.open = history(page, waysOf(a, b), names, () => (view.open.unmount(), (view.open = null), past.replaceChildren(), heat.focus()));
    past.replaceChildren(view.open.node);
    view.open.focus();
  }

  const waysOf = (a, b) => (a === b ? [[a, b]] : [[a, b], [b, a]]).map(([from, to]) => ({ from, to, isKnown: view.links.some((link) => link.sender === from && link.receiver === to) }));
  let isFirst = true;
  const receive = (links) => {
    view.links = links;
    // A line's rate is known once something large has gone over it; until then, how far away everybody is says more.
    if (isFirst && !links.some((link) => isNumber(link.bytes_per_second)) && links.some((link) => isNumber(link.rtt_seconds))) metric.mark((view.metric = "rtt"));
    draw();
    // "#/links/a/b" is the address of a history.
    if (isFirst && params.length === 2) open(...params);
    isFirst = false;
  };
  const asked = asking(page, () => page.source.get(moment(page, "api/links")), receive, head.trouble);
  return {
    show: (state) => asked.show(state),
    unmount() {
      asked.unmount();
      view.open?.unmount();
    },
  };
}

function sayLink(link) {
  if (link.links) return `${plural(link.links, "link")}, median ${rate(link.bytes_per_second)} and ${ms(link.rtt_seconds)}; the slowest ${rate(link.slowest)}`;
  const cap = isNumber(link.cap) ? `${percent(link.share)} of the ${rate(link.cap)} allowed` : isNumber(link.share) ? `${percent(link.share)} of the most seen` : "";
  const [speed, trip] = [isNumber(link.bytes_per_second) ? rate(link.bytes_per_second) : "", isNumber(link.rtt_seconds) ? ms(link.rtt_seconds) : ""];
  return [speed, trip, link.path ?? "path unknown", cap].filter(Boolean).join(", ");
}

const groupOf = (id) => id.replace("stage ", "");
const groupName = (group) => (group === "none" ? "No stage" : `Stage ${group}`);

// Peers in the order of the pipeline, those that only a link names last.
function among(peers, links, names) {
  const known = new Map(peers.map((peer) => [peer.id, peer]));
  const ids = new Set(links.flatMap((link) => [link.sender, link.receiver]));
  for (const peer of peers) if (isNumber(peer.stage)) ids.add(peer.id);
  const found = [...ids].map((id) => ({ id, name: names(id), stage: known.get(id)?.stage ?? null }));
  found.sort((a, b) => (a.stage ?? Infinity) - (b.stage ?? Infinity) || a.name.localeCompare(b.name));
  return found.map(({ id, name, stage }) => ({ id, name, group: isNumber(stage) ? String(stage) : "none" }));
}

function stageGrid(peers, links) {
  const group = new Map(peers.map((peer) => [peer.id, peer.group]));
  const cells = new Map();
  for (const link of links) {
    const key = `stage ${group.get(link.sender)} stage ${group.get(link.receiver)}`;
    cells.set(key, [...(cells.get(key) ?? []), link]);
  }
  const middle = (values) => values.filter(isNumber).sort((a, b) => a - b)[Math.floor(values.filter(isNumber).length / 2)] ?? null;
  for (const [key, all] of cells) {
    const of = (name) => all.map((link) => link[name]);
    const paths = new Set(of("path"));
    const rates = of("bytes_per_second").filter(isNumber);
    const slowest = rates.length ? rates.reduce((a, b) => Math.min(a, b)) : null;
    cells.set(key, { links: all.length, path: paths.size === 1 ? [...paths][0] : null, slowest, bytes_per_second: middle(of("bytes_per_second")), rtt_seconds: middle(of("rtt_seconds")), share: middle(of("share")) });
  }
  const nodes = [...new Set(peers.map((peer) => peer.group))].map((name) => ({ id: `stage ${name}`, name: groupName(name), group: name }));
  return { rows: nodes, columns: nodes, at: (a, b) => cells.get(`${a} ${b}`), isGrouped: true };
}

function linkTable(page, names, open) {
  const peer = (title, which) => ({ title, value: (link) => names()(link[which]), fill: (cell, link) => linkCell(cell, place(page, `peer/${encodeURIComponent(link[which])}`), names()(link[which])) });
  const number = (title, value, says) => ({ title, n: true, value, text: (link) => says(value(link)) });
  const columns = [
    peer("From", "sender"),
    peer("To", "receiver"),
    { title: "Path", value: (link) => link.path ?? "", text: (link) => (link.path ? `${GLYPHS[link.path]} ${link.path}` : words(null)) },
    number("Mbit/s", METRICS.rate.value, mbit),
    number("ms", METRICS.rtt.value, METRICS.rtt.short),
    number("Share of cap", METRICS.share.value, percent),
    number("Cap, Mbit/s", (link) => link.cap, mbit),
    { title: "Measured", n: true, value: (link) => link.time, text: (link) => stamp(link.time) },
    {
      title: "History",
      fill(cell, link) {
        const button = cell.firstElementChild ?? cell.appendChild(el("button", "more", "open"));
        button.type = "button";
        button.onclick = () => open(link);
        attribute(button, "aria-label", `open the history of ${names()(link.sender)} to ${names()(link.receiver)}`);
      },
    },
  ];
  return table("Links", columns, { key: (link) => `${link.sender} ${link.receiver}`, sort: 3 });
}
