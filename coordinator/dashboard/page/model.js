// What the coordinator has said so far, put together: parts of the state, peers, events, and how far the stream is.

import { isNumber } from "./format.js";

const EVENTS = 40;
const numbered = (stage) => (isNumber(stage) ? stage : Infinity);

export class Model {
  constructor() {
    this.clear();
  }

  clear() {
    this.parts = null;
    this.peers = new Map();
    this.events = [];
    this.lastPoint = -1;
    this.lastEvent = -1;
    this.whole = null;
  }

  // The whole of api/state.
  start({ peers, events, ...parts }) {
    this.parts = parts;
    this.peers = new Map((peers ?? []).map((peer) => [peer.id, peer]));
    this.takeEvents(events ?? []);
    this.whole = null;
  }

  takeState(parts) {
    this.parts = { ...this.parts, ...parts };
    this.whole = null;
  }

  // `all`: these are all, as at the beginning of a line.
  takePeers({ rows = [], gone = [], all = false }) {
    const before = this.peers;
    if (all) this.peers = new Map();
    for (const peer of rows) {
      const known = before.get(peer.id);
      // A row that says the same stays the same object, so that nobody writes it again.
      this.peers.set(peer.id, known && JSON.stringify(known) === JSON.stringify(peer) ? known : peer);
    }
    for (const id of gone) this.peers.delete(id);
    this.whole = null;
  }

  // Those that are new, in order.
  takeEvents(events) {
    const known = new Set(this.events.map((event) => event.id));
    const fresh = events.filter((event) => !known.has(event.id)).sort((a, b) => a.id - b.id);
    if (!fresh.length) return [];
    this.events = [...fresh.toReversed(), ...this.events].sort((a, b) => b.id - a.id).slice(0, EVENTS);
    this.lastEvent = Math.max(this.lastEvent, fresh.at(-1).id);
    this.whole = null;
    return fresh;
  }

  takePoints(points) {
    const fresh = points.filter((point) => point.id > this.lastPoint);
    for (const point of fresh) if (point.id > this.lastPoint) this.lastPoint = point.id;
    return fresh;
  }

  // What the stream goes on behind.
  get place() {
    if (this.lastPoint < 0 && this.lastEvent < 0) return null;
    return `${Math.max(0, this.lastPoint)}.${Math.max(0, this.lastEvent)}`;
  }

  get state() {
    if (!this.parts) return null;
    const peers = () => [...this.peers.values()].sort((a, b) => numbered(a.stage) - numbered(b.stage));
    this.whole ??= { ...this.parts, peers: peers(), events: this.events };
    return this.whole;
  }
}
