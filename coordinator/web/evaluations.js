// What published models scored: one line for each step and suite, with its tasks to unfold.

import { $, attribute, el, list, text } from "./dom.js";
import { clock, isNumber, loss, NONE, whole, words } from "./format.js";

const interval = (score) => (isNumber(score?.low) && isNumber(score?.high) ? `${loss(score.low)} … ${loss(score.high)}` : NONE);
const COLUMNS = [["Task"], ["Metric"], ["Score", "n"], ["95 % interval", "n"], ["Rows", "n"], ["Majority", "n"], ["TF-IDF", "n"]];

export function showEvaluations(rows) {
  $("evaluations-card").hidden = !rows.length;
  $("key-evaluated").hidden = !rows.length;
  const steps = new Set(rows.map((row) => row.step)).size;
  text($("evaluations-note"), `${steps === 1 ? "one published model" : `${whole(steps)} published models`}, 95 % intervals`);
  list($("evaluations"), rows, (row) => `${row.step} ${row.suite}`, make, fill);
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
  const note = el("p", "muted");
  return el("details", "evaluation", summary, scroll, note);
}

function fill(node, row) {
  const [summary, scroll, note] = node.children;
  const [step, what, score, range] = summary.children;
  text(step, `step ${whole(row.step)}`);
  text(what.children[0], words(row.suite));
  text(what.children[1], row.label ? String(row.label) : "no task has a score");
  text(score, loss(row.score?.value));
  text(range, interval(row.score));
  attribute(scroll, "aria-label", `Tasks of ${words(row.suite)}, step ${whole(row.step)}`);
  text(note, `Recorded at ${clock(row.time)}`);
  list(scroll.firstChild.lastChild, row.tasks ?? [], (task) => `${task.name} ${task.metric}`, makeTask, fillTask);
}

function makeTask() {
  const name = el("th", "peer-text");
  name.scope = "row";
  return el("tr", "", name, ...COLUMNS.slice(1).map(([, side]) => el("td", side ?? "")));
}

function fillTask(node, task) {
  const [name, metric, score, range, rows, majority, tfidf] = node.children;
  text(name, words(task.name));
  text(metric, `${words(task.metric)}${task.lower_is_better ? " (lower is better)" : ""}`);
  text(score, task.score ? loss(task.score.value) : "skipped");
  attribute(node, "title", task.skipped ? String(task.skipped) : "");
  text(range, interval(task.score));
  text(rows, whole(task.score?.n));
  text(majority, loss(task.majority));
  text(tfidf, loss(task.tfidf));
}
