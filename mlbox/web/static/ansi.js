// Terminal output -> pieces of plain text with class names out of a closed set. Nothing else of a terminal is honoured:
// colours and weight stay, cursor movements, titles, links and every other sequence are dropped.
// ECMA-48, sections 5.3 to 5.6 and 8.3.117 (SGR).

const ESCAPE = /\x1b(?:\[([0-?]*)[ -/]*([@-~])|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-OQ-WYZ\\`-~])/y;
const UNFINISHED = /^\x1b(?:\[[0-?]*[ -/]*|[\]PX^_][^\x07\x1b]*\x1b?|[ -/]*)$/;
const LONGEST_ESCAPE = 4096; // longer than this without an end it is no sequence, but text that began like one
const PLAIN = /[^\x1b\r\n]+/y;
const HIDDEN = /[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]/g;

// The eight colours and their bright forms, as a terminal shows them; a palette or RGB colour becomes the nearest.
const PALETTE = [
  [0, 0, 0], [205, 0, 0], [0, 205, 0], [205, 205, 0], [0, 0, 238], [205, 0, 205], [0, 205, 205], [229, 229, 229],
  [127, 127, 127], [255, 0, 0], [0, 255, 0], [255, 255, 0], [92, 92, 255], [255, 0, 255], [0, 255, 255], [255, 255, 255],
];
const STEPS = [0, 95, 135, 175, 215, 255];

function nearest(red, green, blue) {
  let best = 0;
  let least = Infinity;
  PALETTE.forEach(([r, g, b], index) => {
    const distance = (r - red) ** 2 + (g - green) ** 2 + (b - blue) ** 2;
    if (distance < least) [best, least] = [index, distance];
  });
  return best;
}

function ofPalette(index) {
  if (index < 16) return index;
  if (index >= 232) return nearest(...Array(3).fill(8 + (index - 232) * 10));
  const cube = index - 16;
  return nearest(STEPS[Math.floor(cube / 36)], STEPS[Math.floor(cube / 6) % 6], STEPS[cube % 6]);
}

const within = (value) => (Number.isInteger(value) && value >= 0 && value <= 255 ? value : 0);

export function visible(text) {
  return text.replace(HIDDEN, (letter) => {
    const code = letter.charCodeAt(0);
    return code < 256 ? `\\x${code.toString(16).padStart(2, "0")}` : `\\u${code.toString(16).padStart(4, "0")}`;
  });
}

// Feed it text as it comes. It calls sink.text(text, classes), sink.newline() and sink.restart(): the line is written
// anew from its beginning, as progress bars do it.
export class Ansi {
  #sink;
  #held = "";
  #restart = false;
  #style = {};
  #classes = "";

  constructor(sink) {
    this.#sink = sink;
  }

  feed(more) {
    const text = this.#held + more;
    this.#held = "";
    let at = 0;
    while (at < text.length) {
      const letter = text[at];
      if (letter === "\n") {
        this.#restart = false;
        this.#sink.newline();
        at += 1;
      } else if (letter === "\r") {
        this.#restart = true;
        at += 1;
      } else if (letter === "\x1b") {
        ESCAPE.lastIndex = at;
        const found = ESCAPE.exec(text);
        if (found) {
          if (found[2] === "m") this.#sgr(found[1]);
          if (found[2] === "K" && this.#restart) this.#begin();
          at = ESCAPE.lastIndex;
        } else if (text.length - at < LONGEST_ESCAPE && UNFINISHED.test(text.slice(at))) {
          this.#held = text.slice(at);
          return;
        } else {
          at += 1; // an escape that begins no sequence
        }
      } else {
        PLAIN.lastIndex = at;
        const [plain] = PLAIN.exec(text);
        if (this.#restart) this.#begin();
        this.#sink.text(visible(plain), this.#classes);
        at += plain.length;
      }
    }
  }

  #begin() {
    this.#restart = false;
    this.#sink.restart();
  }

  #sgr(parameters) {
    const codes = parameters === "" ? [0] : parameters.split(/[;:]/).map(Number);
    const style = this.#style;
    for (let at = 0; at < codes.length; at += 1) {
      const code = codes[at];
      if (code === 0) this.#style = {};
      else if (code === 38 || code === 48) {
        const key = code === 38 ? "f" : "b";
        if (codes[at + 1] === 5 && at + 2 < codes.length) {
          this.#style = { ...this.#style, [key]: ofPalette(within(codes[at + 2])) };
          at += 2;
        } else if (codes[at + 1] === 2 && at + 4 < codes.length) {
          this.#style = { ...this.#style, [key]: nearest(...[2, 3, 4].map((step) => within(codes[at + step]))) };
          at += 4;
        } else break;
      } else this.#style = { ...this.#style, ...simple(code) };
    }
    if (style !== this.#style) this.#classes = named(this.#style);
  }
}

function simple(code) {
  if (code >= 30 && code <= 37) return { f: code - 30 };
  if (code >= 90 && code <= 97) return { f: code - 82 };
  if (code >= 40 && code <= 47) return { b: code - 40 };
  if (code >= 100 && code <= 107) return { b: code - 92 };
  return (
    {
      1: { bold: true }, 2: { dim: true }, 3: { italic: true }, 4: { under: true }, 7: { inverse: true }, 9: { struck: true },
      22: { bold: false, dim: false }, 23: { italic: false }, 24: { under: false }, 27: { inverse: false }, 29: { struck: false },
      39: { f: undefined }, 49: { b: undefined },
    }[code] ?? {}
  );
}

function named(style) {
  const names = ["bold", "dim", "italic", "under", "inverse", "struck"].filter((name) => style[name]).map((name) => `a-${name}`);
  if (style.f !== undefined) names.push(`a-f${style.f}`);
  if (style.b !== undefined) names.push(`a-b${style.b}`);
  return names.join(" ");
}
