// The few things done to the document. Text goes in through textContent only: names come from strangers.

export const $ = (id) => document.getElementById(id);

export function el(tag, className = "", ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

// Writes only what differs, so a selection or a screen reader is not disturbed twice a second.
export function text(node, value) {
  if (node.textContent !== value) node.textContent = value;
}

export function attribute(node, name, value) {
  if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}

const kept = new WeakMap();

// Makes `parent` hold one child per item, in order, reusing the child of the same key.
export function list(parent, items, key, make, fill) {
  const before = kept.get(parent) ?? new Map();
  const now = new Map();
  let place = parent.firstElementChild;
  for (const item of items) {
    const name = String(key(item));
    if (now.has(name)) continue;
    const node = before.get(name) ?? make(item);
    fill(node, item);
    now.set(name, node);
    if (node === place) place = place.nextElementSibling;
    else parent.insertBefore(node, place);
  }
  for (const [name, node] of before) if (!now.has(name)) node.remove();
  kept.set(parent, now);
}

// Shows the panel's content, or the sentence that says why there is none.
export function emptyOr(id, isEmpty, contents) {
  $(`${id}-empty`).hidden = !isEmpty;
  for (const name of contents) $(name).hidden = isEmpty;
}
