// The page that compares runs. A run has the same colour everywhere.

const { runs } = data;
const last = runs[0].frames.length - 1; // all runs have masks at the same shares of their steps
const state = { metric: data.metric, over: "density", layer: data.layers[0], run: null, hidden: new Set() };

const OVER = { // what the quality is shown over: its name, the title of its axis, and the axis
  density: ["density", "density at the end", SHARE],
  flops: ["FLOPs", "FLOPs of the block-sparse layers, relative to dense", SHARE],
  weights: ["weights", "present weights of the block-sparse layers at the end", { tickformat: "~s" }],
  seconds: ["time", "training time in seconds", {}],
};
const DASHES = ["solid", "dash", "dot", "dashdot"]; // used in turn when all colours are taken
const SYMBOLS = ["circle", "square", "diamond", "triangle-up"];

const colour = (index) => LINES[index % LINES.length];
const turn = (index, kinds) => kinds[Math.floor(index / LINES.length) % kinds.length];

/** A run's values of the chosen metric; null if it logged none. */
const measured = (run) => run.metrics[state.metric] ?? null;
const shown = (value, show) => (value === null ? "–" : show(value));

function swatch(index) {
  const mark = element("i", "", { class: `swatch ${turn(index, SYMBOLS)}` });
  mark.style.background = colour(index);
  return mark;
}

// -- the table ------------------------------------------------------------------------------------

function buildTable() {
  const metric = state.metric === null ? [] : [
    [`last ${state.metric}`, (run) => measured(run)?.last ?? null, (value) => number(value, 4)],
    [`best ${state.metric}`, (run) => measured(run)?.best ?? null, (value) => number(value, 4)],
  ];
  const options = data.options.map((name, i) =>
    [name, (run) => run.options[i], (value) => shown(value, String)]);
  const columns = [
    ["Run", (run) => run.name, (value) => value],
    ...options,
    ["Density", (run) => run.density, percent],
    ["Weights", (run) => run.weights, (n, run) => `${shorter(n)} of ${shorter(run.dense_weights)}`],
    ["FLOPs", (run) => run.flops, percent],
    ["Time", (run) => run.seconds, (value) => shown(value, duration)],
    ...metric,
  ];
  $("runs").tHead.replaceChildren();
  $("runs").tBodies[0].replaceChildren();
  fillTable($("runs"), columns, runs, chooseRun);
  [...$("runs").tBodies[0].rows].forEach((row, index) => row.querySelector("button").prepend(swatch(index)));
  selectRow($("runs"), state.run);
}

/** Highlight a run; a second time, no run. */
function chooseRun(index) {
  state.run = state.run === index ? null : index;
  selectRow($("runs"), state.run);
  refreshPanels();
}

// -- the plots ------------------------------------------------------------------------------------

function runLine(index, x, y) {
  const chosen = index === state.run;
  const drawn = line(x, y, runs[index].name, colour(index), chosen ? 4 : 2);
  return { ...drawn, line: { ...drawn.line, dash: turn(index, DASHES) }, opacity: state.run === null || chosen ? 1 : 0.3,
    visible: !state.hidden.has(index), zorder: chosen ? 1 : 0 };
}

function runPoint(index) {
  const run = runs[index];
  const value = measured(run)?.last ?? null;
  const x = run[state.over];
  const drawn = value !== null && x !== null;
  const chosen = index === state.run;
  return { x: drawn ? [x] : [], y: drawn ? [value] : [], name: plain(run.name), mode: "markers",
    opacity: state.run === null || chosen ? 1 : 0.3, visible: !state.hidden.has(index), zorder: chosen ? 1 : 0,
    marker: { color: colour(index), size: chosen ? 17 : 12, symbol: turn(index, SYMBOLS) },
    hovertemplate: `%{y:.4~g}, %{x${OVER[state.over][2] === SHARE ? ":.2%" : ":.4~s"}}<extra>${plain(run.name)}</extra>` };
}

let metricPlots = []; // those whose title is the metric's name

function buildPlots() {
  const all = (draw) => runs.map((_, index) => draw(index));
  if (state.metric === null) {
    $("bar").hidden = $("over-what").hidden = true;
    $("quality-note").textContent = "No run logged a metric, or each ended before the first one.";
  } else {
    metricPlots = [
      new Plot($("quality"), "", "", () => {
        const [, title, axis] = OVER[state.over];
        return { lines: all(runPoint), xaxis: { ...axis, rangemode: "tozero", title: { text: title, standoff: 8 } },
          yaxis: {}, showlegend: false };
      }),
      new Plot($("curves"), "", "as the training logged it", () => ({
        lines: all((index) => {
          const { step = [], value = [] } = measured(runs[index]) ?? {};
          return runLine(index, step, value);
        }),
        xaxis: STEP, yaxis: {}, showlegend: false,
      })),
    ];
  }
  const share = (key, from) => () => ({
    lines: all((index) => runLine(index, runs[index].curves.step.slice(from), runs[index].curves[key].slice(from))),
    xaxis: STEP, yaxis: { ...SHARE, rangemode: "tozero" }, showlegend: false,
  });
  new Plot($("curves"), "Density", "share of all blocks that are present", share("density", 0));
  // The first frame is no update, so it has no churn.
  new Plot($("curves"), "Churn", "share of the present blocks that each update replaced", share("churn", 1));
  runs.forEach((run, index) => {
    const chip = element("button", run.name, { type: "button", class: "chip", "aria-pressed": true });
    chip.prepend(swatch(index));
    chip.addEventListener("click", () => {
      if (!state.hidden.delete(index)) state.hidden.add(index);
      chip.setAttribute("aria-pressed", !state.hidden.has(index));
      refreshPanels();
    });
    $("lines-shown").append(chip);
  });
}

function chooseMetric(name) {
  state.metric = name;
  for (const plot of metricPlots) plot.title.textContent = name;
  if (name !== null) {
    $("best").textContent = `The best value of ${name} is the ${data.metrics[name]}.`;
    const missing = runs.filter((run) => (measured(run)?.last ?? null) === null).length;
    $("chosen").textContent = missing ? `${whole(missing)} of ${many(runs.length, "run")} without it` : "";
    $("quality-note").textContent = "The last value of the metric; a point is a run.";
  }
  buildTable();
  refreshPanels();
}

// -- the masks ------------------------------------------------------------------------------------

let figures = []; // {masks, canvas, caption, run} of the runs that have the chosen layer

async function chooseLayer(name) {
  state.layer = name;
  const made = await Promise.all(runs.map(async (run, index) => {
    const figure = element("figure");
    const caption = element("figcaption");
    const title = element("b");
    title.append(swatch(index), element("span", run.name));
    caption.append(title);
    const layer = run.layers[name];
    if (layer === undefined) {
      caption.append("This run has no block-sparse layer of this name.");
      figure.append(caption);
      return { figure };
    }
    const masks = new MaskAnimation(layer, await unpack(layer.animation));
    const canvas = element("canvas", "", { role: "img", "aria-label": `Block mask of ${name} in ${run.name}` });
    canvas.classList.toggle("fine", masks.width > 280);
    const text = element("span");
    caption.append(text);
    figure.append(canvas, caption);
    return { figure, masks, canvas, text, run };
  }));
  if (state.layer !== name) return; // another one was chosen meanwhile
  figures = made;
  $("masks").replaceChildren(...figures.map(({ figure }) => figure));
  drawMasks();
}

function drawMasks() {
  const frame = Number($("slider").value);
  const when = frame === last ? "at the end" : frame === 0 ? "at the start" : `after ${percent(frame / last)} of the steps`;
  $("when").textContent = when;
  $("slider").setAttribute("aria-valuetext", when);
  for (const { masks, canvas, text, run } of figures) {
    if (masks === undefined) continue;
    masks.seek(frame);
    masks.draw(canvas);
    const [outputs, inputs] = masks.layer.grid.map((n) => whole(n * masks.layer.block_size));
    text.textContent = `${percent(masks.count().present / masks.blocks)} since step ${whole(run.frames[frame])} · `
      + `${outputs}×${inputs} in blocks of ${masks.layer.block_size}${masks.layer.nm === null ? "" : ` at ${masks.layer.nm}`}`;
  }
}

// -- start ----------------------------------------------------------------------------------------

function fill(select, pairs, value) {
  select.append(...pairs.map(([key, text]) => element("option", text, { value: key })));
  select.value = value;
}

function begin() {
  setTheme(preferredTheme());
  $("title").textContent = data.title;
  const densities = runs.map((run) => run.density);
  const [low, high] = [Math.min(...densities), Math.max(...densities)].map(percent);
  $("lede").textContent = `${many(runs.length, "run")}, with ${many(data.options.length, "option")} in which they differ. `
    + `Their final density is ${low === high ? low : `${low} to ${high}`}.`;
  $("patterns").hidden = !runs.some((run) => Object.values(run.layers).some((layer) => layer.nm !== null));
  const gaps = runs.filter((run) => run.gaps).map((run) => `${run.name}: ${run.gaps}`);
  $("gaps").textContent = gaps.join(" ");
  $("gaps").hidden = gaps.length === 0;
  fill($("metric"), Object.keys(data.metrics).map((name) => [name, name]), state.metric);
  fill($("over"), Object.entries(OVER).map(([key, [name]]) => [key, name]), state.over);
  $("slider").max = $("slider").value = last;
  fill($("layer"), data.layers.map((name) => [name, name]), state.layer);
  buildPlots();
  chooseMetric(state.metric);
  $("metric").addEventListener("change", (event) => chooseMetric(event.target.value));
  $("over").addEventListener("change", (event) => { state.over = event.target.value; refreshPanels(); });
  $("layer").addEventListener("change", (event) => chooseLayer(event.target.value));
  $("slider").addEventListener("input", drawMasks);
  const repaint = () => { drawMasks(); refreshPanels(); };
  followTheme(repaint);
  listenForPrinting(repaint);
  if (typeof DecompressionStream === "undefined") {
    $("still").textContent = "This browser cannot decompress the masks. Use a browser from 2023 or later.";
    $("still").hidden = false;
  } else {
    chooseLayer(state.layer).then(() => { document.documentElement.dataset.ready = "true"; });
  }
}

begin();
