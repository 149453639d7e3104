// The state of the run, written into the header and the tiles; the panels below have their own module.

import { $, attribute, text } from "./dom.js";
import { ago, bytes, count, elapsed, isNumber, loss, percent, plural, roughly, times, whole, words } from "./format.js";
import { showEvents, showPeers, showRounds, showStages, showTraffic } from "./panels.js";

export const ENDED = new Set(["finished", "stopped"]);

export function showState(state, latest) {
  showHeader(state);
  showTiles(state, latest);
  showTraffic(state);
  showStages(state);
  showPeers(state);
  showRounds(state.rounds ?? []);
  showEvents(state.events ?? []);
  text($("published"), state.published ? `Latest checkpoint: ${state.published}` : "");
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
function lastWord(state) {
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
  attribute($("phase"), "data-phase", String(state.phase ?? ""));
  text($("phase"), state.phase ? String(state.phase) : "");
  $("phase").hidden = !state.phase;
  text($("sentence"), sentence(state));
  document.title = [isNumber(state.heldout_loss) ? loss(state.heldout_loss) : null, run.name, "potluck"].filter(Boolean).join(" · ");
}

function sentence(state) {
  if (state.note) return String(state.note);
  const peers = (state.peers ?? []).filter((peer) => peer.state === "training").length;
  const open = (state.stages ?? []).filter((stage) => !stage.replicas?.length).length;
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
  text($("tokens-sub"), isNumber(state.tokens_per_second) ? `${count(state.tokens_per_second)} tokens/s` : "no speed yet");
  showBytesPerToken(state.bytes_per_token, state.dense_bytes_per_token);
  const peers = state.peers ?? [];
  const states = new Map();
  for (const peer of peers) states.set(words(peer.state), (states.get(words(peer.state)) ?? 0) + 1);
  text($("peer-count"), whole(peers.length));
  text($("peer-sub"), peers.length ? [...states].map(([name, number]) => `${number} ${name}`).join(", ") : "nobody has joined yet");
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

function showProgress(state) {
  const { step, steps } = state;
  const done = isNumber(step) && isNumber(steps) && steps > 0 ? Math.min(1, step / steps) : null;
  text($("step"), isNumber(steps) && steps > 0 ? `${whole(step)} of ${whole(steps)}` : whole(step));
  $("progress").hidden = done === null;
  $("progress-bar").style.width = `${(done ?? 0) * 100}%`;
  attribute($("progress"), "aria-valuenow", String(Math.round((done ?? 0) * 100)));
  const left = isNumber(state.eta_seconds) && !ENDED.has(state.phase) ? `about ${roughly(state.eta_seconds)} left` : null;
  const parts = [done === null ? null : percent(done), done === 1 ? null : left];
  text($("eta"), parts.filter(Boolean).join(", ") || "no estimate yet");
}
