// The few things done to the document. Text goes in through textContent only: names come from strangers.

export const $ = (id) => document.getElementById(id);

export function el(tag, className = "", ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

const SVG = "http://www.w3.org/2000/svg";

// A drawing of one path in a box of 12 by 12.
export function shape(path, className) {
  const drawing = document.createElementNS(SVG, "svg");
  drawing.setAttribute("viewBox", "0 0 12 12");
  drawing.setAttribute("class", className);
  drawing.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(SVG, "path");
  line.setAttribute("d", path);
  drawing.append(line);
  return drawing;
}

// Writes only what differs, so a selection or a screen reader is not disturbed twice a second.
export function text(node, value) {
  if (node.textContent !== value) node.textContent = value;
}

export function attribute(node, name, value) {
  if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}

const kept = new WeakMap();
const written = new WeakMap();
const isSame = (now, before) => now.length === before?.length && now.every((fact, i) => Object.is(fact, before[i]));

// Makes `parent` hold one child per item, in order, reusing the child of the same key. With `facts` (an item's list
// of all that its child shows) a child is written again only when one of them differs.
export function list(parent, items, key, make, fill, facts = null) {
  const before = kept.get(parent) ?? new Map();
  const now = new Map();
  let place = parent.firstElementChild;
  for (const item of items) {
    const name = String(key(item));
    if (now.has(name)) continue;
    const node = before.get(name) ?? make(item);
    const shown = facts?.(item);
    if (!shown || !isSame(shown, written.get(node))) fill(node, item);
    if (shown) written.set(node, shown);
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

// Links to a panel's numbers: as a table, and the API's call. In a report they save what the file holds.
export function takes(source, paths) {
  const links = Object.entries(paths).map(([label, path]) => {
    const link = el("a", "", label);
    if (source.live) link.href = source.url(path);
    else {
      link.href = `#${path}`;
      link.addEventListener("click", (event) => {
        event.preventDefault();
        const saved = el("a");
        saved.href = source.url(path);
        saved.download = path.split("?")[0].replace(/^api\//, "potluck-").replaceAll("/", "-").replace(/(\.csv)?$/, (end) => end || ".json");
        saved.click();
      });
    }
    return link;
  });
  return el("p", "takes", ...links);
}
