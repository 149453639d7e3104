// The page at a moment of the past: a banner that says which, a slider over the run, and steps from incident to incident.

import { $, attribute, text } from "./dom.js";
import { clock, elapsed, whole, words } from "./format.js";

const EVERY = 125; // milliseconds between two questions while the slider moves
const SETTLED = 400; // then the address names the moment
const POSITIONS = 1000;

export class Replay {
  // `move(at, isPassing)` shows a moment and `settle()` writes it into the address; `span()` is [start, end] of the run
  // and `incidents.around(at)` finds its neighbours.
  constructor({ source, move, settle, span, incidents, shown }) {
    Object.assign(this, { source, move, settle, span, incidents, shown });
    this.at = null;
    this.state = null;
    this.slider = $("replay-slider");
    $("replay-open").addEventListener("click", () => this.open());
    $("replay-close").addEventListener("click", () => this.move(null));
    $("replay-before").addEventListener("click", () => this.hop("before"));
    $("replay-after").addEventListener("click", () => this.hop("after"));
    this.slider.addEventListener("input", () => this.drag());
    document.addEventListener("keydown", (event) => this.key(event));
  }

  open() {
    this.move(this.span()[1]);
    this.slider.focus();
  }

  // The address says which moment; null is now.
  set(at) {
    if (at === this.at) return;
    this.at = at;
    document.body.classList.toggle("past", at !== null);
    $("replay").hidden = at === null;
    $("replay-open").hidden = at !== null;
    if (at === null) {
      this.state = null;
      this.note = "";
      this.shown();
    } else {
      this.tell();
      this.ask();
    }
  }

  // One question at a time and not more than eight a second; the last moment wanted is always asked for.
  async ask() {
    if (this.isAsking || this.at === null) return;
    this.isAsking = true;
    const at = this.at;
    const started = performance.now();
    try {
      const state = await this.source.get(`api/state?at=${at}`);
      if (this.at !== null) this.state = state;
      this.note = "";
    } catch (error) {
      this.note = error.message;
    }
    if (this.at !== null) {
      this.tell();
      this.shown();
    }
    setTimeout(() => {
      this.isAsking = false;
      if (this.at !== null && this.at !== at) this.ask();
    }, Math.max(0, EVERY - (performance.now() - started)));
  }

  drag() {
    const [start, end] = this.span();
    this.move(start + (Number(this.slider.value) / POSITIONS) * (end - start), true);
    clearTimeout(this.settling);
    this.settling = setTimeout(() => this.settle(), SETTLED);
  }

  hop(side) {
    const from = this.at ?? this.span()[1] + 1;
    const found = this.incidents.around(from)[side];
    if (found) this.move(found.time);
  }

  key(event) {
    const isTyping = event.target.closest?.("input:not([type='range']):not([type='radio']), textarea, select");
    if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === ",") this.hop("before");
    if (event.key === "." && this.at !== null) this.hop("after");
    if (event.key === "Escape" && this.at !== null && event.target.closest?.(".replay")) this.move(null);
  }

  tell() {
    if (this.at === null) return;
    const [start, end] = this.span();
    const { now, before, after } = this.incidents.around(this.at);
    const step = this.state?.step ?? now?.step;
    const since = now ? this.at - now.time : 0;
    const what = now ? `${since < 2 ? ": " : `, ${elapsed(since)} after: `}${words(now.text)}` : "";
    text($("replay-when"), `${day(this.at)}${clock(this.at)}`);
    text($("replay-what"), `, step ${whole(step)}${what}`);
    text($("replay-note"), this.note ?? "");
    $("replay-note").hidden = !this.note;
    $("replay-before").disabled = !before;
    $("replay-after").disabled = !after;
    const place = String(Math.round(((this.at - start) / Math.max(1e-9, end - start)) * POSITIONS));
    if (document.activeElement !== this.slider || this.slider.value !== place) this.slider.value = place;
    attribute(this.slider, "aria-valuetext", `${clock(this.at)}, step ${whole(step)}`);
    text($("replay-start"), clock(start));
    text($("replay-end"), clock(end));
  }
}

// The date too, unless it is today's.
function day(at) {
  const date = new Date(at * 1000);
  return date.toDateString() === new Date().toDateString() ? "" : `${date.toLocaleDateString("en-GB", { day: "numeric", month: "short" })}, `;
}
