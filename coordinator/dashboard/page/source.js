// Where every number comes from: a coordinator, asked and listened to; or the data inside a report's one file.

// The coordinator pings every 10 s; a line that stays silent much longer is dead even if it looks open.
const SILENCE = 25_000;
const REOPEN = 2_000;
const KINDS = ["state", "peers", "points", "events", "ping"];

export const source = document.getElementById("potluck-data") ? embedded() : coordinator();

function coordinator() {
  const url = (path) => path.replace(/^\/+/, "");

  async function get(path) {
    const answer = await fetch(url(path));
    const said = await answer.json().catch(() => null);
    if (!answer.ok) throw new Error(said?.error ? [said.error, said.hint].filter(Boolean).join(". ") : `The coordinator answered ${answer.status}`);
    return said;
  }

  // Calls `hear(kind, data)` with what the coordinator sends, and with "lost"; reopens until it answers.
  // `after()` is what to resume behind, "POINT.EVENT".
  function subscribe(hear, after = () => null) {
    let stream = null;
    let heardAt = 0;
    const connect = () => {
      stream?.close();
      heardAt = performance.now();
      const resume = after();
      const mine = (stream = new EventSource(url(resume ? `api/stream?after=${resume}` : "api/stream")));
      for (const kind of KINDS) {
        mine.addEventListener(kind, (event) => {
          heardAt = performance.now();
          hear(kind, kind === "ping" ? null : JSON.parse(event.data));
        });
      }
      mine.addEventListener("error", () => {
        hear("lost", heardAt);
        // The browser retries a dropped line by itself, but gives up after an answer such as 502.
        if (mine.readyState === EventSource.CLOSED) setTimeout(() => stream === mine && connect(), REOPEN);
      });
    };
    const watch = setInterval(() => {
      if (performance.now() - heardAt < SILENCE) return;
      hear("lost", heardAt);
      connect();
    }, 1000);
    connect();
    return {
      reconnect: connect,
      close: () => {
        clearInterval(watch);
        stream.close();
        stream = null;
      },
    };
  }

  return { live: true, get, url, subscribe };
}

// A report holds answers by their path: {"api/state": ..., "api/state?at=1700000000": ...}.
function embedded() {
  const answers = read(document.getElementById("potluck-data").textContent).then((held) => {
    const groups = new Map();
    for (const [path, answer] of Object.entries(held)) {
      const { base, query } = split(path);
      if (!groups.has(base)) groups.set(base, []);
      groups.get(base).push({ query, answer });
    }
    return groups;
  });
  let ready = null;
  answers.then((held) => (ready = held));

  async function get(path) {
    return answer(await answers, path);
  }

  function url(path) {
    const found = answer(ready, path.replace(/\.csv(?=$|\?)/, ""));
    const isTable = /\.csv(\?|$)/.test(path);
    const [words, type] = isTable ? [table(found), "text/csv"] : [JSON.stringify(found), "application/json"];
    return URL.createObjectURL(new Blob([words], { type }));
  }

  function subscribe() {
    return { reconnect: () => {}, close: () => {} };
  }

  return { live: false, get, url, subscribe };
}

async function read(base64) {
  const packed = Uint8Array.from(atob(base64.trim()), (letter) => letter.charCodeAt(0));
  const whole = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(whole).json();
}

function split(path) {
  const [base, query = ""] = path.replace(/^[./]+/, "").split("?");
  return { base, query: new URLSearchParams(query) };
}

// The answer to the same question if the file holds it; else what it holds of that path, at the newest moment up to
// the one that is wanted, and of a list the rows that were asked for.
function answer(held, path) {
  const { base, query } = split(path);
  const known = held.get(base) ?? [];
  const same = known.find((entry) => entry.query.toString() === query.toString());
  if (same) return same.answer;
  const at = Number(query.get("at") ?? Infinity);
  const moment = (entry) => Number(entry.query.get("at") ?? (query.has("at") ? entry.answer?.now ?? Infinity : Infinity));
  const before = known.filter((entry) => moment(entry) <= at);
  const found = query.has("at")
    ? before.toSorted((a, b) => moment(a) - moment(b)).at(-1) ?? known.toSorted((a, b) => moment(a) - moment(b))[0]
    : known.find((entry) => !entry.query.has("at"));
  if (!found) throw new Error("This report does not hold that");
  return Array.isArray(found.answer) ? rows(found.answer, query) : found.answer;
}

function rows(all, query) {
  const number = (name, none) => Number(query.get(name) ?? none);
  const [until, after, before, limit] = [number("until", Infinity), number("after", -1), number("before", Infinity), number("limit", Infinity)];
  return all
    .filter((row) => !(row.time > until) && !(row.id <= after) && !(query.has("before") && row.step >= before))
    .filter((row) => !query.get("kind") || row.kind === query.get("kind"))
    .slice(0, limit);
}

function table(found) {
  const all = Array.isArray(found) ? found : [found];
  const names = [...new Set(all.flatMap((row) => Object.keys(row).filter((name) => typeof row[name] !== "object" || row[name] === null)))];
  // A spreadsheet would run a cell that starts like a formula; names come from strangers.
  const cell = (value) => {
    const words = value === null || value === undefined ? "" : String(value);
    const tame = typeof value === "string" && /^[=+\-@\t\r]/.test(words) ? `'${words}` : words;
    return /[",\n\r]/.test(tame) ? `"${tame.replaceAll('"', '""')}"` : tame;
  };
  return [names.join(","), ...all.map((row) => names.map((name) => cell(row[name])).join(","))].join("\n") + "\n";
}
