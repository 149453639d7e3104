// Mounts the view that the hash names over the answers that the test made up.

const FILES = { links: "matrix", peer: "peer", round: "round", steps: "step", step: "step", leaderboard: "leaderboard", operate: "operate" };
const { answers, live } = await (await fetch("answers.json")).json();
const main = document.getElementById("main");
window.source_answers = answers;
window.asked = [];
window.sent = [];

const source = {
  live,
  url: (path) => path,
  async get(path) {
    window.asked.push(path);
    const answer = answers[path] ?? answers[path.split("?")[0]];
    if (answer === undefined) throw Object.assign(new Error("Nothing is known of that"), { hint: "Everything is linked from /" });
    return structuredClone(answer);
  },
  subscribe: () => {},
  async act(name, body, token, preview) {
    window.sent.push({ name, body, token, preview });
    if (token !== "right") throw Object.assign(new Error("This token is not the operator's"), { hint: "It is in the run's folder", status: 401 });
    return preview ? { text: "moves 3 stages, 2.1 GB, about 4 minutes", done: false, needs_force: name === "ban" } : { text: `${name} is ordered.`, done: true };
  },
};

let shown = null;
let turn = Promise.resolve();
const next = () => (turn = turn.then(mount));

async function mount() {
  shown?.unmount?.();
  main.replaceChildren();
  const [path, query = ""] = location.hash.slice(2).split("?");
  const [name, ...params] = path.split("/").map(decodeURIComponent);
  const at = new URLSearchParams(query).get("at");
  const page = { source, at: at === null ? null : Number(at), go: (hash) => (location.hash = hash), state: () => answers["api/state"] };
  if (name === "nothing") {
    shown = null;
  } else if (!name) {
    const { showLanes } = await import("/static/lanes.js");
    const card = document.createElement("section");
    card.className = "card";
    const root = document.createElement("div");
    const heading = document.createElement("h2");
    heading.textContent = "Pipeline";
    card.append(heading, root);
    main.append(card);
    showLanes(root, answers["api/state"], page);
    shown = { show: (state) => showLanes(root, state, page) };
  } else {
    const view = await import(`/static/${FILES[name]}.js`);
    shown = view.mount(main, params, page);
    shown.show(answers["api/state"]);
  }
  window.view = shown;
  document.body.dataset.shown = location.hash;
}
addEventListener("hashchange", next);
await next();
