// The live log of a job: server-sent events, each with the byte offset after it, so that a reconnect goes on exactly.

import { Ansi } from "./ansi.js";

const LINES_KEPT = 20_000;
const TAIL = 2_000;

const box = document.getElementById("log");
const state = document.getElementById("log-state");
const follow = document.getElementById("log-follow");
const wrap = document.getElementById("log-wrap");
const pause = document.getElementById("log-pause");

// Lines are gathered in memory and put on the page once a frame, however fast they come.
class Lines {
  #done = [];
  #line = [];
  #shown = document.createElement("div");
  #due = false;

  text(text, classes) {
    this.#line.push([text, classes]);
    this.#later();
  }

  newline() {
    this.#done.push(this.#line);
    this.#line = [];
    if (this.#done.length > LINES_KEPT) this.#done.splice(0, this.#done.length - LINES_KEPT);
    this.#later();
  }

  restart() {
    this.#line = [];
  }

  clear() {
    this.#done = [];
    this.#line = [];
    this.#shown = document.createElement("div");
    box.replaceChildren(this.#shown);
  }

  note(text) {
    if (this.#line.length) this.newline();
    this.text(text, "a-note");
    this.newline();
  }

  #later() {
    if (!this.#due) {
      this.#due = true;
      requestAnimationFrame(() => this.#draw());
    }
  }

  #draw() {
    this.#due = false;
    const fresh = document.createDocumentFragment();
    for (const line of this.#done) {
      this.#fill(this.#shown, line);
      fresh.append(this.#shown);
      this.#shown = document.createElement("div");
    }
    this.#done = [];
    this.#fill(this.#shown, this.#line);
    fresh.append(this.#shown);
    box.append(fresh);
    const surplus = box.childElementCount - LINES_KEPT;
    for (let count = 0; count < surplus; count += 1) box.firstElementChild.remove();
    if (follow.checked) box.scrollTop = box.scrollHeight;
  }

  #fill(element, line) {
    element.replaceChildren(
      ...line.map(([text, classes]) => {
        if (!classes) return document.createTextNode(text);
        const span = document.createElement("span");
        span.className = classes;
        span.textContent = text;
        return span;
      }),
    );
    if (!element.firstChild) element.append("\n"); // an empty line is a line
  }
}

const lines = new Lines();
let ansi = new Ansi(lines);
let attempt = Number(box?.dataset.attempt);
let offset = null; // the byte after the newest that is shown
let events = null;

function open() {
  const from = offset === null ? `tail=${TAIL}` : `offset=${offset}`;
  events = new EventSource(`/api/jobs/${box.dataset.job}/log?attempt=${attempt}&${from}`);
  events.addEventListener("open", () => (state.textContent = box.dataset.ended === "1" ? "" : "live"));
  events.addEventListener("log", (event) => {
    if (offset === null) lines.clear(); // what the server put on the page is in the tail as well
    offset = Number(event.lastEventId);
    ansi.feed(JSON.parse(event.data));
  });
  events.addEventListener("end", (event) => {
    events.close();
    const end = JSON.parse(event.data);
    if (end.ended) {
      state.textContent = "ended";
      pause.hidden = true;
      return;
    }
    attempt += 1;
    offset = 0;
    ansi = new Ansi(lines);
    lines.note(`attempt ${attempt}`);
    open();
  });
  events.addEventListener("error", () => {
    state.textContent = events.readyState === EventSource.CLOSED ? "cannot be read" : "reconnecting…";
  });
}

if (box) {
  box.addEventListener("scroll", () => {
    follow.checked = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  });
  follow.addEventListener("change", () => {
    if (follow.checked) box.scrollTop = box.scrollHeight;
  });
  wrap.addEventListener("change", () => box.classList.toggle("wrapped", wrap.checked));
  pause.addEventListener("click", () => {
    const paused = pause.getAttribute("aria-pressed") === "true";
    pause.setAttribute("aria-pressed", String(!paused));
    pause.textContent = paused ? "Pause" : "Resume";
    if (paused) open();
    else {
      events.close();
      state.textContent = "paused";
    }
  });
  open();
}
