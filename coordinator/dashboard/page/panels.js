// The panels below the tiles: pipeline, peers, rounds, events.

import { $, attribute, el, emptyOr, list, text } from "./dom.js";
import { bytes, clock, count, duration, isNumber, percent, plural, whole, words } from "./format.js";

const QUIET_AFTER = 15; // seconds without a word, then a peer's row greys out
const STATES = new Set(["training", "loading", "waiting", "leaving", "away", "lost", "gone"]);
export const stateClass = (state) => (STATES.has(state) ? state : "unknown");
const FEW = 60; // peers; of more than these only those in sight are in the document
const SPARE = 8; // rows above and below those in sight
const STRIDE = 6;

export function showStages(root, state) {
  const peers = new Map((state.peers ?? []).map((peer) => [peer.id, peer]));
  const stages = [...(state.stages ?? [])];
  const free = [...peers.values()].filter((peer) => !isNumber(peer.stage));
  if (free.length && stages.length) stages.push({ stage: null, replicas: free.map((peer) => peer.id) });
  if (!root.firstChild) root.append(el("div", "stages"), el("p", "empty", "The model is not split into stages yet."));
  const [all, none] = root.children;
  attribute(all, "role", "list");
  all.hidden = !stages.length;
  none.hidden = stages.length > 0;
  list(all, stages, (stage) => stage.stage, makeStage, (node, stage) => fillStage(node, stage, peers));
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
  }, (id) => [peers.get(id)?.name, peers.get(id)?.state]);
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

// Only rows in sight are in the document, and one is written again only if something in it changed: a run may have
// hundreds of peers, each of whom changes every second.
export function showPeers(state) {
  const all = state.peers ?? [];
  const isLong = all.length > FEW;
  emptyOr("peers", !all.length, ["peers-scroll"]);
  text($("peers-empty"), state.round > 0 ? "Everybody has left. The leaderboard names who was here." : "Nobody has joined yet.");
  $("peers-find").hidden = !isLong;
  shownPeers.state = state;
  if (!shownPeers.isBound) bindPeers();
  const wanted = isLong ? $("peers-find").value.trim().toLowerCase() : "";
  const peers = wanted ? all.filter((peer) => [peer.name, peer.id, peer.state, peer.device].join("\n").toLowerCase().includes(wanted)) : all;
  const [first, last] = inSight(peers.length, isLong);
  $("peers-above").firstElementChild.style.height = `${first * shownPeers.height}px`;
  $("peers-below").firstElementChild.style.height = `${(peers.length - last) * shownPeers.height}px`;
  $("peers-scroll").classList.toggle("long", isLong);
  attribute($("peers-scroll").firstElementChild, "aria-rowcount", String(peers.length + 1));
  text($("peers-note"), wanted ? `${whole(peers.length)} of ${whole(all.length)}` : "");

  const stages = new Map((state.stages ?? []).map((stage) => [stage.stage, stage]));
  const names = new Map(all.map((peer) => [peer.id, peer.name]));
  const committed = new Map();
  for (const peer of all) committed.set(peer.stage, (committed.get(peer.stage) ?? 0) + (peer.samples || 0));
  const rows = peers.slice(first, last).map((peer, i) => {
    const whole = isNumber(peer.stage) ? committed.get(peer.stage) : 0;
    const part = whole > 0 && isNumber(peer.samples) ? peer.samples / whole : null;
    const speed = count(peer.state === "training" ? peer.tokens_per_second : null);
    return { peer, index: first + i + 2, stage: stages.get(peer.stage), part: share(part), width: `${Math.round((part ?? 0) * 100)}%`, speed };
  });
  const facts = (row) => [row.peer, row.index, row.part, row.speed, row.stage?.first_layer, row.stage?.last_layer];
  list($("peers"), rows, (row) => row.peer.id, makePeer, (node, row) => fillPeer(node, row, names), facts);
  const height = $("peers").firstElementChild?.offsetHeight;
  if (isLong && height && Math.abs(height - shownPeers.height) > 0.5) {
    shownPeers.height = height;
    showPeers(state);
  }
}

const shownPeers = { state: null, height: 34, isBound: false };
const share = (part) => (isNumber(part) && part > 0 && part < 0.0095 ? `${(part * 100).toFixed(1)} %` : percent(part));

function inSight(length, isLong) {
  if (!isLong) return [0, length];
  const { scrollTop, clientHeight } = $("peers-scroll");
  // In strides, so that most of a scroll finds its rows already there.
  const at = Math.floor(scrollTop / shownPeers.height / STRIDE) * STRIDE - SPARE;
  const first = Math.max(0, Math.min(at, length - 1));
  return [first, Math.min(length, first + Math.ceil((clientHeight || 420) / shownPeers.height) + STRIDE + 2 * SPARE)];
}

function bindPeers() {
  shownPeers.isBound = true;
  const again = () => requestAnimationFrame(() => showPeers(shownPeers.state));
  $("peers-scroll").addEventListener("scroll", again, { passive: true });
  $("peers-find").addEventListener("input", () => {
    $("peers-scroll").scrollTop = 0;
    again();
  });
}

function fillPeer(node, { peer, index, stage: place, part, width, speed: rate }, names) {
  const [name, mark, stage, samples, share, speed, sent, received, device, seen] = node.children;
  attribute(node, "aria-rowindex", String(index));
  text(name.children[0], words(peer.name));
  attribute(name.children[0], "href", `#/peer/${encodeURIComponent(peer.id)}`);
  attribute(name.children[0], "title", String(peer.name ?? ""));
  text(name.children[1], shortId(peer.id));
  attribute(name.children[1], "title", String(peer.id ?? ""));
  attribute(mark.firstChild, "class", `state ${stateClass(peer.state)}`);
  text(mark.firstChild, words(peer.state));
  text(stage.children[0], isNumber(peer.stage) ? `${peer.stage}` : "none yet");
  text(stage.children[1], layers(place));
  text(samples, whole(peer.samples));
  text(share.firstChild, part);
  share.lastChild.firstChild.style.width = width;
  text(speed, rate);
  attribute(speed, "title", isNumber(peer.seconds_per_step) ? `${duration(peer.seconds_per_step)} per step` : "");
  const links = Array.isArray(peer.links) ? peer.links : [];
  const relayed = links.filter((link) => link.path === "relayed").length;
  text(sent.children[0], bytes(peer.sent));
  text(sent.children[1], relayed ? (relayed === links.length ? "through a relay" : `${relayed} of ${links.length} links relayed`) : "");
  attribute(sent, "title", links.map((link) => describeLink(link, names)).join("\n"));
  text(received, bytes(peer.received));
  text(device, words(peer.device));
  timed(seen, peer.last_seen);
}

function describeLink(link, names) {
  const rate = isNumber(link.bytes_per_second) ? `, ${count((link.bytes_per_second * 8) / 1e6)} Mbit/s` : "";
  const trip = isNumber(link.rtt_seconds) ? `, ${count(link.rtt_seconds * 1000)} ms there and back` : "";
  return `to ${words(names.get(link.receiver) ?? shortId(link.receiver))}: ${words(link.path)}${rate}${trip}`;
}

function makePeer() {
  const name = el("th", "name", el("a", "peer-text"), el("small"));
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
  const make = () => {
    const [agree, numbers] = [el("td", "", el("span"), el("small", "bad")), Array.from({ length: 7 }, () => el("td", "n"))];
    numbers[1].append(el("a"));
    return el("tr", "", ...numbers.slice(0, 4), agree, ...numbers.slice(4));
  };
  list($("rounds"), rounds, (round) => round.round, make, (row, round) => {
    const [number, step, replicas, samples, agree, nbytes, seconds, committed] = row.children;
    text(number, whole(round.round));
    text(step.firstChild, whole(round.step));
    attribute(step.firstChild, "href", `#/round/${encodeURIComponent(round.step)}`);
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
  }, (round) => [JSON.stringify(round)]);
}

export function showEvents(all) {
  const events = [...all].sort((a, b) => b.id - a.id).slice(0, 40);
  emptyOr("events", !events.length, ["events-scroll"]);
  const make = () => el("li", "", el("time"), el("span", "peer-text"));
  list($("events"), events, (event) => event.id, make, (node, event) => {
    text(node.children[0], clock(event.time));
    text(node.children[1], words(event.text));
    attribute(node, "title", words(event.kind));
  }, (event) => [event.text, event.time]);
}

// What the operator should look at, above everything else.
export function showAlerts(alerts) {
  $("alerts-box").hidden = !alerts.length;
  list($("alerts"), alerts, (alert) => alert.name, () => el("li", "", el("b", "peer-text"), el("span", "peer-text"), el("small")), (node, alert) => {
    const [name, sentence, since] = node.children;
    text(name, words(alert.name));
    text(sentence, words(alert.text));
    text(since, isNumber(alert.since) ? `since ${clock(alert.since)}` : "");
  });
}
