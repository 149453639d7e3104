// The panels below the tiles: traffic, pipeline, peers, rounds, events.

import { $, attribute, el, emptyOr, list, text } from "./dom.js";
import { bytes, clock, count, duration, isNumber, percent, plural, times, whole, words } from "./format.js";

const QUIET_AFTER = 15; // seconds without a word, then a peer's row greys out
const STATES = new Set(["training", "loading", "waiting", "leaving", "away", "lost"]);
const stateClass = (state) => (STATES.has(state) ? state : "unknown");
const positive = (value) => isNumber(value) && value > 0;

// Sent and uncompressed bytes per token on one logarithmic line per purpose.
export function showTraffic(state) {
  const rows = (state.traffic ?? []).filter((row) => positive(row.nbytes) || positive(row.dense_nbytes));
  const perToken = positive(state.tokens) ? state.tokens : null;
  emptyOr("traffic", !rows.length || !perToken, ["traffic", "traffic-axis"]);
  if (!perToken) return;
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
  const [span, dense, sent] = track.children;
  const isCompared = positive(row.dense_nbytes) && positive(row.nbytes) && row.dense_nbytes > row.nbytes;
  text(name, words(row.purpose));
  const gain = isCompared ? ` of ${bytes(row.dense_nbytes / tokens)}, ${times(row.dense_nbytes / row.nbytes)} fewer` : "";
  text(figures, `${bytes(row.nbytes / tokens)}${gain}`);
  const [from, to] = [positive(row.nbytes) ? place(row.nbytes) : 0, isCompared ? place(row.dense_nbytes) : null];
  sent.hidden = !positive(row.nbytes);
  sent.style.left = `${from}%`;
  span.hidden = dense.hidden = to === null;
  span.style.left = `${from}%`;
  span.style.width = `${(to ?? from) - from}%`;
  dense.style.left = `${to ?? 0}%`;
}

export function showStages(state) {
  const peers = new Map((state.peers ?? []).map((peer) => [peer.id, peer]));
  const stages = [...(state.stages ?? [])];
  const free = [...peers.values()].filter((peer) => !isNumber(peer.stage));
  emptyOr("stages", !stages.length, ["stages"]);
  text($("stages-note"), stages.length ? plural(stages.length, "stage") : "");
  if (free.length && stages.length) stages.push({ stage: null, replicas: free.map((peer) => peer.id) });
  list($("stages"), stages, (stage) => stage.stage, makeStage, (node, stage) => fillStage(node, stage, peers));
}

function makeStage() {
  const node = el("div", "stage", el("h3"), el("p", "muted"), el("ul", "chips"), el("p", "risk"));
  node.setAttribute("role", "listitem");
  return node;
}

function fillStage(node, stage, peers) {
  const [title, about, chips, risk] = node.children;
  const replicas = stage.replicas ?? [];
  const isFree = stage.stage === null;
  node.classList.toggle("free", isFree);
  text(title, isFree ? "No stage yet" : `Stage ${whole(stage.stage)}`);
  const parameters = isNumber(stage.parameters) ? `${count(stage.parameters)} parameters` : "";
  text(about, isFree ? "waiting for work" : [layers(stage), parameters].filter(Boolean).join(", "));
  list(chips, replicas, (id) => id, () => el("li", "", el("i"), el("span", "peer-text"), el("small")), (chip, id) => {
    const peer = peers.get(id);
    const [, name, state] = chip.children;
    attribute(chip, "class", `chip ${stateClass(peer?.state)}`);
    attribute(chip, "title", `${words(peer?.name ?? id)}: ${words(peer?.state)}`);
    text(name, words(peer?.name ?? shortId(id)));
    text(state, words(peer?.state));
  });
  const working = replicas.filter((id) => peers.get(id)?.state === "training").length;
  text(risk, isFree ? "" : riskOf(replicas.length, working));
  attribute(risk, "class", working ? "risk" : "risk bad");
}

function riskOf(replicas, working) {
  if (!replicas) return "Nobody holds this stage";
  if (!working) return "No replica at work";
  return working === 1 ? "One replica at work, no spare" : `${working} replicas at work`;
}

const shortId = (id) => String(id ?? "").slice(0, 8);

function layers(stage) {
  if (!isNumber(stage?.first_layer) || !isNumber(stage?.last_layer)) return "";
  const { first_layer: first, last_layer: last } = stage;
  return first === last ? `layer ${first}` : `layers ${first}–${last}`;
}

export function showPeers(state) {
  const peers = state.peers ?? [];
  const stages = new Map((state.stages ?? []).map((stage) => [stage.stage, stage]));
  const names = new Map(peers.map((peer) => [peer.id, peer.name]));
  const committed = new Map();
  for (const peer of peers) committed.set(peer.stage, (committed.get(peer.stage) ?? 0) + (peer.samples || 0));
  emptyOr("peers", !peers.length, ["peers-scroll"]);
  list($("peers"), peers, (peer) => peer.id, makePeer, (row, peer) => {
    const [name, mark, stage, samples, share, speed, sent, received, device, seen] = row.children;
    text(name.children[0], words(peer.name));
    attribute(name.children[0], "title", String(peer.name ?? ""));
    text(name.children[1], shortId(peer.id));
    attribute(name.children[1], "title", String(peer.id ?? ""));
    attribute(mark.firstChild, "class", `state ${stateClass(peer.state)}`);
    text(mark.firstChild, words(peer.state));
    text(stage.children[0], isNumber(peer.stage) ? `${peer.stage}` : "none yet");
    text(stage.children[1], layers(stages.get(peer.stage)));
    text(samples, whole(peer.samples));
    const all = isNumber(peer.stage) ? committed.get(peer.stage) : 0;
    const part = all > 0 && isNumber(peer.samples) ? peer.samples / all : null;
    text(share.firstChild, percent(part));
    share.lastChild.firstChild.style.width = `${(part ?? 0) * 100}%`;
    const isWorking = part !== null && peer.state === "training" && isNumber(state.tokens_per_second);
    text(speed, count(isWorking ? part * state.tokens_per_second : null));
    attribute(speed, "title", isNumber(peer.seconds_per_step) ? `${duration(peer.seconds_per_step)} per step` : "");
    const links = Array.isArray(peer.links) ? peer.links : [];
    const relayed = links.filter((link) => link.path === "relayed").length;
    text(sent.children[0], bytes(peer.sent));
    text(sent.children[1], relayed ? (relayed === links.length ? "through a relay" : `${relayed} of ${links.length} links relayed`) : "");
    attribute(sent, "title", links.map((link) => describeLink(link, names)).join("\n"));
    text(received, bytes(peer.received));
    text(device, words(peer.device));
    timed(seen, peer.last_seen);
  });
}

function describeLink(link, names) {
  const rate = isNumber(link.bytes_per_second) ? `, ${count((link.bytes_per_second * 8) / 1e6)} Mbit/s` : "";
  const trip = isNumber(link.rtt_seconds) ? `, ${count(link.rtt_seconds * 1000)} ms there and back` : "";
  return `to ${words(names.get(link.peer) ?? shortId(link.peer))}: ${words(link.path)}${rate}${trip}`;
}

function makePeer() {
  const name = el("th", "name", el("span", "peer-text"), el("small"));
  name.scope = "row";
  const seen = el("td", "n");
  seen.dataset.stale = String(QUIET_AFTER);
  const share = el("td", "n share", el("span"), el("i", "", el("i")));
  const stage = el("td", "", el("span"), el("small"));
  const [samples, speed, received] = Array.from({ length: 3 }, () => el("td", "n"));
  const sent = el("td", "n", el("span"), el("small"));
  return el("tr", "", name, el("td", "", el("span")), stage, samples, share, speed, sent, received, el("td", "peer-text device"), seen);
}

// A cell that says how long ago; `showTimes` keeps it true between messages.
function timed(cell, time) {
  if (isNumber(time) && time > 0) {
    attribute(cell, "data-time", String(time));
    attribute(cell, "title", clock(time));
  } else {
    cell.removeAttribute("data-time");
    text(cell, words(null));
  }
}

export function showRounds(all) {
  const rounds = [...all].sort((a, b) => b.round - a.round).slice(0, 30);
  emptyOr("rounds", !rounds.length, ["rounds-scroll"]);
  const make = () => el("tr", "", ...Array.from({ length: 8 }, (_, i) => (i === 4 ? el("td", "", el("span"), el("small", "bad")) : el("td", "n"))));
  list($("rounds"), rounds, (round) => round.round, make, (row, round) => {
    const [number, step, replicas, samples, agree, nbytes, seconds, committed] = row.children;
    text(number, whole(round.round));
    text(step, whole(round.step));
    text(replicas, whole(round.replicas));
    text(samples, whole(round.samples));
    const isKnown = typeof round.agree === "boolean";
    const verdict = isKnown ? (round.agree ? "yes" : "no") : words(null);
    text(agree.children[0], verdict);
    attribute(agree.children[0], "class", isKnown ? (round.agree ? "verdict" : "verdict bad") : "");
    text(agree.children[1], round.degraded ? "degraded" : "");
    text(nbytes, bytes(round.nbytes));
    text(seconds, duration(round.seconds));
    timed(committed, round.committed);
  });
}

export function showEvents(all) {
  const events = [...all].sort((a, b) => b.id - a.id).slice(0, 40);
  emptyOr("events", !events.length, ["events-scroll"]);
  const make = () => el("li", "", el("time"), el("span", "peer-text"));
  list($("events"), events, (event) => event.id, make, (node, event) => {
    text(node.children[0], clock(event.time));
    text(node.children[1], words(event.text));
    attribute(node, "title", words(event.kind));
  });
}
