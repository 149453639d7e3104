// Addresses inside the page: "#/peer/ID?at=1700000000" is a view, its parameters, and the moment that it shows.

export function parse(hash) {
  if (!hash.startsWith("#/")) return { name: "", params: [], at: null };
  const [path, query = ""] = hash.slice(2).split("?");
  const [name, ...params] = path.split("/").map(decoded);
  const at = Number.parseFloat(new URLSearchParams(query).get("at"));
  return { name, params, at: Number.isFinite(at) && at > 0 ? at : null };
}

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

// Milliseconds, and never before what happened then.
const rounded = (at) => (at === null ? null : Math.ceil(at * 1000 - 1e-3) / 1000);

export function address(name, params, at) {
  const path = [name, ...params].map(encodeURIComponent).join("/");
  return `#/${path}${at === null ? "" : `?at=${rounded(at)}`}`;
}

// Calls `show(route, isFirst)` now and whenever the address changes. Links keep the moment that the page shows
// unless they name one.
export function route(show) {
  let now = parse(location.hash);
  const moved = () => {
    // Anything else, such as the link that skips to the numbers, is no address of ours.
    if (location.hash && !location.hash.startsWith("#/")) return;
    now = parse(location.hash);
    show(now, false);
  };
  addEventListener("hashchange", moved);
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.("a[href^='#']");
    if (!link || event.defaultPrevented || event.button || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const wanted = link.getAttribute("href");
    if (!wanted.startsWith("#/")) return;
    event.preventDefault();
    go(wanted);
  });

  function go(hash) {
    const to = parse(hash);
    const wanted = address(to.name, to.params, to.at ?? now.at);
    if (wanted !== location.hash) location.hash = wanted;
  }

  // The same view at another moment; null is now. Dragging a slider is no step worth going back to.
  function move(at, isPassing) {
    const wanted = address(now.name, now.params, at);
    now = { ...now, at: rounded(at) };
    if (!isPassing) location.hash = wanted;
    show(now, false);
    return wanted;
  }

  show(now, true);
  return { go, move, settle: () => history.replaceState(null, "", address(now.name, now.params, now.at)) };
}
