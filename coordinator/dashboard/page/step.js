// Steps: which were slow, and why. The words first, then the picture, then what would have helped.

import { el, list, text } from "./dom.js";
import { isNumber, percent, plural, times, whole, words } from "./format.js";
import { asking, barCell, besides, brief, card, choice, downloads, linkCell, namesOf, place, SELDOM, stamp, table, viewHead } from "./detail.js";
import { Gantt, ganttLegend } from "./gantt.js";

const LISTED = 100;
const SLOW = 1.25; // times the usual from which on a step is called slow

export function mount(root, params, page) {
  const [step] = params;
  return step === undefined ? mountList(root, page) : mountStep(root, step, page);
}

function mountList(root, page) {
  const view = { order: "newest", most: 1 };
  const head = viewHead("Steps", "How long each took, beside the median of the steps around it.");
  const order = choice("Order", [["newest", "Newest"], ["slowest", "Slowest"]], view.order, (name) => {
    view.order = name;
    start();
  });
  const numbers = el("span");
  head.side.append(order.node, numbers);
  const body = card("");
  const empty = el("p", "empty");
  const rows = table("Steps", [
    { title: "Step", value: (row) => row.step, fill: (cell, row) => linkCell(cell, place(page, `step/${row.step}`), whole(row.step)) },
    { title: "Took", value: (row) => row.seconds, fill: (cell, row) => fillTook(cell, row, view.most) },
    { title: "Usual", n: true, value: (row) => row.usual, text: (row) => brief(row.usual) },
    { title: "Of the usual", n: true, value: (row) => row.seconds / row.usual, text: (row) => (row.usual > 0 ? (row.seconds > SLOW * row.usual ? `${times(row.seconds / row.usual)} slow` : times(row.seconds / row.usual)) : words(null)) },
    { title: "When", n: true, value: (row) => row.time, text: (row) => stamp(row.time) },
  ], { key: (row) => row.step });
  body.node.append(empty, rows.node);
  rows.node.hidden = true;
  rows.node.classList.add("steps");
  root.append(head.node, body.node);
  let asked = null;
  function start() {
    asked?.unmount();
    numbers.replaceChildren(downloads(page, `api/steps.csv?limit=${LISTED}&order=${view.order}`));
    const load = () => page.source.get(`api/steps?limit=${LISTED}&order=${view.order}`);
    asked = asking(page, load, draw, head.trouble);
  }
  function draw(all) {
    const steps = page.at === null ? all : all.filter((row) => row.time <= page.at);
    rows.node.hidden = !steps.length;
    empty.hidden = steps.length > 0;
    text(empty, "No step has been traced yet. Workers send their traces at the end of each step.");
    text(body.heading, steps.length ? `${view.order === "newest" ? "The newest" : "The slowest"} ${whole(steps.length)}` : "");
    view.most = Math.max(...steps.map((row) => row.seconds), 1e-9);
    rows.order(view.order === "newest" ? 0 : 1);
    rows.show(steps);
  }
  start();
  return { show: (state) => asked.show(state), unmount: () => asked.unmount() };
}

// A bar, with a mark where the usual is.
function fillTook(cell, row, most) {
  barCell(cell, row.seconds / most, brief(row.seconds), row.seconds > SLOW * row.usual ? "wait" : "compute");
  const bar = cell.firstChild;
  if (!bar.children[1]) bar.append(el("u"));
  bar.children[1].hidden = !(row.usual > 0);
  bar.children[1].style.left = `${Math.min(1, row.usual / most) * 100}%`;
}

function mountStep(root, step, page) {
  const head = viewHead(`Step ${words(step)}`);
  root.append(head.node);
  let body = null;
  const load = () => page.source.get(`api/steps/${encodeURIComponent(step)}`);
  return asking(page, load, (answer) => draw(answer, (body ??= layOut(root, page)), head, page), head.trouble, SELDOM);
}

function layOut(root, page) {
  const [why, picture, instead, pieces] = [card("Why was this step slow?"), card("The step"), card("What would have helped"), card("Its critical path")];
  const gantt = new Gantt(picture.note);
  const body = { why, words: el("ul", "why"), gantt, noTrace: el("p", "empty", "No operation of this step is on record."), bars: el("ol", "what-if"), pieces, page };
  why.node.append(body.words);
  body.legend = ganttLegend();
  picture.node.append(body.legend, body.noTrace, gantt.node);
  body.noInstead = el("p", "empty", "Nothing was tried in thought for this step.");
  instead.node.append(body.bars, body.noInstead);
  body.table = table("Critical path", [
    { title: "From", n: true, value: (one) => one.start, text: (one) => brief(one.start) },
    { title: "What", value: (one) => one.what },
    { title: "Who", value: (one) => one.who, fill: (cell, one) => linkCell(cell, place(page, `peer/${encodeURIComponent(one.peer)}`), one.who) },
    { title: "Waited for by", value: (one) => one.to, text: (one) => one.to },
    { title: "Microbatch", n: true, value: (one) => one.microbatch, text: (one) => (isNumber(one.microbatch) ? whole(one.microbatch) : "") },
    { title: "Lasted", value: (one) => one.end - one.start, fill: (cell, one) => barCell(cell, (one.end - one.start) / body.longest, `${brief(one.end - one.start)}, ${percent((one.end - one.start) / body.all)}`, one.what) },
  ], { key: (one) => one.key });
  body.noPath = el("p", "empty", "No critical path could be found.");
  pieces.node.append(body.table.node, body.noPath);
  root.append(why.node, picture.node, el("div", "pair even", pieces.node, instead.node));
  return body;
}

function draw(answer, body, head, page) {
  const { row, path, lanes, counterfactuals } = answer;
  const known = namesOf(page.state?.());
  const own = new Map(lanes.map((lane) => [lane.peer, lane.name]));
  const nameOf = (id) => own.get(id) || known(id);
  const isSlow = row.seconds > SLOW * row.usual;
  text(head.heading, `Step ${whole(row.step)}: ${brief(row.seconds)}`);
  text(head.sub, `${stamp(row.time)} · usual around it: ${brief(row.usual)}${row.usual > 0 ? `, so ${times(row.seconds / row.usual)}` : ""}`);
  head.side.replaceChildren(besides(page, "step", answer.before, answer.after));
  text(body.why.heading, isSlow ? "Why was this step slow?" : "Where did this step's time go?");
  const sentences = answer.words.length ? answer.words : ["There is no trace of this step, so nobody can say."];
  list(body.words, sentences.map((sentence, i) => ({ sentence, i })), ({ i }) => i, () => el("li", "peer-text"), (node, { sentence }) => text(node, sentence));
  body.noTrace.hidden = lanes.length > 0;
  body.legend.hidden = body.gantt.node.hidden = !lanes.length;
  if (lanes.length) body.gantt.show({ lanes, path, seconds: row.seconds, nameOf, page });
  body.longest = Math.max(...path.map((one) => one.end - one.start), 1e-9);
  body.all = row.seconds || 1;
  body.table.node.hidden = !path.length;
  body.noPath.hidden = path.length > 0;
  text(body.pieces.note, path.length ? plural(path.length, "piece") : "");
  body.table.show(path.map((one, key) => ({ ...one, key, who: nameOf(one.peer), to: one.receiver ? nameOf(one.receiver) : "" })));
  showInstead(body, row, counterfactuals);
}

function showInstead(body, row, counterfactuals) {
  const sorted = [...counterfactuals].filter((one) => isNumber(one.seconds)).sort((a, b) => a.seconds - b.seconds);
  body.noInstead.hidden = sorted.length > 0;
  body.bars.hidden = !sorted.length;
  const lines = [{ text: "as it was", seconds: row.seconds, className: "real" }, ...sorted.map((one) => ({ ...one, className: "instead" })), { text: "usual around it", seconds: row.usual, className: "usual" }];
  const most = Math.max(...lines.map((line) => line.seconds), 1e-9);
  list(body.bars, lines.map((line, i) => ({ ...line, i })), ({ i }) => i, () => el("li", "", el("span", "peer-text"), el("b"), el("span", "bar", el("i")), el("small")), (node, line) => {
    const gain = row.seconds - line.seconds;
    node.className = line.className;
    text(node.children[0], words(line.text));
    text(node.children[1], brief(line.seconds));
    node.children[2].firstChild.style.width = `${(line.seconds / most) * 100}%`;
    text(node.children[3], line.className !== "instead" ? "" : gain > 0.005 * row.seconds ? `${brief(gain)} less, ${percent(gain / row.seconds)}` : "no difference");
  });
}
