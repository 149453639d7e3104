// The state of the run, written into the header and the tiles; the panels below have their own module.

import { showTraffic } from "./bytes.js";
import { $, attribute, el, list, takes, text } from "./dom.js";
import { ago, bytes, clock, count, elapsed, isNumber, loss, NONE, percent, plural, roughly, times, whole, words } from "./format.js";
import { showLanes } from "./lanes.js";
import { showAlerts, showEvents, showPeers, showRounds, stateClass } from "./panels.js";

export const ENDED = new Set(["finished", "stopped"]);
const ORDER = ["training", "loading", "waiting", "leaving", "away", "lost", "gone", NONE];

// `isHome`: the first screen is what the reader sees; the panels below need no work while it is not.
export function showState(state, latest, page, isHome) {
  showHeader(state);
  showAlerts(state.alerts ?? []);
  if (!isHome) return;
  showTiles(state, latest);
  showTraffic(state);
  showLanes($("lanes"), state, page);
  showPeers(state);
  showRounds(state.rounds ?? []);
  showEvents(state.events ?? []);
  text($("published"), state.published ? `Latest checkpoint: ${state.published}` : "");
}

// Every panel names the table and the call that its numbers come from.
export function linkNumbers(source) {
  const both = (name, query = "") => ({ CSV: `api/${name}.csv${query}`, API: `api/${name}${query}` });
  const panels = {
    "take-loss": both("curve", "?most=2000"), "take-incidents": both("incidents"), "take-traffic": both("traffic"), "take-rounds": both("rounds"),
    "take-events": both("events"), "take-evaluations": { API: "api/evaluations" }, "take-peers": { API: "api/state" },
  };
  for (const [id, paths] of Object.entries(panels)) $(id).replaceWith(takes(source, paths));
}

export function title(state, view, at) {
  const moment = at === null ? null : `at ${clock(at)}`;
  return [isNumber(state.heldout_loss) && !view ? loss(state.heldout_loss) : null, view, moment, state.run?.name, "potluck"].filter(Boolean).join(" · ");
}

// Everything that ages by itself, between two messages.
export function showTimes(state, now) {
  const end = ENDED.has(state.phase) ? lastWord(state) ?? now : now;
  const isTimed = isNumber(state.started) && isNumber(end) && state.started > 0;
  text($("elapsed"), isTimed ? `${elapsed(end - state.started)} elapsed` : "");
  for (const node of document.querySelectorAll("[data-time]")) {
    const age = isNumber(now) ? now - Number(node.dataset.time) : null;
    text(node, ago(age));
    if (node.dataset.stale) node.closest("tr").classList.toggle("old", age > Number(node.dataset.stale));
  }
}

// When anything last happened: there a run that has ended stops its clock.
export function lastWord(state) {
  const times = [...(state.rounds ?? []).map((round) => round.committed), ...(state.events ?? []).map((event) => event.time)];
  const known = times.filter(isNumber);
  return known.length ? Math.max(...known) : null;
}

function showHeader(state) {
  const run = state.run ?? {};
  text($("run-name"), run.name ? String(run.name) : "");
  const codec = run.codec ? `activations ${run.codec}` : null;
  const preset = run.preset ? `preset ${run.preset}` : null;
  text($("run-about"), [run.model, preset, codec].filter(Boolean).join(" · "));
  const phase = state.is_paused ? "paused" : String(state.phase ?? "");
  attribute($("phase"), "data-phase", phase);
  text($("phase"), phase);
  $("phase").hidden = !state.phase;
  text($("sentence"), sentence(state));
}

function sentence(state) {
  if (state.note) return String(state.note);
  const peers = (state.peers ?? []).filter((peer) => peer.state === "training").length;
  const open = (state.stages ?? []).filter((stage) => !stage.replicas?.length).length;
  if (state.is_paused) return "An operator paused the run";
  if (state.phase === "training") return peers ? `${plural(peers, "peer")} at work` : "Nobody at work right now";
  if (state.phase === "waiting") return open ? `${plural(open, "stage")} without a peer` : "Waiting for workers";
  if (ENDED.has(state.phase)) return isNumber(state.step) ? `After ${plural(state.step, "step")}` : "";
  return state.phase ? "" : "Connected; the run has not said anything yet";
}

function showTiles(state, latest) {
  showProgress(state);
  text($("heldout"), loss(state.heldout_loss));
  text($("heldout-sub"), isNumber(state.heldout_first) ? `${loss(state.heldout_first)} at the start` : "not measured yet");
  text($("train"), loss(latest.smoothed ?? state.train_loss));
  text($("train-sub"), isNumber(latest.raw) ? `smoothed; latest ${loss(latest.raw)}` : "no step yet");
  text($("tokens"), count(state.tokens));
  text($("tokens-sub"), isNumber(state.tokens_per_second) ? `${count(state.tokens_per_second)} tokens/s` : ENDED.has(state.phase) ? "the run is over" : "no speed yet");
  showBytesPerToken(state.bytes_per_token, state.dense_bytes_per_token);
  const peers = state.peers ?? [];
  const states = new Map();
  for (const peer of peers) states.set(words(peer.state), (states.get(words(peer.state)) ?? 0) + 1);
  const order = [...states].sort(([a], [b]) => ORDER.indexOf(a) - ORDER.indexOf(b));
  text($("peer-count"), whole(peers.length));
  text($("peer-sub"), peers.length ? order.map(([name, number]) => `${whole(number)} ${name}`).join(", ") : state.round > 0 ? "everybody has left" : "nobody has joined yet");
  attribute($("peer-bar"), "aria-hidden", "true");
  list($("peer-bar"), order, ([name]) => name, () => el("i"), (node, [name, number]) => {
    attribute(node, "class", stateClass(name));
    node.style.flexGrow = String(number);
  });
  showGoodput(state.goodput);
  showFinish(state);
  text($("round"), whole(state.round));
  const disagreed = (state.rounds ?? []).filter((round) => round.agree === false).length;
  const degraded = (state.rounds ?? []).filter((round) => round.degraded).length;
  const troubles = [disagreed && `${disagreed} disagreed`, degraded && `${degraded} degraded`].filter(Boolean).join(", ");
  const recent = state.rounds?.length ?? 0;
  text($("round-sub"), recent ? `last ${recent}: ${troubles || "all replicas agree"}` : "no round yet");
}

function showBytesPerToken(sent, dense) {
  text($("bpt"), bytes(sent));
  const fewer = isNumber(sent) && isNumber(dense) && sent > 0 && dense > 0 ? dense / sent : null;
  const sentence = fewer >= 1 ? `${times(fewer)} fewer than uncompressed` : `uncompressed: ${bytes(dense)}`;
  text($("bpt-sub"), fewer === null ? "nothing to compare yet" : sentence);
}

// Of all that was computed, the part that counts.
function showGoodput(goodput) {
  const { committed, computed } = goodput ?? {};
  const isKnown = isNumber(committed) && isNumber(computed) && computed > 0;
  text($("goodput"), isKnown ? percent(Math.min(1, committed / computed)) : NONE);
  text($("goodput-sub"), isKnown ? `${count(committed)} of ${count(computed)} samples` : "nothing computed yet");
}

// By the pace of the run's faster and of its slower stretches, as the time left and as the time of day.
function showFinish({ phase, eta, now, is_paused: isPaused }) {
  const isOver = ENDED.has(phase);
  const isKnown = !isOver && isNumber(eta?.low) && isNumber(eta?.high);
  text($("finish"), isKnown ? range(eta.low, eta.high) : isOver ? String(phase) : NONE);
  const isFar = eta?.high > 86_400;
  const moments = isKnown && isNumber(now) ? [moment(now + eta.low, now, isFar), moment(now + eta.high, now, isFar)] : [];
  const when = moments[0] === moments[1] ? `done at ${moments[0]}` : `done ${moments[0]} – ${moments[1]}`;
  text($("finish-sub"), isPaused ? "once it goes on" : moments.length ? when : isOver ? "nothing left to do" : "no estimate yet");
}

// "7 – 11 min": both ends in the unit that suits the later one.
function range(low, high) {
  const [name, unit] = [["d", 86_400], ["h", 3600], ["min", 60], ["s", 1]].find(([, size]) => high >= 1.5 * size) ?? ["s", 1];
  const [from, to] = [low, high].map((value) => {
    const size = value / unit;
    return String(size < 10 && unit >= 3600 ? Math.round(size * 2) / 2 : Math.round(size));
  });
  return from === to ? `${to} ${name}` : `${from} – ${to} ${name}`;
}

// Minutes within a day, with its name where it is not today; the date beyond.
function moment(time, now, isFar) {
  const date = new Date(time * 1000);
  if (isFar) return date.toLocaleDateString("en-GB", { weekday: "short", day: "numeric", month: "short" });
  const isToday = date.toDateString() === new Date(now * 1000).toDateString();
  return date.toLocaleString("en-GB", { ...(isToday ? {} : { weekday: "short" }), hour: "2-digit", minute: "2-digit" });
}

function showProgress(state) {
  const { step, steps } = state;
  const done = isNumber(step) && isNumber(steps) && steps > 0 ? Math.min(1, step / steps) : null;
  text($("step"), isNumber(steps) && steps > 0 ? `${whole(step)} of ${whole(steps)}` : whole(step));
  $("progress").hidden = done === null;
  $("progress-bar").style.width = `${(done ?? 0) * 100}%`;
  attribute($("progress"), "aria-valuenow", String(Math.round((done ?? 0) * 100)));
  // The range, where it is known, has a tile of its own.
  const left = !state.eta && isNumber(state.eta_seconds) && !ENDED.has(state.phase) ? `about ${roughly(state.eta_seconds)} left` : null;
  const parts = [done === null ? null : percent(done), done === 1 ? null : left];
  text($("eta"), parts.filter(Boolean).join(", ") || "no end is set");
}
