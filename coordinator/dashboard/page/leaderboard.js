// Who gave how much: committed work, by the names that people chose.

import { el, text } from "./dom.js";
import { count, percent, plural, whole } from "./format.js";
import { asking, barCell, card, downloads, linkCell, place, shortId, stamp, table, viewHead } from "./detail.js";

export function mount(root, params, page) {
  const head = viewHead("Leaderboard", "Only committed work counts: a whole sample is 1, shared among the stages that trained it. Leaving in good order never costs any.");
  head.side.append(downloads(page, "api/leaderboard.csv"));
  const body = card("");
  const empty = el("p", "empty");
  body.node.append(empty);
  root.append(head.node, body.node);
  const shown = { rows: null, hasRegions: null, most: 1 };

  function lay(hasRegions) {
    shown.rows?.node.remove();
    shown.hasRegions = hasRegions;
    const number = (title, value, says) => ({ title, n: true, value, text: (one) => says(value(one)) });
    const columns = [
      { title: "Name", value: (one) => one.name, fill: (cell, one) => linkCell(cell, place(page, `peer/${encodeURIComponent(one.peer)}`), one.name || shortId(one.peer)) },
      number("Rank", (one) => one.rank, whole),
      { title: "Share", value: (one) => one.share, fill: (cell, one) => barCell(cell, one.share / shown.most, one.share > 0 && one.share < 0.095 ? `${(one.share * 100).toFixed(1)} %` : percent(one.share), "compute") },
      number("Work, whole samples", (one) => one.work, count),
      number("Tokens", (one) => one.tokens, count),
      number("Rounds", (one) => one.rounds, whole),
      ...(hasRegions ? [{ title: "Region, as they say", value: (one) => one.region ?? "", text: (one) => (one.region ? String(one.region) : "") }] : []),
      { title: "Now", value: (one) => (one.is_here ? 0 : 1), text: (one) => (one.is_here ? "here" : "not here") },
      { title: "Since", n: true, value: (one) => one.first_seen, text: (one) => stamp(one.first_seen) },
    ];
    shown.rows = table("Leaderboard", columns, { key: (one) => one.peer, sort: 1 });
    shown.rows.node.classList.add("standings");
    body.node.append(shown.rows.node);
  }

  function draw(standings) {
    const hasRegions = standings.some((one) => one.region);
    if (shown.hasRegions !== hasRegions) lay(hasRegions);
    empty.hidden = standings.length > 0;
    text(empty, "No work has been committed yet. The first round writes the first line.");
    shown.rows.node.hidden = !standings.length;
    shown.most = Math.max(...standings.map((one) => one.share), 1e-9);
    text(body.heading, standings.length ? plural(standings.length, "peer") : "");
    const work = standings.reduce((sum, one) => sum + one.work, 0);
    text(body.note, standings.length ? `${count(work)} whole samples committed${page.at === null ? "" : ", as of now"}` : "");
    shown.rows.show(standings);
  }

  return asking(page, () => page.source.get("api/leaderboard"), draw, head.trouble);
}
