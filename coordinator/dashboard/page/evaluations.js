// What published models scored: one line for each step and suite, with its tasks to unfold.

import { $, attribute, el, list, text } from "./dom.js";
import { clock, isNumber, loss, NONE, whole, words } from "./format.js";

const figure = (value) => loss(value).replace(/^-0\.000$/, "0.000").replace("-", "−");
const interval = (score) => (isNumber(score?.low) && isNumber(score?.high) ? `${figure(score.low)} … ${figure(score.high)}` : NONE);
const COLUMNS = [["Task"], ["Score", "n"], ["95 % interval", "n"], ["Metric"], ["Rows", "n"], ["Majority", "n"], ["TF-IDF", "n"]];

export function showEvaluations(rows) {
  $("evaluations-card").hidden = !rows.length;
  $("key-evaluated").hidden = !rows.length;
  const steps = new Set(rows.map((row) => row.step)).size;
  text($("evaluations-note"), `${steps === 1 ? "one published model" : `${whole(steps)} published models`}, 95 % intervals`);
  list($("evaluations"), rows, (row) => `${row.step} ${row.suite}`, make, fill, (row) => [row]);
}

function make() {
  const what = el("span", "what", el("span", "peer-text"), el("small", "peer-text"));
  const summary = el("summary", "", el("span", "step"), what, el("b", "n"), el("span", "n interval"));
  const titles = COLUMNS.map(([title, side]) => {
    const cell = el("th", side ?? "", title);
    cell.scope = "col";
    return cell;
  });
  const table = el("table", "", el("thead", "", el("tr", "", ...titles)), el("tbody"));
  const scroll = el("div", "scroll", table);
  attribute(scroll, "tabindex", "0");
  attribute(scroll, "role", "region");
  const note = el("p", "muted peer-text");
  return el("details", "evaluation", summary, scroll, note);
}

function fill(node, row) {
  const [summary, scroll, note] = node.children;
  const [step, what, score, range] = summary.children;
  text(step, `step ${whole(row.step)}`);
  text(what.children[0], words(row.suite));
  text(what.children[1], row.label ? String(row.label) : "no task has a score");
  text(score, figure(row.score?.value));
  text(range, interval(row.score));
  attribute(scroll, "aria-label", `Tasks of ${words(row.suite)}, step ${whole(row.step)}`);
  const reasons = new Map();
  for (const task of row.tasks ?? []) {
    if (task.skipped) reasons.set(task.skipped, [...(reasons.get(task.skipped) ?? []), words(task.name)]);
  }
  const skipped = [...reasons].map(([why, names]) => `Skipped ${names.join(", ")}: ${why}.`);
  text(note, [`Recorded at ${clock(row.time)}.`, ...skipped].join(" "));
  list(scroll.firstChild.lastChild, row.tasks ?? [], (task) => `${task.name} ${task.metric}`, makeTask, fillTask);
}

function makeTask() {
  const name = el("th", "peer-text");
  name.scope = "row";
  return el("tr", "", name, ...COLUMNS.slice(1).map(([, side]) => el("td", side ?? "")));
}

function fillTask(node, task) {
  const [name, score, range, metric, rows, majority, tfidf] = node.children;
  text(name, words(task.name));
  text(metric, `${words(task.metric)}${task.lower_is_better ? " (lower is better)" : ""}`);
  text(score, task.score ? figure(task.score.value) : "skipped");
  text(range, interval(task.score));
  text(rows, whole(task.score?.n));
  text(majority, figure(task.majority));
  text(tfidf, figure(task.tfidf));
}
