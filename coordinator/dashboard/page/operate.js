// The operator's panel. Every action is asked for twice: first what it would do, then to do it.

import { attribute, el, list, text } from "./dom.js";
import { isNumber, whole, words } from "./format.js";
import { card, problem, shortId, viewHead } from "./detail.js";

const KEPT = "potluck operator's token";
const RUN = [
  ["pause", "Pause", "Let the step finish, then stand still"],
  ["resume", "Resume", "Go on where the run stands"],
  ["checkpoint", "Checkpoint now", "Write the model down after the next round"],
];
const PEER = [
  ["drain", "Drain", "Hand its stage over, then let it go"],
  ["ban", "Ban", "Send it away; it may not come back"],
  ["unban", "Unban", "It may come back"],
];
const TITLES = Object.fromEntries([...RUN, ...PEER].map(([name, title]) => [name, title]));

export function mount(root, params, page) {
  const head = viewHead("Operate", "Needs the operator's token: on the coordinator's machine, potluck coordinator token shows it.");
  root.append(head.node);
  if (page.at !== null || page.source.live === false) {
    const why = page.at === null ? "This is a report: there is no run behind it." : "This is a moment of the past: it cannot be changed.";
    root.append(card("Nothing to operate", el("p", "empty", `${why} Open the live page to operate the run.`)).node);
    return { show() {}, unmount() {} };
  }
  const panel = new Panel(root, page, params[0]);
  panel.show(page.state?.());
  return { show: (state) => panel.show(state), unmount: () => (panel.isOver = true) };
}

class Panel {
  constructor(root, page, chosen) {
    this.page = page;
    this.isOver = false;
    this.asked = null;
    const [access, run, peers] = [card("Token"), card("Run"), card("Peer")];
    this.run = run;
    access.node.append(this.tokenField());
    run.node.append(el("div", "actions", ...RUN.map((one) => this.button(one))));
    this.peer = el("select");
    this.peer.id = "operate-peer";
    this.other = el("input");
    Object.assign(this.other, { id: "operate-other", type: "text", autocomplete: "off", spellcheck: false, maxLength: 128 });
    this.chosen = chosen ?? "";
    this.peer.addEventListener("change", () => {
      this.chosen = this.peer.value;
      this.other.value = "";
    });
    this.other.addEventListener("input", () => (this.peer.value = this.chosen = ""));
    peers.node.append(el("div", "fields", field(this.peer, "Who"), field(this.other, "or name or id of one that is not here")), el("div", "actions", ...PEER.map((one) => this.button(one))));
    this.answer = card("");
    this.answer.node.tabIndex = -1;
    this.answer.node.hidden = true;
    this.answer.node.classList.add("answer");
    this.answer.node.addEventListener("keydown", (event) => event.key === "Escape" && this.cancel());
    this.told = el("p", "told");
    this.told.setAttribute("role", "status");
    root.append(access.node, el("div", "pair even", run.node, peers.node), this.answer.node, this.told);
  }

  tokenField() {
    this.token = el("input");
    Object.assign(this.token, { id: "operate-token", type: "password", autocomplete: "off", spellcheck: false });
    this.keep = el("input");
    Object.assign(this.keep, { id: "operate-keep", type: "checkbox" });
    const kept = remembered();
    this.token.value = kept ?? "";
    this.keep.checked = kept !== null;
    for (const [node, event] of [[this.token, "input"], [this.keep, "change"]]) node.addEventListener(event, () => remember(this.keep.checked ? this.token.value : null));
    const label = el("label", "tick", this.keep, " keep it until this tab is closed");
    return el("div", "fields", field(this.token, "Operator's token"), label);
  }

  button([name, title, about]) {
    const button = el("button", "action", el("b", "", title), el("small", "", about));
    button.type = "button";
    button.dataset.action = name;
    button.addEventListener("click", () => this.preview(name, button));
    return button;
  }

  show(state) {
    if (!state) return;
    text(this.run.note, state.is_paused ? "paused now" : words(state.phase));
    const peers = [{ id: "", name: "choose one" }, ...(state.peers ?? [])];
    list(this.peer, peers, (peer) => peer.id, () => el("option"), (node, peer) => {
      node.value = peer.id;
      text(node, peer.id ? `${words(peer.name)} · ${shortId(peer.id)} · ${isNumber(peer.stage) ? `stage ${whole(peer.stage)}` : "no stage"} · ${words(peer.state)}` : peer.name);
    });
    if (this.peer.value !== this.chosen) this.peer.value = this.chosen;
  }

  async preview(name, button) {
    const peer = this.other.value.trim() || this.peer.value;
    if (PEER.some(([other]) => other === name) && !peer) return this.refuse({ message: `Whom to ${name}?`, hint: "Choose a peer first, or write the name or id of one." }, this.peer);
    if (!this.token.value) return this.refuse({ message: "The operator's token is missing.", hint: "Paste it into the field above." }, this.token);
    const body = peer && PEER.some(([other]) => other === name) ? { peer } : {};
    const answer = await this.act(name, body, true, button);
    if (answer) this.confirm(name, body, answer, button);
  }

  confirm(name, body, answer, button) {
    const node = this.answer.node;
    text(this.told, "");
    text(this.answer.heading, `${TITLES[name]}${body.peer ? ` ${this.nameOf(body.peer)}` : ""}?`);
    const why = el("input");
    Object.assign(why, { id: "operate-why", type: "text", maxLength: 200, autocomplete: "off" });
    this.who ??= Object.assign(el("input"), { id: "operate-who", type: "text", maxLength: 40, autocomplete: "off" });
    const force = Object.assign(el("input"), { type: "checkbox", required: true });
    const yes = el("button", "primary", TITLES[name]);
    const no = el("button", "plain", "Cancel");
    no.type = "button";
    no.addEventListener("click", () => this.cancel());
    const form = el("form", "fields", field(why, "Why, for all to read"), field(this.who, "Your name, for all to read"));
    if (answer.needs_force) form.append(el("label", "tick", force, " do it all the same"));
    form.append(el("div", "buttons", yes, no));
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const said = { why: why.value.trim(), who: this.who.value.trim(), force: force.checked };
      const given = Object.fromEntries(Object.entries(said).filter(([, value]) => value));
      const done = await this.act(name, { ...body, ...given }, false, yes);
      if (!done) return;
      this.cancel();
      text(this.told, `${done.done ? "Done" : "Not yet"}: ${words(done.text)}`);
    });
    while (node.children.length > 1) node.lastChild.remove();
    node.append(el("p", "would peer-text", sentence(words(answer.text))), form);
    node.hidden = false;
    this.asked = button;
    why.focus();
    node.scrollIntoView({ block: "nearest" });
  }

  cancel() {
    this.answer.node.hidden = true;
    this.asked?.focus();
  }

  nameOf(id) {
    const peer = this.page.state?.()?.peers?.find((one) => one.id === id);
    return peer?.name || shortId(id);
  }

  // The answer, or null when it was refused and that has been told.
  async act(name, body, isPreview, button) {
    button.disabled = true;
    try {
      return await send(this.page.source, name, body, this.token.value, isPreview);
    } catch (error) {
      if (!this.isOver) this.refuse(error, error.status === 401 ? this.token : null);
      return null;
    } finally {
      button.disabled = false;
    }
  }

  refuse(error, focus) {
    this.told.replaceChildren(problem(error));
    focus?.focus();
    attribute(this.token, "aria-invalid", String(focus === this.token));
  }
}

const sentence = (words) => `${words.charAt(0).toUpperCase()}${words.slice(1)}${/[.!?]$/.test(words) ? "" : "."}`;

async function send(source, name, body, token, isPreview) {
  if (source.act) return source.act(name, body, token, isPreview);
  const response = await fetch(source.url(`api/actions/${name}${isPreview ? "?preview=1" : ""}`), {
    method: "POST",
    headers: { Authorization: `Bearer ${token}`, "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw Object.assign(new Error(answer.error ?? `The coordinator answered ${response.status}`), { hint: answer.hint, status: response.status });
  return answer;
}

function field(input, label) {
  const node = el("label", "", label);
  node.htmlFor = input.id;
  return el("div", "field", node, input);
}

// Browsers that keep nothing for this page are as good as an unticked box.
function remembered() {
  try {
    return sessionStorage.getItem(KEPT);
  } catch {
    return null;
  }
}

function remember(token) {
  try {
    if (token === null) sessionStorage.removeItem(KEPT);
    else sessionStorage.setItem(KEPT, token);
  } catch {
    // Then it is kept in the field only.
  }
}
