// One peer: what it is, what it may use, what it holds, its links, its time, its history and its place among the others.

import { attribute, el, list, text } from "./dom.js";
import { bytes, count, elapsed, isNumber, NONE, percent, plural, whole, words } from "./format.js";
import { asking, brief, card, facts, linkCell, mbit, moment, ms, namesOf, place, shortId, stamp, table, viewHead } from "./detail.js";
import { fillTimeBar, lasts, stateClass, timeLegend } from "./lanes.js";
import { GLYPHS } from "./matrix.js";
import { spark } from "./spark.js";

const LIMITS = [["memory_gb", "GPU memory", "GB"], ["threads", "Threads", ""], ["upload_mbps", "Upload", "Mbit/s"], ["state_mbps", "Passing on state", "Mbit/s"]];

export function mount(root, params, page) {
  const [id] = params;
  const head = viewHead(shortId(id));
  root.append(head.node);
  const parts = { head, body: null };
  return asking(
    page,
    () => page.source.get(moment(page, `api/peers/${encodeURIComponent(id)}`)),
    (answer) => {
      parts.body ??= layOut(root, page);
      draw(answer, parts, page);
    },
    head.trouble,
  );
}

function layOut(root, page) {
  const [about, caps, now] = [card("Machine"), card("What its owner allows"), card("Where a step goes")];
  const [links, past, events] = [card("Links"), card("History"), card("What happened")];
  const body = { page, about: el("dl", "facts"), caps: el("dl", "facts"), now, links, past, events };
  about.node.append(body.about);
  caps.node.append(body.caps);
  body.bar = el("div", "time-bar tall");
  body.words = el("p", "muted");
  now.node.append(body.bar, timeLegend(), body.words);
  body.table = linkTable(page);
  body.noLink = el("p", "empty", "No link of it has been measured yet.");
  links.node.append(body.noLink, body.table.node);
  body.work = spark({ title: "Samples", series: [{ name: "samples", className: "compute" }], format: (value) => `${count(value)} a minute`, kind: "bars" });
  body.time = spark({ title: "Time", series: [{ name: "compute", className: "compute" }, { name: "waiting", className: "wait" }], format: percent, kind: "bars" });
  body.bytes = spark({ title: "Bytes", series: [{ name: "sent", className: "update" }, { name: "received", className: "wire" }], format: (value) => `${bytes(value)}/s` });
  body.charts = el("div", "sparks", body.work.node, body.time.node, body.bytes.node);
  body.noPast = el("p", "empty", "Nothing done yet.");
  past.node.append(body.noPast, body.charts);
  body.list = el("ol", "events");
  body.noEvent = el("p", "empty", "Nothing is on record about it.");
  const scroll = el("div", "scroll", body.list);
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", "Events of this peer, newest first");
  events.node.append(body.noEvent, scroll);
  body.scroll = scroll;
  root.append(el("div", "pair even", about.node, el("div", "column", now.node, caps.node)), past.node, el("div", "pair even", links.node, events.node));
  return body;
}

function draw(answer, { head, body }, page) {
  const { row, caps } = answer;
  const state = page.state?.();
  const known = namesOf(state);
  const nameOf = (id) => (id === row.id ? row.name || shortId(id) : known(id));
  text(head.heading, words(row.name || shortId(row.id)));
  head.sub.replaceChildren(el("span", `state ${stateClass(row.state)}`, words(row.state)), ` · ${holds(answer)} · `, el("code", "", row.id));
  facts(body.about, [
    ["Device", words(row.device)],
    ["Region, as it says", row.region ? String(row.region) : null],
    ["Here since", stamp(answer.first_seen)],
    ["Last seen", isNumber(state?.now) && page.at === null ? `${elapsed(state.now - row.last_seen)} ago` : stamp(row.last_seen)],
    ["One step", brief(lasts(row.time) || row.seconds_per_step)],
    ["Samples", whole(row.samples)],
    ["Credit", `${count(row.work)} whole samples`],
    ["Rank", rankOf(answer, page, body)],
    ["Rounds", whole(answer.rounds)],
    ["Sent", bytes(row.sent)],
    ["Received", bytes(row.received)],
  ]);
  facts(body.caps, LIMITS.map(([key, name, unit]) => [name, isNumber(caps[key]) ? `${count(caps[key])} ${unit}`.trim() : "no limit"]));
  const all = lasts(row.time);
  fillTimeBar(body.bar, row.time, all || 1, nameOf);
  body.bar.hidden = body.bar.nextElementSibling.hidden = !all;
  text(body.words, all ? `One step takes ${brief(all)}. ${waits(row.time, all, nameOf)}` : "No step of it has been timed yet.");
  drawLinks(body, row, state, nameOf);
  const { history } = answer;
  body.noPast.hidden = history.length > 0;
  body.charts.hidden = !history.length;
  // Pieces are not equally long, so what is shown is how fast it went in each.
  const show = (chart, values) => chart.show(history.map((point) => ({ time: point.time, seconds: point.seconds, values: values(point).map((value) => value / Math.max(1, point.seconds)) })));
  show(body.work, (point) => [60 * point.samples]);
  show(body.time, (point) => [point.compute_seconds, point.wait_seconds]);
  show(body.bytes, (point) => [point.sent, point.received]);
  const events = [...answer.events].sort((a, b) => b.id - a.id);
  body.noEvent.hidden = events.length > 0;
  body.scroll.hidden = !events.length;
  list(body.list, events, (event) => event.id, () => el("li", "", el("time"), el("span", "peer-text")), (node, event) => {
    text(node.firstChild, stamp(event.time));
    text(node.lastChild, words(event.text));
    attribute(node, "title", words(event.kind));
  });
}

function waits(time, all, nameOf) {
  const each = [...(time.waits ?? [])].sort((a, b) => b.seconds - a.seconds);
  if (!each.length) return "It waits for nobody.";
  const sum = each.reduce((so, wait) => so + wait.seconds, 0);
  return `${percent(sum / all)} of it is waiting: ${each.map((wait) => `${brief(wait.seconds)} for ${nameOf(wait.peer)}`).join(", ")}.`;
}

function holds({ row, layers }) {
  if (!isNumber(row.stage)) return "holds no stage";
  if (!layers) return `stage ${row.stage}`;
  const [first, end] = layers;
  return `stage ${row.stage}, ${end - first === 1 ? `layer ${first}` : `layers ${first}–${end - 1}`}`;
}

function rankOf(answer, page, body) {
  if (!isNumber(answer.rank)) return NONE;
  body.rank ??= el("a");
  attribute(body.rank, "href", place(page, "leaderboard"));
  text(body.rank, `no. ${answer.rank}`);
  return body.rank;
}

// Its own links, and those of others to it.
function drawLinks(body, row, state, nameOf) {
  const others = (state?.peers ?? []).filter((peer) => peer.id !== row.id).flatMap((peer) => peer.links ?? []);
  const rows = [...(row.links ?? []), ...others.filter((link) => link.receiver === row.id)];
  body.noLink.hidden = rows.length > 0;
  body.table.node.hidden = !rows.length;
  const isOut = (link) => link.sender === row.id;
  body.table.show(rows.map((link) => ({ ...link, isOut: isOut(link), name: nameOf(isOut(link) ? link.receiver : link.sender), other: isOut(link) ? link.receiver : link.sender })));
}

function linkTable(page) {
  const columns = [
    { title: "Peer", value: (link) => link.name, fill: (cell, link) => linkCell(cell, place(page, `peer/${encodeURIComponent(link.other)}`), link.name) },
    { title: "Way", value: (link) => (link.isOut ? "to it" : "from it") },
    { title: "Path", value: (link) => link.path ?? "", text: (link) => (link.path ? `${GLYPHS[link.path]} ${link.path}` : NONE) },
    { title: "Mbit/s", n: true, value: (link) => link.bytes_per_second, text: (link) => mbit(link.bytes_per_second) },
    { title: "Round trip", n: true, value: (link) => link.rtt_seconds, text: (link) => ms(link.rtt_seconds) },
    { title: "Share of cap", n: true, value: (link) => link.share, text: (link) => percent(link.share) },
  ];
  return table("Links of this peer", columns, { key: (link) => `${link.sender} ${link.receiver}` });
}
