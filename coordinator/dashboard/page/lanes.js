// The pipeline as lanes: for every replica of every stage, where the time of one step goes and whom it waits for.

import { attribute, el, list, text } from "./dom.js";
import { count, isNumber, percent, plural, whole, words } from "./format.js";
import { brief, fillPeerLink, namesOf, shortId } from "./detail.js";

const WHAT = { compute: "compute", codec: "compression", update: "update", wire: "on the wire", wait: "waiting for a peer", other: "rounds and the rest" };
const STATES = new Set(["training", "loading", "waiting", "leaving", "away", "lost", "gone"]);
const SHOWN = 6; // replicas of a stage before it is folded; those that are not at work take at most IDLE of them
const IDLE = 2;
const FREE = 24;
const WAITS = 3; // peers waited for that get a piece of their own
const unfolded = new WeakMap();

export const stateClass = (state) => (STATES.has(state) ? state : "unknown");

// The pieces of a step, in the order of the legend: [{what, seconds, peer?}].
export function pieces(time) {
  if (!time) return [];
  const waits = [...(time.waits ?? [])].sort((a, b) => b.seconds - a.seconds);
  const rest = waits.slice(WAITS).reduce((sum, wait) => sum + wait.seconds, 0);
  return [
    ...["compute", "codec", "update", "wire"].map((what) => ({ what, seconds: time[what] })),
    ...waits.slice(0, WAITS).map((wait) => ({ what: "wait", ...wait })),
    { what: "wait", seconds: rest, others: waits.length - WAITS },
    { what: "other", seconds: time.other },
  ].filter((piece) => piece.seconds > 0);
}

export const lasts = (time) => pieces(time).reduce((sum, piece) => sum + piece.seconds, 0);
const waiting = (time) => (time?.waits ?? []).reduce((sum, wait) => sum + wait.seconds, 0);
const busy = (peer) => lasts(peer?.time) - waiting(peer?.time);

export function timeLegend() {
  return el("ul", "legend time-legend", ...Object.entries(WHAT).map(([what, name]) => el("li", "", el("i", `swatch ${what}`), name)));
}

// Draws a step into `bar`; `most` seconds fill it.
export function fillTimeBar(bar, time, most, nameOf) {
  const all = lasts(time);
  const name = (piece) => (piece.peer ? nameOf(piece.peer) : piece.others ? plural(piece.others, "more", "more") : "");
  const say = (piece) => {
    const what = piece.what === "wait" ? `waiting for ${name(piece)}` : WHAT[piece.what];
    return `${what}: ${brief(piece.seconds)}, ${percent(piece.seconds / all)}`;
  };
  attribute(bar, "role", "img");
  bar.classList.toggle("untimed", !all);
  attribute(bar, "aria-label", all ? `One step, ${brief(all)}: ${pieces(time).map(say).join("; ")}` : "No step yet");
  list(bar, pieces(time), (piece) => `${piece.what} ${piece.peer ?? ""}`, () => el("i", "", el("span", "peer-text")), (node, piece) => {
    attribute(node, "class", `piece ${piece.what}`);
    attribute(node, "title", say(piece));
    node.style.width = `${(piece.seconds / most) * 100}%`;
    text(node.firstChild, piece.what === "wait" && piece.seconds / most > 0.1 ? name(piece) : "");
  });
}

// "43 % waiting for dora, lab4", longest first.
function waitWords(time, nameOf) {
  const all = lasts(time);
  const waits = [...(time.waits ?? [])].sort((a, b) => b.seconds - a.seconds);
  if (!all || waiting(time) / all < 0.005) return "waits for nobody";
  return `${percent(waiting(time) / all)} waiting for ${waits.map((wait) => nameOf(wait.peer)).join(", ")}`;
}

export function showLanes(root, state, page) {
  if (!root.firstElementChild) root.append(el("p", "lanes-note"), timeLegend(), el("div", "lanes"), el("div", "free-peers"), el("p", "empty"));
  const [note, legend, lanes, free, empty] = root.children;
  const open = unfolded.get(root) ?? unfolded.set(root, new Set()).get(root);
  const peers = new Map((state.peers ?? []).map((peer) => [peer.id, peer]));
  const stages = state.stages ?? [];
  const nameOf = namesOf(state);
  const timed = [...peers.values()].filter((peer) => peer.time);
  const most = Math.max(...timed.map((peer) => lasts(peer.time)), 1e-9);
  for (const node of [note, lanes]) node.hidden = !stages.length;
  empty.hidden = stages.length > 0;
  text(empty, "The model is not split into stages yet.");
  legend.hidden = !stages.length || !timed.length;
  const isOver = ["finished", "stopped"].includes(state.phase) && stages.every((stage) => !stage.replicas?.length);
  text(note, isOver ? `${plural(stages.length, "stage")}; the run has ${state.phase}, and nobody holds them any more` : stages.length ? summary(stages, timed, nameOf) : "");
  const again = () => showLanes(root, page.state?.() ?? state, page);
  list(lanes, stages, (stage) => stage.stage, () => makeStage(open, again), (node, stage) => fillStage(node, stage, { peers, nameOf, most, open, page, isOver }));
  const held = new Set(stages.flatMap((stage) => stage.replicas ?? []));
  showFree(free, [...peers.values()].filter((peer) => !isNumber(peer.stage) && !held.has(peer.id)), page);
}

function summary(stages, timed, nameOf) {
  const lanes = stages.reduce((sum, stage) => sum + (stage.replicas?.length ?? 0), 0);
  const size = `${plural(stages.length, "stage")}, ${plural(lanes, "replica")}`;
  const all = timed.reduce((sum, peer) => sum + lasts(peer.time), 0);
  if (!all) return `${size}; no step timed yet`;
  const waits = new Map();
  for (const wait of timed.flatMap((peer) => peer.time.waits ?? [])) waits.set(wait.peer, (waits.get(wait.peer) ?? 0) + wait.seconds);
  const [most] = [...waits].sort((a, b) => b[1] - a[1]);
  const sum = [...waits.values()].reduce((so, seconds) => so + seconds, 0);
  if (sum / all < 0.01) return `${size}; hardly anybody waits for a peer`;
  return `${size}; ${percent(sum / all)} of everybody's time is waiting for a peer, most for ${nameOf(most[0])}`;
}

function makeStage(open, again) {
  const thin = el("p", "thin", el("span", "triangle", "▲"), el("span"));
  thin.firstChild.setAttribute("aria-hidden", "true");
  const more = el("button", "more");
  more.type = "button";
  const node = el("section", "lane-stage", el("div", "lane-about", el("h3"), el("p", "muted"), el("p", "muted"), thin), el("div", "", el("ul", "replicas"), more));
  more.addEventListener("click", () => {
    const { stage } = node.dataset;
    if (!open.delete(stage)) open.add(stage);
    again();
  });
  return node;
}

function fillStage(node, stage, { peers, nameOf, most, open, page, isOver }) {
  const [about, lanes] = node.children;
  const [title, held, size, thin] = about.children;
  const [rows, more] = lanes.children;
  const name = `Stage ${whole(stage.stage)}`;
  node.dataset.stage = String(stage.stage);
  text(title, name);
  text(held, layers(stage));
  text(size, isNumber(stage.parameters) ? `${count(stage.parameters)} parameters` : "");
  const replicas = [...(stage.replicas ?? [])];
  const working = replicas.filter((id) => peers.get(id)?.state === "training").length;
  const isThin = !isOver && (stage.is_thin || !working);
  node.classList.toggle("is-thin", isThin);
  attribute(thin, "class", isThin ? "thin" : "muted");
  thin.firstChild.hidden = !isThin;
  text(thin.lastChild, isOver ? "" : holders(replicas.length, working, stage.is_thin));
  const shownFirst = replicas.length > SHOWN ? worstFirst(replicas, peers) : replicas;
  const isOpen = open.has(String(stage.stage));
  const shown = isOpen ? shownFirst : shownFirst.slice(0, SHOWN);
  const hidden = replicas.length - SHOWN;
  more.hidden = hidden <= 0;
  attribute(more, "aria-expanded", String(isOpen));
  text(more, isOpen ? `Show the slowest ${SHOWN} only` : `${hidden} more: ${tally(shownFirst.slice(SHOWN).map((id) => peers.get(id)?.state))}`);
  list(rows, shown, (id) => id, makeReplica, (row, id) => fillReplica(row, id, peers.get(id), { nameOf, most, page }));
}

function holders(replicas, working, isThin) {
  if (!replicas) return "Nobody holds this stage";
  if (!working) return "No replica at work";
  if (isThin) return "Only one replica left";
  return `${plural(working, "replica")} at work${working < replicas ? `, ${replicas - working} not` : ""}`;
}

// Some of those that do not work, then who works longest on a step, then the rest.
function worstFirst(replicas, peers) {
  const isAtWork = (id) => peers.get(id)?.state === "training";
  const idle = replicas.filter((id) => !isAtWork(id));
  const slow = replicas.filter(isAtWork).sort((a, b) => busy(peers.get(b)) - busy(peers.get(a)));
  const few = idle.slice(0, Math.max(IDLE, SHOWN - slow.length));
  return [...few, ...slow, ...idle.slice(few.length)];
}

function tally(states) {
  const numbers = new Map();
  for (const state of states) numbers.set(words(state), (numbers.get(words(state)) ?? 0) + 1);
  return [...numbers].map(([state, number]) => `${number} ${state}`).join(", ");
}

const makeReplica = () => el("li", "replica", el("p", "who", el("a", "peer-text"), el("span")), el("div", "time-bar"), el("p", "figures", el("b"), el("span")));

function fillReplica(row, id, peer, { nameOf, most, page }) {
  const [who, bar, figures] = row.children;
  fillPeerLink(who.firstChild, page, id, nameOf(id));
  attribute(who.lastChild, "class", `state ${stateClass(peer?.state)}`);
  text(who.lastChild, words(peer?.state));
  fillTimeBar(bar, peer?.time, most, nameOf);
  text(figures.firstChild, peer?.time ? brief(lasts(peer.time)) : "");
  const waits = peer?.time ? waitWords(peer.time, nameOf) : "no step timed";
  text(figures.lastChild, waits);
  attribute(figures, "title", waits);
}

function showFree(root, peers, page) {
  root.hidden = !peers.length;
  if (!root.firstElementChild) root.append(el("h3", "", "Without a stage"), el("ul", "chips"), el("p", "muted"));
  const [, chips, more] = root.children;
  list(chips, peers.slice(0, FREE), (peer) => peer.id, () => el("li", "", el("i"), el("a", "peer-text"), el("small")), (chip, peer) => {
    attribute(chip, "class", `chip ${stateClass(peer.state)}`);
    fillPeerLink(chip.children[1], page, peer.id, peer.name ?? shortId(peer.id));
    text(chip.lastChild, words(peer.state));
  });
  text(more, peers.length > FREE ? `and ${peers.length - FREE} more` : "");
  more.hidden = peers.length <= FREE;
}

function layers(stage) {
  const { first_layer: first, last_layer: last } = stage;
  if (!isNumber(first) || !isNumber(last)) return "";
  return first === last ? `layer ${first}` : `layers ${first}–${last}`;
}
