// Masks are drawn on canvases, one pixel per block; curves by Plotly. Text is never inserted as HTML,
// because names of layers and metrics can contain anything.

const last = data.frames.length - 1;
const state = { frame: 0, layer: 0, colour: "presence", zoom: 1, playing: false, cell: null,
  hidden: new Set(), // ALL, and indices of groups, whose lines in the curves are hidden
  every: false }; // whether the table has a row for each of the repeated layers

const ALL = "all layers";
const MAX_LAYERS = 24; // of more layers, repeated ones share a name, and their lines are hidden at first
const singles = data.layers.map((layer, index) => ({ ...layer, layers: [index] }));
const groups = data.layers.length > MAX_LAYERS ? data.groups : singles;
const groupOf = (index) => groups.findIndex((group) => group.layers.includes(index));
const groupName = ({ name, layers }) => (layers.length > 1 ? `${name} (${many(layers.length, "layer")})` : name);

// -- the masks ------------------------------------------------------------------------------------

/** A layer's mask with the scores of its blocks, and with what is known of each block. */
class RunAnimation extends MaskAnimation {
  constructor(layer, bits, levels) {
    super(layer, bits);
    this.levels = levels; // the scores of each scored frame, one byte per block
    this.scales = []; // the colour scale of each scored frame
  }

  draw(canvas, colour) {
    super.draw(canvas, this.painter(colour));
  }

  /** The latest scores up to this frame, or null; {low, high} are the ends of the colour scale. */
  scores() {
    const { from, ranges, steps } = this.layer.scores;
    let i = from.length - 1;
    while (i >= 0 && from[i] > this.frame) i--;
    if (i < 0) return null;
    const levels = this.levels.subarray(i * this.blocks, (i + 1) * this.blocks);
    const [lowest, highest] = ranges[i];
    const value = (level) => lowest + ((level - 1) / 254) * (highest - lowest);
    this.scales[i] ??= colourScale(levels);
    return { step: steps[i], levels, value, ...this.scales[i] };
  }

  /** State and history of one block up to the current frame. */
  block(row, column) {
    const index = row * this.columns + column;
    const changes = [];
    for (let frame = 1; frame <= this.frame; frame++) {
      const byte = this.bits[frame * this.stride + (index >> 3)];
      if (byte & (128 >> (index & 7))) changes.push(frame);
    }
    const present = this.mask[index] === 1;
    const scores = this.scores();
    const level = scores ? scores.levels[index] : 0;
    const grown = present ? Math.ceil(changes.length / 2) : Math.floor(changes.length / 2);
    return {
      present,
      since: changes.length ? changes.at(-1) : 0,
      grown,
      dropped: changes.length - grown,
      score: present && level ? scores.value(level) : null,
      scored: scores && scores.step,
    };
  }

  painter(colour) {
    const { mask, since } = this;
    const { absent, unknown, ramp } = palette;
    if (colour === "presence") return this.presence();
    if (colour === "age") {
      const step = data.frames[this.frame].step;
      const colours = data.frames.map((frame) => ramp[Math.round((255 * Math.max(0, step - frame.step)) / span)]);
      return (i) => (mask[i] ? colours[since[i]] : absent);
    }
    const scores = this.scores();
    if (!scores) return (i) => (mask[i] ? unknown : absent);
    const { levels, low, high } = scores;
    const colours = Array.from({ length: 256 }, (_, level) =>
      ramp[Math.round(255 * Math.min(1, Math.max(0, (level - low) / Math.max(1, high - low))))]);
    return (i) => (!mask[i] ? absent : levels[i] ? colours[levels[i]] : unknown);
  }
}

/** The 2nd and 98th percentile of the levels, so that outliers do not use up the colour scale. */
function colourScale(levels) {
  const counts = new Uint32Array(256);
  for (const level of levels) counts[level]++;
  const scored = levels.length - counts[0];
  const below = (share) => {
    let level = 1;
    for (let sum = counts[1]; sum < share * scored && level < 255; sum += counts[level]) level++;
    return level;
  };
  return { low: below(0.02), high: below(0.98) };
}

// -- colours --------------------------------------------------------------------------------------

const span = Math.max(1, data.frames[last].step - data.frames[0].step);
// -- the layer shown large ------------------------------------------------------------------------

const animation = () => animations[state.layer];
let animations = [];
let scale = 1;

/** Set the CSS pixels per block, and the layout that depends on it. */
function layOut() {
  const { width, height, transposed, layer } = animation();
  const room = Math.max(120, $("window").clientWidth - 6);
  const tall = printing ? 340 : Math.max(260, 0.56 * innerHeight); // on paper it shares a page
  const fit = Math.min(room / width, tall / height, 64);
  scale = (fit > 1 ? Math.floor(fit) : fit) * (printing ? 1 : state.zoom);
  const canvas = $("mask");
  canvas.style.width = `${width * scale}px`;
  canvas.style.height = `${height * scale}px`;
  // If a pixel covers several blocks, they are averaged; nearest neighbour would omit some.
  canvas.style.imageRendering = scale * devicePixelRatio < 1 ? "auto" : "pixelated";
  $("lines").hidden = scale < 6;
  $("lines").style.backgroundSize = `${scale}px ${scale}px`;
  const [outputs, inputs] = layer.grid.map((n) => n * layer.block_size);
  const across = transposed ? `${whole(outputs)} outputs` : `${whole(inputs)} inputs`;
  const down = transposed ? `${whole(inputs)} inputs` : `${whole(outputs)} outputs`;
  $("across").textContent = `${across} →`;
  $("down").textContent = `← ${down}`;
  $("smaller").disabled = state.zoom <= 1;
  $("larger").disabled = scale >= 64;
  showCell();
}

function zoom(factor) {
  state.zoom = Math.max(1, state.zoom * factor);
  layOut();
  if (state.cell) $("cursor").scrollIntoView({ block: "nearest", inline: "nearest" });
}

function showCell() {
  const { transposed, layer } = animation();
  $("cursor").hidden = state.cell === null;
  $("readout").setAttribute("aria-live", state.playing ? "off" : "polite");
  if (state.cell === null) {
    $("readout").replaceChildren(element("span",
      `Point at a block or tap it. Each block is ${layer.block_size} × ${layer.block_size} weights`
        + `${layer.nm === null ? "" : `, of which two of each four in a row are kept (${layer.nm})`}.`));
    return;
  }
  const [row, column] = state.cell;
  const [x, y] = transposed ? [row, column] : [column, row];
  Object.assign($("cursor").style, {
    left: `${x * scale}px`, top: `${y * scale}px`,
    width: `${Math.max(3, scale)}px`, height: `${Math.max(3, scale)}px`,
  });
  const block = animation().block(row, column);
  const size = layer.block_size;
  const since = data.frames[block.since].step;
  const age = data.frames[state.frame].step - since;
  const atLeast = data.recorded > data.frames.length ? "at least " : "";
  const times = (n) => `${atLeast}${many(n, "time")}`;
  const parts = [
    block.since === 0
      ? `${block.present ? "present" : "absent"} from the start`
      : `${block.present ? "present" : "absent"} since step ${whole(since)}`,
    `for ${many(age, "step")}`,
  ];
  if (block.present) {
    parts.push(block.score === null
      ? "not scored" : `score ${number(block.score, 4)} (at step ${whole(block.scored)})`);
  }
  parts.push(`grown ${times(block.grown)}, dropped ${times(block.dropped)}`);
  $("readout").replaceChildren(
    element("b", `Block ${row}, ${column}`),
    element("span", ` · outputs ${whole(row * size)}–${whole((row + 1) * size - 1)},`
      + ` inputs ${whole(column * size)}–${whole((column + 1) * size - 1)}`),
    element("br"),
    document.createTextNode(parts.join(" · ")),
  );
}

function choose(cell) {
  state.cell = cell;
  showCell();
}

function cellAt(event) {
  const { width, height, transposed } = animation();
  const box = $("mask").getBoundingClientRect();
  const x = Math.min(width - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * width)));
  const y = Math.min(height - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * height)));
  return transposed ? [x, y] : [y, x];
}

function showLegend() {
  const key = (colour, text) => {
    const item = element("span");
    const swatch = element("i");
    swatch.style.background = colour;
    item.append(swatch, text);
    return item;
  };
  const ramp = (from, to) => {
    const item = element("span");
    const bar = element("i", "", { class: "ramp" });
    bar.style.background = `linear-gradient(to right, ${RAMPS[theme()].join(", ")})`;
    item.append(from, bar, to);
    return item;
  };
  let items;
  if (state.colour === "presence") {
    items = [key(style.kept, "present"), key(style.grown, "grown in this frame"),
      key(style.dropped, "dropped in this frame"), key(style.absent, "absent")];
  } else if (state.colour === "age") {
    items = [ramp("new", `${many(span, "step")} old`), key(style.absent, "absent")];
  } else {
    const scores = animation().scores();
    items = scores
      ? [ramp(`${scores.low > 1 ? "≤ " : ""}${number(scores.value(scores.low), 3)}`,
        `${scores.high < 255 ? "≥ " : ""}${number(scores.value(scores.high), 3)}`), key(style.unknown, "not scored"),
        key(style.absent, "absent"), element("span", `scores at step ${whole(scores.step)}`)]
      : [element("span", "No block has been scored up to this frame."), key(style.unknown, "not scored")];
  }
  $("legend").replaceChildren(...items);
}

// -- the gallery ----------------------------------------------------------------------------------

const tiles = []; // {button, canvas, share, visible}

function buildGallery() {
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const tile = tiles[entry.target.dataset.layer];
      tile.visible = entry.isIntersecting;
      if (tile.visible) drawTile(tile);
    }
  });
  data.layers.forEach((layer, index) => {
    const button = element("button", "", {
      type: "button", class: "tile", "data-layer": index, title: layer.name,
    });
    const canvas = element("canvas", "", { "aria-hidden": "true" });
    // From 70 blocks on, the browser shrinks the image and should average pixels.
    button.classList.toggle("coarse", Math.max(...layer.grid) < 70);
    const name = element("span", "", { class: "name" });
    name.append(breakable(layer.name));
    const share = element("span", "", { class: "share" });
    button.append(canvas, name, share);
    button.addEventListener("click", () => chooseLayer(index));
    tiles.push({ index, button, canvas, share, visible: false });
    $("gallery").append(button);
    seen.observe(button);
  });
  const { classList } = document.querySelector(".stage");
  classList.toggle("alone", data.layers.length < 2);
  classList.toggle("wide", data.layers.some((layer) => Math.max(...layer.grid) > 400));
}

function drawTile(tile) {
  const masks = animations[tile.index];
  masks.seek(state.frame);
  masks.draw(tile.canvas, state.colour);
  tile.share.textContent = percent(masks.count().present / masks.blocks);
}

// -- navigation -----------------------------------------------------------------------------------

/** Show the frame, layer and colour of the state. */
function draw() {
  const masks = animation();
  masks.seek(state.frame);
  masks.draw($("mask"), state.colour);
  const { present, grown, dropped } = masks.count();
  $("layer-state").textContent = `${whole(present)} of ${whole(masks.blocks)} blocks, `
    + `${percent(present / masks.blocks)}${state.frame ? ` · ${whole(grown)} grown, ${whole(dropped)} dropped` : ""}`;
  const frame = data.frames[state.frame];
  const label = frame.number ? `update ${whole(frame.number)}` : state.frame ? "resumed" : "start";
  const when = `step ${whole(frame.step)} · ${label}`;
  $("when").textContent = when;
  $("slider").value = state.frame;
  $("slider").setAttribute("aria-valuetext", when);
  for (const tile of tiles) if (tile.visible || printing) drawTile(tile);
  for (const panel of panels) panel.mark();
  showLegend();
  showCell();
}

function showFrame(frame) {
  state.frame = Math.max(0, Math.min(last, frame));
  draw();
}

function chooseLayer(index) {
  if (index < 0 || index >= data.layers.length) return;
  state.layer = index;
  state.cell = null;
  state.zoom = 1;
  const { layer } = animation();
  const [outputs, inputs] = layer.grid.map((n) => n * layer.block_size);
  $("layer-name").replaceChildren(breakable(layer.name));
  $("sheet").setAttribute("aria-label",
    `Block mask of ${layer.name}: ${outputs} outputs by ${inputs} inputs in blocks of ${layer.block_size}`);
  $("colours").querySelector("[value=score]").disabled = layer.scores.from.length === 0;
  if (state.colour === "score" && layer.scores.from.length === 0) setColour("presence");
  tiles.forEach((tile) => tile.button.setAttribute("aria-pressed", tile.index === index));
  const { button } = tiles[index];
  const { parentElement: shelf } = button;
  // Scroll only the shelf; scrollIntoView would also scroll the page.
  shelf.scrollTop += Math.min(0, button.offsetTop - shelf.offsetTop - shelf.scrollTop)
    || Math.max(0, button.offsetTop - shelf.offsetTop + button.offsetHeight - shelf.scrollTop - shelf.clientHeight);
  shelf.scrollLeft += Math.min(0, button.offsetLeft - shelf.offsetLeft - shelf.scrollLeft)
    || Math.max(0, button.offsetLeft - shelf.offsetLeft + button.offsetWidth - shelf.scrollLeft - shelf.clientWidth);
  markRow();
  draw();
  layOut();
  refreshPanels();
}

function setColour(name) {
  state.colour = name;
  $("colours").querySelector(`[value=${name}]`).checked = true;
}

let shownAt = 0;

function play(on) {
  state.playing = on && last > 0;
  $("play").textContent = state.playing ? "Pause" : "Play";
  if (!state.playing) return showCell();
  if (state.frame === last) showFrame(0);
  shownAt = performance.now();
  requestAnimationFrame(advance);
}

function advance(now) {
  if (!state.playing) return;
  // Skip frames on slow machines to keep the speed.
  const due = Math.floor(((now - shownAt) / 1000) * Number($("speed").value));
  if (due > 0) {
    shownAt = now;
    showFrame(state.frame + due);
    if (state.frame === last) return play(false);
  }
  requestAnimationFrame(advance);
}

function moveCell(rows, columns) {
  const [maxRow, maxColumn] = animation().layer.grid;
  const [row, column] = state.cell ?? [0, 0];
  const inside = (value, size) => Math.min(size - 1, Math.max(0, value));
  choose(state.cell === null ? [0, 0] : [inside(row + rows, maxRow), inside(column + columns, maxColumn)]);
  $("cursor").scrollIntoView({ block: "nearest", inline: "nearest" });
}

function onKey(event) {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const { target, key } = event;
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const inMask = target === $("sheet");
  if (target.matches("select, [type=radio], [type=checkbox]") || target.closest(".plot")) return;
  if (key === " " && !target.matches("button, summary")) {
    play(!state.playing);
  } else if (key === "Escape" && inMask) {
    choose(null);
    target.blur();
  } else if (key in moves) {
    const [down, right] = moves[key];
    if (inMask && animation().transposed) moveCell(right, down);
    else if (inMask) moveCell(down, right);
    else if (down) chooseLayer(state.layer + down);
    else { play(false); showFrame(state.frame + right); }
  } else return;
  event.preventDefault();
}

// -- curves ---------------------------------------------------------------------------------------

const SHARES = new Set(["density", "churn", "survival", "ever"]);

/** A plot with a line at the displayed frame. */
class Panel extends Plot {
  /**
   * @param lines function that returns Plotly's lines in the current colours
   * @param sharedLegend whether the lines use the legend shared by all plots of layers
   */
  constructor(parent, title, note, lines, { share = false, fromZero = true, sharedLegend = false } = {}) {
    super(parent, title, note, () => {
      const shown = lines();
      return {
        lines: shown,
        xaxis: { ...STEP, range: [data.steps[0], Math.max(data.steps[0] + 1, data.steps[1])] },
        yaxis: { ...(share && SHARE), rangemode: fromZero ? "tozero" : "normal" },
        showlegend: shown.length > 1 && !sharedLegend,
      };
    });
    this.now = element("div", "", { class: "now" });
  }

  begin() {
    this.plot.append(this.now);
    this.plot.on("plotly_afterplot", () => this.mark());
    this.plot.on("plotly_click", ({ points }) => {
      play(false);
      showFrame(nearestFrame(points[0].x));
    });
    this.mark();
  }

  /** Move only the line; redrawing the plot at every frame would be too slow. */
  mark() {
    if (!this.drawn || !(this.visible || printing)) return;
    const { xaxis, yaxis } = this.plot._fullLayout;
    const x = xaxis.d2p(data.frames[state.frame].step);
    this.now.hidden = x < 0 || x > xaxis._length;
    this.now.style.transform = `translate(${xaxis._offset + x - 0.75}px, ${yaxis._offset}px)`;
    this.now.style.height = `${yaxis._length}px`;
  }
}

function nearestFrame(step) {
  let best = 0;
  data.frames.forEach((frame, i) => {
    if (Math.abs(frame.step - step) < Math.abs(data.frames[best].step - step)) best = i;
  });
  return best;
}

function buildCurves() {
  const { step, total, layers } = data.curves;
  const sentence = (text) => $("curves").append(element("p", text, { class: "note" }));
  if (data.recorded === 1) {
    return sentence("Nothing changed yet: the history holds the initial masks, and no update after them.");
  }
  const named = [
    ["density", "Density", "share of all blocks that are present"],
    ["churn", "Churn", "share of the present blocks replaced by others in each update"],
    ["survival", "Survival", "share of the present blocks kept by each update"],
    ["ever", "Ever active (Rs)", "share of all blocks that were present at any time so far"],
    ["dead_outputs", "Dead outputs", "output features whose block rows have no block, so that they are constant"],
    ["unread_inputs", "Unread inputs", "input features whose block columns have no block, so that they have no effect"],
  ];
  const constant = { // the text shown instead of a line that always has this value
    churn: [0, "No block was ever replaced by another."],
    survival: [1, "No block was ever dropped."],
    ever: [1, "Every block has been present: the training began dense."],
    dead_outputs: [0, "Every block row always had a block."],
    unread_inputs: [0, "Every block column always had a block."],
  };
  for (const [key, title, note] of named) {
    // The first frame is no update, so it has no churn or survival.
    const from = key === "churn" || key === "survival" ? 1 : 0;
    if (key in constant && total[key].every((value) => value === constant[key][0])) {
      const panel = element("div", "", { class: "panel" });
      panel.append(element("h3", title), element("p", note), element("div", constant[key][1], { class: "plot sentence" }));
      $("curves").append(panel);
      continue;
    }
    new Panel($("curves"), title, note, () => {
      const drawn = layers.map((layer, i) => layerLine(i, step.slice(from), layer[key].slice(from)));
      const all = line(step.slice(from), total[key].slice(from), ALL, style.accent, 3);
      return layers.length > 1 ? [{ ...all, visible: !state.hidden.has(ALL), zorder: 1 }, ...drawn] : drawn;
    }, { share: SHARES.has(key), fromZero: key !== "survival", sharedLegend: true });
  }
  if (layers.length > 1) buildLegend();
}

function layerLine(index, x, y) {
  const { name } = data.layers[index];
  const chosen = index === state.layer;
  return { ...line(x, y, name, chosen ? style.kept : style.unknown, chosen ? 2.5 : 1),
    visible: chosen || !state.hidden.has(groupOf(index)), zorder: chosen ? 2 : 0 };
}

/** The shared legend of all plots with one line per layer. */
function buildLegend() {
  if (data.layers.length > MAX_LAYERS) groups.forEach((_, index) => state.hidden.add(index));
  const chips = [[ALL, ALL], ...groups.map((group, index) => [index, groupName(group)])].map(([key, name]) => {
    const chip = element("button", "", { type: "button", class: "chip" });
    chip.append(breakable(name));
    const show = () => chip.setAttribute("aria-pressed", !state.hidden.has(key));
    chip.addEventListener("click", () => {
      if (!state.hidden.delete(key)) state.hidden.add(key);
      show();
      refreshPanels();
    });
    show();
    return chip;
  });
  $("lines-shown").append(...chips);
  $("lines-shown").hidden = false;
}

function buildMetrics() {
  const layers = new Map(data.layers.map((layer, index) => [layer.name, index]));
  const groups = new Map();
  for (const metric of data.metrics) {
    if (!groups.has(metric.panel)) groups.set(metric.panel, []);
    groups.get(metric.panel).push(metric);
  }
  if (!groups.size) {
    $("metrics").append(element("p", "No metric was recorded: the training logged none, or it ended before the first one.", { class: "note" }));
  }
  for (const [title, metrics] of groups) {
    const indices = metrics.map(({ name }) => layers.get(name.slice(title.length + 1)));
    if (indices.every((index) => index !== undefined)) {
      new Panel($("metrics"), title, "by layer", () =>
        metrics.map((metric, i) => layerLine(indices[i], metric.step, metric.value)),
      { sharedLegend: true, fromZero: false });
      continue;
    }
    const names = metrics.map((metric) => metric.name).filter((name) => name !== title);
    new Panel($("metrics"), title, metrics.length === 1 ? names.join() : "", () =>
      metrics.map(({ step, value, name }, i) => line(step, value, name, LINES[i % LINES.length], 2)));
  }
}

// -- the table ------------------------------------------------------------------------------------

/** Whether blocks of any layer keep only some of their weights. */
const PATTERNS = data.layers.some((layer) => layer.nm !== null);

const COLUMNS = [
  ["Layer", groupName, (value) => value],
  ["Shape", (layer) => layer.grid[0] * layer.grid[1] * layer.block_size ** 2,
    (_, layer) => layer.grid.map((n) => n * layer.block_size).join("×")],
  ["Block size", (layer) => layer.block_size, (n, { nm }) => (nm === null ? whole(n) : `${whole(n)} at ${nm}`)],
  ["Blocks", (layer) => layer.row.present,
    (n, { grid, layers }) => `${whole(n)} of ${whole(grid[0] * grid[1] * layers.length)}`],
  ["Density", (layer) => layer.row.density, percent],
  ...(PATTERNS ? [["Weight density", (layer) => layer.row.weight_density ?? layer.row.density, percent]] : []),
  ["Ever active", (layer) => layer.row.ever, percent],
  ["Dead outputs", (layer) => layer.row.dead_outputs, whole],
  ["Unread inputs", (layer) => layer.row.unread_inputs, whole],
  ["Blocks replaced in total", (layer) => layer.row.replaced, whole],
  ["Mean age, steps", (layer) => layer.row.age, (n) => number(n, 4)],
  ["Mean score", (layer) => layer.row.score, (n) => number(n, 4)],
];

const rows = () => (state.every || printing ? singles : groups);

function buildTable() {
  $("table-note").textContent = `At the last frame, step ${whole(data.frames[last].step)}. `
    + "Ages are averaged over the present blocks, scores over the last recorded ones.";
  $("every").parentElement.hidden = groups.length === singles.length;
  fillRows();
}

/** Fill the table with a row for each group or for each layer. */
function fillRows() {
  $("layers").tHead.replaceChildren();
  $("layers").tBodies[0].replaceChildren();
  fillTable($("layers"), COLUMNS, rows(), (index) => {
    const { layers } = rows()[index];
    if (!layers.includes(state.layer)) chooseLayer(layers[0]);
  });
  markRow();
}

function markRow() {
  selectRow($("layers"), rows().findIndex(({ layers }) => layers.includes(state.layer)));
}

// -- the header -----------------------------------------------------------------------------------

function buildHeader() {
  const { weights, layers, updates, frames, recorded } = data;
  $("title").textContent = data.title;
  const changed = data.layers.some((layer) => layer.row.replaced > 0 || layer.row.ever !== layer.row.density);
  const told = (first, end) => (percent(first) === percent(end)
    ? `stayed at ${percent(end)}` : `went from ${percent(first)} to ${percent(end)}`);
  const density = told(...data.density);
  $("lede").textContent = `How the weight blocks of ${many(layers.length, "layer")} changed. The density ${density} in `
    + `${many(updates, "update")}.`
    + (PATTERNS ? " Blocks keep two of each four weights in a row (2:4), so the share of weights "
      + `${told(weights.first / weights.dense, weights.last / weights.dense)}.` : "");
  $("gaps").textContent = data.gaps;
  $("gaps").hidden = data.gaps === "";
  const facts = [
    ["Steps", `${whole(data.steps[0])} to ${whole(data.steps[1])}`],
    ["Updates", whole(updates)],
    ["Weights of these layers", shorter(weights.last),
      weights.first === weights.last ? ` of ${shorter(weights.dense)} dense`
        : ` at the end, ${shorter(weights.first)} initially, ${shorter(weights.dense)} dense`],
    ["Time", duration(data.seconds[1] - data.seconds[0])],
  ];
  for (const [name, value, aside] of facts) {
    const fact = element("div");
    const shown = element("dd", value);
    if (aside) shown.append(element("small", aside));
    fact.append(element("dt", name), shown);
    $("facts").append(fact);
  }
  const about = data.about.filter(([key]) => !key.startsWith("config."));
  $("made").textContent = about.map(([key, value]) => `${key.replaceAll("_", " ")} ${value}`).join(" · ");
  const config = data.about.filter(([key]) => key.startsWith("config."));
  $("about").hidden = config.length === 0;
  for (const [key, value] of config) {
    const pair = element("div");
    pair.append(element("dt", key.slice("config.".length)), element("dd", value));
    $("config").append(pair);
  }
  const notes = [];
  if (last === 0) notes.push("There is only one frame, because no update was recorded.");
  else if (!changed) notes.push("The topology is static: no block was grown or dropped.");
  if (recorded > frames.length) {
    notes.push(`${whole(recorded)} frames were recorded. The animations show ${frames.length}, evenly spaced: each `
      + `combines about ${number(recorded / frames.length, 2)} updates. Curves and table include every update.`);
  }
  $("still").textContent = notes.join(" ");
  $("still").hidden = notes.length === 0;
  $("play").disabled = $("slider").disabled = $("speed").disabled = last === 0;
  $("slider").max = last;
}

// -- start ----------------------------------------------------------------------------------------

function listen() {
  $("play").addEventListener("click", () => play(!state.playing));
  $("slider").addEventListener("input", (event) => { play(false); showFrame(Number(event.target.value)); });
  $("colours").addEventListener("change", (event) => { setColour(event.target.value); draw(); });
  $("every").addEventListener("change", (event) => { state.every = event.target.checked; fillRows(); });
  $("smaller").addEventListener("click", () => zoom(1 / 2));
  $("larger").addEventListener("click", () => zoom(2));
  const sheet = $("sheet");
  let held = false; // whether a block was selected by click or keys, and stays selected
  sheet.addEventListener("pointermove", (event) => { if (!held) choose(cellAt(event)); });
  sheet.addEventListener("pointerleave", () => { if (!held && document.activeElement !== sheet) choose(null); });
  sheet.addEventListener("click", (event) => { held = true; choose(cellAt(event)); });
  sheet.addEventListener("focus", () => { held = true; if (state.cell === null) choose([0, 0]); });
  sheet.addEventListener("blur", () => { held = false; choose(null); });
  document.addEventListener("keydown", onKey);
  addEventListener("resize", layOut);
  followTheme(() => { draw(); refreshPanels(); });
}

async function begin() {
  setTheme(preferredTheme());
  buildHeader();
  if (typeof DecompressionStream === "undefined") {
    $("still").textContent = "This browser cannot decompress the data. Use a browser from 2023 or later.";
    $("still").hidden = false;
    return;
  }
  animations = await Promise.all(data.layers.map(async (layer) =>
    new RunAnimation(layer, await unpack(layer.animation), await unpack(layer.scores.levels))));
  buildTable();
  buildGallery();
  buildCurves();
  buildMetrics();
  listen();
  listenForPrinting(() => {
    play(false);
    layOut();
    draw();
    if (groups.length < singles.length) fillRows();
    refreshPanels();
  });
  chooseLayer(0);
  document.documentElement.dataset.ready = "true";
}

begin();
