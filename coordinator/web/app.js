// Keeps the page in step with the coordinator: one event stream, reopened until it answers.

import { LossChart } from "./chart.js";
import { $, attribute, text } from "./dom.js";
import { showEvaluations } from "./evaluations.js";
import { elapsed, isNumber } from "./format.js";
import { ENDED, showState, showTimes } from "./view.js";

// The coordinator pings every 10 s; a line that stays silent much longer is dead even if it looks open.
const SILENCE = 25_000;
const REOPEN = 2_000;

const chart = new LossChart();
const page = { state: null, evaluations: 0, isAsking: false, stream: null, receivedAt: 0, heardAt: 0, lastPoint: -1, isLost: false, isDrawing: false };

function connect() {
  page.stream?.close();
  page.heardAt = performance.now();
  const stream = new EventSource(page.lastPoint < 0 ? "api/events" : `api/events?after=${page.lastPoint}`);
  page.stream = stream;
  stream.addEventListener("points", (event) => read(event, receivePoints));
  stream.addEventListener("state", (event) => read(event, receiveState));
  stream.addEventListener("ping", () => heard());
  stream.addEventListener("error", () => {
    lose();
    // The browser retries a dropped line by itself, but gives up after an answer such as 502.
    if (stream.readyState === EventSource.CLOSED) setTimeout(() => page.stream === stream && connect(), REOPEN);
  });
}

function read(event, receive) {
  receive(JSON.parse(event.data));
  heard();
}

function receivePoints(points) {
  const fresh = points.filter((point) => point.id > page.lastPoint);
  if (!fresh.length) return;
  page.lastPoint = fresh.at(-1).id;
  chart.add(fresh);
}

function receiveState(state) {
  const isOtherRun = page.state?.run?.id && state.run?.id && page.state.run.id !== state.run.id;
  page.state = state;
  page.receivedAt = performance.now();
  if (isOtherRun) {
    page.lastPoint = -1;
    page.evaluations = -1;
    chart.clear();
    connect();
  }
  draw();
}

// They are long and seldom change, so the state carries only what tells that they did.
async function askEvaluations() {
  const wanted = page.state.evaluations ?? 0;
  if (wanted === page.evaluations || page.isAsking) return;
  page.isAsking = true;
  try {
    const answer = await fetch("api/evaluations");
    if (!answer.ok) return;
    const rows = await answer.json();
    page.evaluations = wanted;
    showEvaluations(rows);
    chart.mark(rows);
  } catch {
    // The next word from the coordinator asks again.
  } finally {
    page.isAsking = false;
  }
}

function heard() {
  page.heardAt = performance.now();
  if (page.state) askEvaluations();
  if (page.isLost || !document.body.classList.contains("live")) {
    page.isLost = false;
    showLink("live");
  }
}

function lose() {
  if (!page.isLost) {
    page.isLost = true;
    page.lostAt = page.heardAt;
  }
  showLink(page.state ? "lost" : "connecting");
  showAge();
}

function showLink(link) {
  document.body.classList.toggle("live", link === "live");
  document.body.classList.toggle("stale", link === "lost");
  attribute($("link"), "data-link", link);
  text($("link"), link);
  $("banner").hidden = link !== "lost";
}

function showAge() {
  if (!page.isLost || !page.state) return;
  const age = elapsed((performance.now() - page.lostAt) / 1000);
  const ended = ENDED.has(page.state.phase) ? ` The run had ${page.state.phase}.` : "";
  text($("banner-age"), `The data is ${age} old.${ended}`);
}

// The coordinator's clock now; it stands still while nobody answers, for then nothing is known.
function serverNow() {
  if (!isNumber(page.state?.now)) return null;
  const until = page.isLost ? page.lostAt : performance.now();
  return page.state.now + Math.max(0, until - page.receivedAt) / 1000;
}

function draw() {
  if (page.isDrawing) return;
  page.isDrawing = true;
  requestAnimationFrame(() => {
    page.isDrawing = false;
    showState(page.state, chart.latest);
    showTimes(page.state, serverNow());
  });
}

setInterval(() => {
  if (performance.now() - page.heardAt > SILENCE) {
    lose();
    connect();
  }
  if (page.state && !page.isLost) showTimes(page.state, serverNow());
  showAge();
}, 1000);

connect();
