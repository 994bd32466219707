"use strict";
// What the page of a run and the page of a comparison have in common. Text is never inserted as HTML,
// because names of layers, runs and metrics can contain anything.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

const number = (value, digits = 4) =>
  value === null ? "–" : value.toLocaleString("en", { maximumSignificantDigits: digits });
const whole = (value) => value.toLocaleString("en");
const percent = (share) =>
  share === null ? "–" : `${(100 * share).toLocaleString("en", { maximumFractionDigits: 1 })}\u00a0%`;
const many = (n, one, more = `${one}s`) => `${whole(n)} ${n === 1 ? one : more}`;
const shorter = (n) =>
  n.toLocaleString("en", { notation: "compact", maximumSignificantDigits: 3 });

function element(tag, text = "", attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** A name, which may break into lines after its dots; copies of the text do not show that. */
function breakable(name) {
  const made = document.createDocumentFragment();
  name.split(/(?<=\.)/).forEach((part, i) => made.append(...(i ? [element("wbr"), part] : [part])));
  return made;
}

function duration(seconds) {
  if (seconds < 120) return `${number(seconds, 3)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

// -- the masks ------------------------------------------------------------------------------------

async function unpack(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const SNAPSHOT = 16; // frames between the snapshots for seeking backwards

/** The mask of one layer at the current frame, with seeking to any frame. */
class MaskAnimation {
  constructor(layer, bits) {
    this.layer = layer;
    [this.rows, this.columns] = layer.grid;
    this.blocks = this.rows * this.columns;
    this.bits = bits; // the changed blocks of each frame, one bit per block
    this.stride = Math.ceil(this.blocks / 8);
    this.mask = new Uint8Array(this.blocks);
    this.since = new Uint16Array(this.blocks); // the frame of each block's last change
    this.snapshots = [];
    this.frame = -1;
    this.step();
    this.transposed = this.rows > this.columns; // tall masks are drawn transposed, to fit screens
    this.width = this.transposed ? this.rows : this.columns;
    this.height = this.transposed ? this.columns : this.rows;
  }

  seek(frame) {
    if (frame < this.frame) {
      const kept = this.snapshots[Math.floor(frame / SNAPSHOT)];
      this.mask.set(kept.mask);
      this.since.set(kept.since);
      this.frame = frame - (frame % SNAPSHOT);
    }
    while (this.frame < frame) this.step();
  }

  step() {
    const frame = ++this.frame;
    const start = frame * this.stride;
    for (let i = 0; i < this.stride; i++) {
      const byte = this.bits[start + i];
      if (!byte) continue;
      for (let bit = 0; bit < 8; bit++) {
        if (byte & (128 >> bit)) {
          this.mask[8 * i + bit] ^= 1;
          this.since[8 * i + bit] = frame;
        }
      }
    }
    if (frame % SNAPSHOT === 0 && !this.snapshots[frame / SNAPSHOT]) {
      this.snapshots[frame / SNAPSHOT] = { mask: this.mask.slice(), since: this.since.slice() };
    }
  }

  /** Numbers of present blocks, and of blocks grown and dropped in this frame. */
  count() {
    let present = 0, grown = 0, dropped = 0;
    for (let i = 0; i < this.blocks; i++) {
      const changed = this.frame > 0 && this.since[i] === this.frame;
      if (this.mask[i]) { present++; if (changed) grown++; } else if (changed) dropped++;
    }
    return { present, grown, dropped };
  }

  /**
   * Draw the frame, one pixel per block.
   * @param paint function that returns the colour of a block by its index
   */
  draw(canvas, paint = this.presence()) {
    if (canvas.width !== this.width || canvas.height !== this.height) {
      canvas.width = this.width;
      canvas.height = this.height;
    }
    const context = canvas.getContext("2d");
    const image = context.createImageData(this.width, this.height);
    const pixels = new Uint32Array(image.data.buffer);
    for (let row = 0, i = 0; row < this.rows; row++) {
      for (let column = 0; column < this.columns; column++, i++) {
        pixels[this.transposed ? column * this.rows + row : i] = paint(i);
      }
    }
    context.putImageData(image, 0, 0);
  }

  /** The colours of present, absent, grown and dropped blocks. */
  presence() {
    const { mask, since } = this;
    const { absent, kept, grown, dropped } = palette;
    const now = this.frame || -1; // no block is grown or dropped in the first frame
    return (i) => mask[i] ? (since[i] === now ? grown : kept) : since[i] === now ? dropped : absent;
  }
}

// -- colours --------------------------------------------------------------------------------------

// From young or low to old or high, based on Cividis, which is readable with colour blindness.
const RAMPS = {
  light: ["#f2cf3b", "#c0b060", "#93907a", "#6a7280", "#3f5580", "#122c5c"],
  dark: ["#ffe25e", "#cfbf68", "#a3a07c", "#7f8898", "#5f7db5", "#4468b8"],
};
let palette = {};
let style = {};

function rgb(hex) {
  return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
}

// Pixels are stored as red, green, blue, alpha.
const pixel = ([red, green, blue]) =>
  new Uint32Array(new Uint8ClampedArray([red, green, blue, 255]).buffer)[0];

function readPalette() {
  const css = getComputedStyle(document.documentElement);
  style = {};
  for (const name of ["paper", "raised", "ink", "soft", "line", "accent", "kept", "grown", "dropped",
    "absent", "unknown"]) style[name] = css.getPropertyValue(`--${name}`).trim();
  const stops = RAMPS[theme()].map(rgb);
  const ramp = Uint32Array.from({ length: 256 }, (_, level) => {
    const place = (level / 255) * (stops.length - 1);
    const i = Math.min(stops.length - 2, Math.floor(place));
    return pixel(stops[i].map((from, c) => from + (place - i) * (stops[i + 1][c] - from)));
  });
  palette = { ramp };
  for (const name of ["kept", "grown", "dropped", "absent", "unknown"]) palette[name] = pixel(rgb(style[name]));
}

const theme = () => document.documentElement.dataset.theme;

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  $("theme").textContent = name === "dark" ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", name === "dark" ? "Light colours" : "Dark colours");
  readPalette();
}

const preferredTheme = () => (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");

/** Repaint the page when the browser's colour scheme changes, or the button is pressed from then on. */
function followTheme(repaint) {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const change = (name) => { setTheme(name); repaint(); };
  const follow = () => change(preferredTheme());
  dark.addEventListener("change", follow);
  $("theme").addEventListener("click", () => {
    dark.removeEventListener("change", follow);
    change(theme() === "dark" ? "light" : "dark");
  });
}

// -- plots ----------------------------------------------------------------------------------------

// The palette of Okabe and Ito without black and yellow, which lack contrast with the backgrounds.
const LINES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8a6fc8"];
// Plotly interprets tags in names, so they are escaped.
const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

const panels = [];
const seenPanels = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const panel = panels[entry.target.dataset.panel];
    panel.visible = entry.isIntersecting;
    panel.render();
  }
}, { rootMargin: "300px" });

const STEP = { title: { text: "step", standoff: 4 } };
const SHARE = { tickformat: ".0%", hoverformat: ".2%" };

/** A plot that is drawn when it becomes visible. */
class Plot {
  /**
   * @param figure function that returns Plotly's lines and axes in the current colours, and whether
   *   the plot has a legend of its own
   */
  constructor(parent, title, note, figure) {
    this.root = element("div", "", { class: "panel", "data-panel": panels.length });
    this.plot = element("div", "", { class: "plot" });
    this.title = element("h3", title);
    this.root.append(this.title, element("p", note), this.plot);
    Object.assign(this, { figure, visible: false, dirty: true, drawn: false });
    panels.push(this);
    parent.append(this.root);
    seenPanels.observe(this.root);
  }

  async render() {
    if (!this.dirty || !(this.visible || printing)) return;
    this.dirty = false;
    const axis = { gridcolor: style.line, zeroline: false, linecolor: style.line, automargin: true };
    const { lines, xaxis, yaxis, showlegend } = this.figure();
    await Plotly.react(this.plot, lines, {
      width: this.plot.clientWidth, // by itself, Plotly notices a new size only after a while
      height: this.plot.clientHeight,
      uirevision: "kept", // hidden lines stay hidden
      margin: { l: 8, r: 8, t: 8, b: 8 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: style.soft },
      xaxis: { ...axis, ...xaxis },
      yaxis: { ...axis, ...yaxis },
      hovermode: "closest",
      hoverlabel: { namelength: -1, bgcolor: style.raised, bordercolor: style.line, font: { color: style.ink } },
      showlegend,
      legend: { orientation: "h", y: -0.24, yanchor: "top", font: { size: 11 }, itemwidth: 30 },
    }, {
      displaylogo: false, displayModeBar: false, responsive: true, doubleClick: "reset",
      showTips: false,
    });
    if (!this.drawn) {
      this.drawn = true;
      this.begin();
    }
  }

  /** What a plot does when it has been drawn for the first time. */
  begin() {}
}

function refreshPanels() {
  for (const panel of panels) {
    panel.dirty = true;
    panel.render();
  }
}

function line(x, y, name, color, width) {
  return { x, y, name: plain(name), mode: x.length < 40 ? "lines+markers" : "lines", connectgaps: false,
    line: { color, width }, marker: { size: width + 2 } };
}

// -- printing -------------------------------------------------------------------------------------

let printing = false; // whether the page is laid out for paper, with everything drawn

/**
 * Lay the page out for paper, in light colours and with all details open, whenever it is printed.
 *
 * Browsers print right after the event, so everything has to be done when it returns.
 * @param repaint function that draws everything anew
 */
function listenForPrinting(repaint) {
  const details = [...document.querySelectorAll("details")];
  let before = null; // what printing changes, to restore it
  const lay = (on, name) => {
    printing = on;
    document.documentElement.classList.toggle("printing", on);
    setTheme(name);
    repaint();
  };
  addEventListener("beforeprint", () => {
    before ??= { theme: theme(), open: details.map((each) => each.open) };
    for (const each of details) each.open = true;
    lay(true, "light");
  });
  addEventListener("afterprint", () => {
    details.forEach((each, i) => { each.open = before.open[i]; });
    lay(false, before.theme);
    before = null;
  });
}

// -- tables ---------------------------------------------------------------------------------------

/**
 * Fill an empty table, whose headers sort it.
 * @param columns title, function from an item to the value by which the column is sorted (null if it
 *   has none), and function from the value and the item to the text of the cell
 * @param pick function that is called with the index of an item when its row is clicked
 */
function fillTable(table, columns, items, pick) {
  const head = table.tHead.insertRow();
  const body = table.tBodies[0];
  columns.forEach(([title, value]) => {
    const cell = element("th", "", { scope: "col" });
    const button = element("button", title, { type: "button" });
    button.addEventListener("click", () => {
      // Numbers are first sorted in descending order, texts in ascending order.
      const sorted = cell.getAttribute("aria-sort");
      const down = sorted ? sorted === "ascending" : items.some((item) => typeof value(item) === "number");
      for (const other of head.cells) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      const compare = (a, b) =>
        typeof (a ?? b) === "string" ? (a ?? "").localeCompare(b ?? "", "en", { numeric: true })
          : (a ?? -Infinity) - (b ?? -Infinity);
      const rows = [...body.rows].sort((a, b) => {
        const order = compare(value(items[a.dataset.index]), value(items[b.dataset.index]));
        return (down ? -order : order) || a.dataset.index - b.dataset.index;
      });
      body.append(...rows);
    });
    cell.append(button);
    head.append(cell);
  });
  items.forEach((item, index) => {
    const row = body.insertRow();
    row.dataset.index = index;
    columns.forEach(([, value, show], i) => {
      const text = show(value(item), item);
      const cell = row.insertCell();
      if (i === 0) {
        const button = element("button", "", { type: "button" });
        button.append(breakable(text));
        cell.append(button);
      } else cell.textContent = text;
    });
    row.addEventListener("click", () => pick(index));
  });
}

/** Mark one row of a filled table as selected. */
function selectRow(table, index) {
  for (const row of table.tBodies[0].rows) {
    row.setAttribute("aria-selected", Number(row.dataset.index) === index);
  }
}
