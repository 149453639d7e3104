// One round: who brought what into it, how long that took, and whether the replicas of each stage came out the same.

import { el, list, text } from "./dom.js";
import { bytes, isNumber, plural, whole, words } from "./format.js";
import { asking, barCell, besides, brief, card, facts, linkCell, place, SELDOM, shortId, stamp, table, viewHead } from "./detail.js";

export function mount(root, params, page) {
  const [step] = params;
  const head = viewHead(`Round after step ${words(step)}`);
  root.append(head.node);
  let body = null;
  const load = () => page.source.get(`api/rounds/${encodeURIComponent(step)}`);
  return asking(page, load, (answer) => draw(answer, (body ??= layOut(root, page)), head, page), head.trouble, SELDOM);
}

function layOut(root, page) {
  const [about, agree, parts] = [card("The round"), card("Do the replicas agree?"), card("What each replica brought")];
  const body = { facts: el("dl", "facts"), agree: el("ul", "agreement"), note: parts.note, most: { nbytes: 1, seconds: 1 } };
  about.node.append(body.facts);
  agree.node.append(body.agree);
  body.table = table("Parts of the round", [
    { title: "Replica", value: (part) => part.name, fill: (cell, part) => linkCell(cell, place(page, `peer/${encodeURIComponent(part.peer)}`), part.name || shortId(part.peer)) },
    { title: "Stage", n: true, value: (part) => part.stage, text: (part) => whole(part.stage) },
    { title: "Samples", n: true, value: (part) => part.samples, text: (part) => whole(part.samples) },
    { title: "Took", value: (part) => part.seconds, fill: (cell, part) => barCell(cell, part.seconds / body.most.seconds, brief(part.seconds)) },
    { title: "Sent", value: (part) => part.nbytes, fill: (cell, part) => barCell(cell, part.nbytes / body.most.nbytes, bytes(part.nbytes)) },
    { title: "Digest after it", value: (part) => part.digest, fill: (cell, part) => fillDigest(cell, part, body.common) },
  ], { key: (part) => `${part.stage} ${part.peer}`, sort: 1 });
  parts.node.append(body.table.node);
  root.append(el("div", "pair even", about.node, agree.node), parts.node);
  return body;
}

function draw(answer, body, head, page) {
  const { row, parts } = answer;
  text(head.heading, `Round ${whole(row.round)}, after step ${whole(row.step)}`);
  text(head.sub, `committed ${stamp(row.committed)}`);
  head.side.replaceChildren(besides(page, "round", answer.before, answer.after));
  const seconds = parts.map((part) => part.seconds).filter(isNumber);
  const slowest = parts.find((part) => part.seconds === Math.max(...seconds));
  facts(body.facts, [
    ["Replicas", whole(row.replicas)],
    ["Samples", whole(row.samples)],
    ["Sent by all", bytes(row.nbytes)],
    ["Took", brief(row.seconds)],
    ["Slowest", slowest ? `${slowest.name || shortId(slowest.peer)}, ${brief(slowest.seconds)}` : null],
    ["Complete", row.degraded ? verdict(false, "degraded: somebody was missing") : verdict(true, "nobody was missing")],
  ]);
  body.most = { nbytes: Math.max(1, ...parts.map((part) => part.nbytes)), seconds: Math.max(1e-9, ...seconds) };
  const stages = new Map();
  for (const part of parts) stages.set(part.stage, [...(stages.get(part.stage) ?? []), part]);
  body.common = new Map([...stages].map(([stage, all]) => [stage, common(all)]));
  showAgreement(body.agree, row, stages, body.common);
  text(body.note, plural(parts.length, "replica"));
  body.table.show(parts);
}

// The digest that most replicas of a stage have.
function common(parts) {
  const counts = new Map();
  for (const { digest } of parts) counts.set(digest, (counts.get(digest) ?? 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1])[0]?.[0];
}

function showAgreement(root, row, stages, most) {
  const lines = [...stages].sort((a, b) => a[0] - b[0]);
  list(root, lines, ([stage]) => stage, () => el("li", "", el("b"), el("span"), el("code")), (node, [stage, parts]) => {
    const kinds = new Set(parts.map((part) => part.digest));
    const isOne = kinds.size === 1;
    text(node.children[0], `Stage ${whole(stage)}`);
    node.children[1].className = isOne ? "verdict" : "verdict bad";
    const same = parts.length === 1 ? "one replica, nothing to compare" : `${parts.length === 2 ? "both" : `all ${parts.length}`} replicas are the same`;
    text(node.children[1], isOne ? same : `${kinds.size} different results among ${parts.length} replicas`);
    text(node.children[2], isOne ? words(most.get(stage)) : "");
  });
  if (!lines.length) root.replaceChildren(el("li", "", row.agree ? verdict(true, "the coordinator says so; no digests are on record") : verdict(false, "they differed")));
}

const verdict = (isGood, sentence) => el("span", isGood ? "verdict" : "verdict bad", sentence);

function fillDigest(cell, part, most) {
  const isOdd = most.get(part.stage) !== part.digest;
  if (!cell.firstElementChild) cell.append(el("code"), el("span"));
  text(cell.firstChild, words(part.digest));
  cell.lastChild.className = isOdd ? "verdict bad" : "";
  text(cell.lastChild, isOdd ? "differs" : "");
}
