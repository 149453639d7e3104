// Owns what the page shows: what the coordinator says, the moment that is looked at, and the view.

import { BytesChart } from "./bytes.js";
import { LossChart } from "./chart.js";
import { Curve, MOST } from "./curve.js";
import { $, attribute, el, text } from "./dom.js";
import { showEvaluations } from "./evaluations.js";
import { elapsed, isNumber } from "./format.js";
import { Incidents } from "./incidents.js";
import { Model } from "./model.js";
import { Replay } from "./replay.js";
import { route } from "./router.js";
import { source } from "./source.js";
import { ENDED, lastWord, linkNumbers, showState, showTimes, title } from "./view.js";
import { VIEWS } from "./views.js";

const RETRY = 2_000;
const DRAW_EVERY = 200; // milliseconds
const ASK_EVERY = 3_000; // for incidents, while events stream in
const REOPEN = 300; // for a view, while the slider moves

const model = new Model();
export const curve = new Curve();
const link = { isLost: false, receivedAt: 0, heardAt: 0, line: null };
const asked = { evaluations: 0, rows: [], isAsking: false, incidents: 0, timer: null };
let view = null; // beside the first screen: {name, shown}

export const page = {
  source,
  at: null,
  go: (hash) => router.go(hash),
  state: () => (page.at === null ? model.state : (replay.state ?? model.state)),
};

const incidents = new Incidents({ go: (at) => router.move(at), over: (x) => chart.hair(x) });
const chart = new LossChart(curve, incidents, { go: (at) => router.move(at), redrawn: () => draw() });
const traffic = new BytesChart(source);
const replay = new Replay({ source, incidents, span, move: (at, isPassing) => router.move(at, isPassing), settle: () => router.settle(), shown: () => draw() });

// Where the slider begins and ends.
function span() {
  const state = model.state ?? {};
  const first = curve.points[0]?.time;
  const start = isNumber(state.started) && state.started > 0 ? state.started : (first ?? state.now ?? 0);
  const now = serverNow() ?? state.now ?? start;
  const end = ENDED.has(state.phase) ? Math.max(lastWord(state) ?? 0, curve.points.at(-1)?.time ?? 0) || now : now;
  return [Math.min(start, incidents.rows[0]?.time ?? start), Math.max(end, start + 1)];
}

// The state first, for it is what the reader sees first; then the curve, and from there the stream.
async function start() {
  link.line?.close();
  link.line = null;
  for (;;) {
    try {
      const points = source.get(`api/curve?most=${MOST}`);
      points.catch(() => {});
      model.start(await source.get("api/state"));
      receivedState();
      drawNow();
      await new Promise((done) => setTimeout(done)); // the numbers are painted before the curve is drawn
      receivePoints(await points);
      draw();
      break;
    } catch {
      if (source.live) showLink(model.state ? "lost" : "connecting");
      await new Promise((done) => setTimeout(done, RETRY));
    }
  }
  askIncidents();
  traffic.load();
  link.line = source.subscribe(hear, () => model.place);
}

function hear(kind, data) {
  if (kind === "lost") return lose(data);
  if (kind === "state") receiveParts(data);
  if (kind === "peers") model.takePeers(data);
  if (kind === "points") receivePoints(data);
  if (kind === "events" && model.takeEvents(data).length) askIncidentsSoon();
  heard();
  draw();
  return undefined;
}

function receiveParts(parts) {
  const isOther = parts.run?.id && model.state?.run?.id && parts.run.id !== model.state.run.id;
  if (isOther) {
    model.clear();
    curve.clear();
    traffic.clear();
    incidents.set([]);
    asked.evaluations = -1;
    if (page.at !== null) router.move(null);
    start();
    return;
  }
  model.takeState(parts);
  receivedState();
}

function receivedState() {
  link.receivedAt = performance.now();
  traffic.add(model.state);
  heard();
  draw();
}

function receivePoints(points) {
  const fresh = model.takePoints(points);
  if (fresh.length) curve.add(fresh);
}

// They are long and seldom change, so the state carries only what tells that they did.
async function askEvaluations() {
  const wanted = model.state?.evaluations ?? 0;
  if (wanted === asked.evaluations || asked.isAsking) return;
  asked.isAsking = true;
  try {
    asked.rows = await source.get("api/evaluations");
    asked.evaluations = wanted;
    chart.mark(asked.rows);
    draw();
  } catch {
    // The next word from the coordinator asks again.
  } finally {
    asked.isAsking = false;
  }
}

function askIncidentsSoon() {
  asked.timer ??= setTimeout(askIncidents, Math.max(0, asked.incidents + ASK_EVERY - performance.now()));
}

async function askIncidents() {
  clearTimeout(asked.timer);
  asked.timer = null;
  asked.incidents = performance.now();
  try {
    incidents.set(await source.get("api/incidents"));
    chart.plot?.redraw(false);
    replay.tell();
  } catch {
    // The next event asks again.
  }
}

function heard() {
  link.heardAt = performance.now();
  askEvaluations();
  link.isLost = false;
  const isOver = ENDED.has(model.state?.phase);
  showLink(!source.live ? "report" : isOver ? "ended" : "live");
}

function lose(heardAt) {
  if (!link.isLost) link.lostAt = link.heardAt || heardAt;
  link.isLost = true;
  showLink(model.state ? "lost" : "connecting");
  showAge();
}

function showLink(kind) {
  document.body.classList.toggle("live", kind === "live");
  document.body.classList.toggle("stale", kind === "lost");
  attribute($("link"), "data-link", kind);
  text($("link"), kind);
  $("banner").hidden = kind !== "lost";
}

function showAge() {
  if (!link.isLost || !model.state) return;
  const age = elapsed((performance.now() - link.lostAt) / 1000);
  const ended = ENDED.has(model.state.phase) ? ` The run had ${model.state.phase}.` : "";
  text($("banner-age"), `The data is ${age} old.${ended}`);
}

// The coordinator's clock now; it stands still while nobody answers, for then nothing is known, and in a report.
function serverNow() {
  const now = model.state?.now;
  if (!isNumber(now) || !source.live) return isNumber(now) ? now : null;
  const until = link.isLost ? link.lostAt : performance.now();
  return now + Math.max(0, until - link.receivedAt) / 1000;
}

const shownNow = () => (page.at === null ? serverNow() : (replay.state?.at ?? page.at));

function draw() {
  if (draw.timer) return;
  const wait = Math.max(0, DRAW_EVERY - (performance.now() - (draw.last ?? -DRAW_EVERY)));
  draw.timer = setTimeout(() => requestAnimationFrame(drawNow), wait);
}

function drawNow() {
  clearTimeout(draw.timer);
  draw.timer = null;
  draw.last = performance.now();
  const state = page.state();
  if (!state) return;
  chart.show(page.at);
  traffic.show(page.at);
  showEvaluations(page.at === null ? asked.rows : asked.rows.filter((row) => row.time <= page.at));
  showState(state, chart.latest, page, !view);
  view?.shown?.show(state);
  showTimes(state, shownNow());
  document.title = title(state, view && (view.root?.querySelector("h1, h2")?.textContent || view.title), page.at);
}

function open({ name, params, at }, isFirst) {
  const isMoved = at !== page.at;
  page.at = at;
  replay.set(at);
  const wanted = [name, ...params].join("/");
  clearTimeout(open.timer);
  if (wanted !== (view?.wanted ?? "")) openView(name, params, wanted, !isFirst);
  else if (view && isMoved) open.timer = setTimeout(() => openView(name, params, wanted, false), REOPEN);
  for (const item of document.querySelectorAll("nav a")) {
    const isHere = item.getAttribute("href") === `#/${name}`;
    if (isHere) attribute(item, "aria-current", "page");
    else item.removeAttribute("aria-current");
  }
  draw();
}

// A view is made for one moment; at another one it is made anew, once the slider rests.
async function openView(name, params, wanted, isFocused) {
  view?.shown?.unmount();
  const isAgain = view?.wanted === wanted;
  $("view").style.minHeight = isAgain ? `${$("view").offsetHeight}px` : "";
  $("home").hidden = name !== "";
  $("view").hidden = name === "";
  $("view").replaceChildren();
  if (name === "") {
    view = null;
    if (isFocused) focusOn($("main").querySelector("h2"));
    chart.refresh();
    return;
  }
  const mine = (view = { wanted, title: name });
  const root = el("div", "view");
  $("view").replaceChildren(root);
  try {
    if (!Object.hasOwn(VIEWS, name)) throw new Error("The address is not one of this page's");
    const [called, load] = VIEWS[name];
    mine.title = called;
    mine.root = root;
    const module = await load();
    if (view !== mine) return;
    mine.shown = module.mount(root, params, page);
    if (page.state()) mine.shown.show(page.state());
  } catch (error) {
    if (view !== mine) return;
    const back = el("a", "", "the first screen");
    back.href = "#/";
    root.replaceChildren(el("h2", "", "Nothing to see here"), el("p", "", `${error.message}. Go back to `, back, "."));
  }
  draw();
  if (isFocused) focusOn(root.querySelector("h1, h2") ?? root);
}

function focusOn(heading) {
  heading.tabIndex = -1;
  heading.focus({ preventScroll: true });
  scrollTo(0, 0);
}

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  focusOn($("main"));
});

const router = route(open);
linkNumbers(source);

setInterval(() => {
  if (model.state && !link.isLost && page.at === null) showTimes(page.state(), serverNow());
  showAge();
}, 1000);

start();
