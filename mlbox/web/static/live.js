// Keeps a page up to date: refetches its parts whenever the daemon says that something changed, ticks the times, and
// carries out the buttons without leaving the page. Without this script the page is complete, only still.

const parts = document.getElementById("parts");
const pulse = document.getElementById("pulse");
document.documentElement.classList.add("scripted");

// Make `old` like `fresh` while keeping the elements that stay, so that focus, selection and scrolling stay too.
function morph(old, fresh) {
  if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName) {
    old.replaceWith(fresh.cloneNode(true));
    return;
  }
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue;
    return;
  }
  for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name)) old.removeAttribute(name);
  for (const { name, value } of fresh.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  morphChildren(old, fresh);
}

function morphChildren(old, fresh) {
  const [mine, theirs] = [[...old.childNodes], [...fresh.childNodes]];
  theirs.forEach((node, index) => (index < mine.length ? morph(mine[index], node) : old.append(node.cloneNode(true))));
  mine.slice(theirs.length).forEach((node) => node.remove());
}

let fetching = false;
let stale = false;

async function refresh() {
  if (fetching || document.hidden) {
    stale = true;
    return;
  }
  fetching = true;
  stale = false;
  try {
    const answer = await fetch(parts.dataset.parts, { headers: { Accept: "text/html" } });
    if (answer.status === 401) location.reload();
    if (answer.ok) {
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      morphChildren(parts, fresh.body);
      localize();
    }
  } catch {
    stale = true; // the stream notices that the daemon is away, and asks again when it is back
  } finally {
    fetching = false;
  }
  if (stale && !document.hidden) setTimeout(refresh, 1000);
}

function show(state, text) {
  pulse.className = `pulse ${state}`;
  pulse.textContent = text;
}

function listen() {
  const events = new EventSource(`/api/events?topics=${encodeURIComponent(parts.dataset.topics)}`);
  events.addEventListener("hello", () => {
    show("on", "live");
    refresh();
  });
  events.addEventListener("change", refresh);
  events.addEventListener("error", () => {
    show("off", events.readyState === EventSource.CLOSED ? "not live: reload the page" : "reconnecting…");
    if (events.readyState === EventSource.CLOSED) setTimeout(listen, 10_000);
  });
}

function span(seconds) {
  if (seconds < 0.9995) return `${(Math.max(0, seconds) * 1000).toFixed(0)} ms`;
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  let left = Math.round(seconds);
  const found = [];
  for (const [length, unit] of [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]]) {
    const count = Math.floor(left / length);
    left %= length;
    if (count || found.length) found.push(`${count} ${unit}`);
  }
  return found.slice(0, 2).filter((part) => !part.startsWith("0 ")).join(" ");
}

function ago(then) {
  const passed = Date.now() / 1000 - then;
  if (Math.abs(passed) < 10) return "just now";
  const text = span(Math.abs(passed)).split(" ").slice(0, 2).join(" ");
  return passed >= 0 ? `${text} ago` : `in ${text}`;
}

// Absolute times are written in the box's zone; whoever looks may be in another.
function hour(then) {
  const when = new Date(then * 1000);
  const today = new Date();
  const time = when.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
  if (when.toDateString() === today.toDateString()) return time;
  const near = Math.abs(when - today) < 6 * 86400e3;
  return `${when.toLocaleDateString("en-GB", near ? { weekday: "short" } : { day: "2-digit", month: "short" })} ${time}`;
}

function localize() {
  for (const element of document.querySelectorAll("[data-hour]")) {
    const text = hour(Number(element.dataset.hour));
    if (element.textContent !== text) element.textContent = text;
  }
}

function tick() {
  for (const element of document.querySelectorAll("[data-since]")) {
    element.textContent = span(Date.now() / 1000 - Number(element.dataset.since));
  }
  for (const element of document.querySelectorAll("[data-ago]")) {
    const text = ago(Number(element.dataset.ago));
    if (element.textContent !== text) element.textContent = text;
  }
}

document.addEventListener("submit", async (event) => {
  if (!event.target.matches("form[data-act]")) return;
  event.preventDefault();
  const button = event.target.querySelector("button");
  button.disabled = true;
  const answer = await fetch(event.target.action, { method: "POST", headers: { Accept: "text/html" } }).catch(() => null);
  button.disabled = false;
  const there = answer && new URL(answer.url).pathname;
  if (answer?.ok && there !== location.pathname) location.assign(there);
  else if (answer?.ok) refresh();
  else location.reload();
});

document.addEventListener("visibilitychange", () => {
  if (!document.hidden && stale) refresh();
});

localize();
setInterval(tick, 1000);
if (parts) listen();
