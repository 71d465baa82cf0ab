// heat: the pass rate of each prompt in each iteration. Where there are more prompts than rows of pixels,
// neighbours in the order by pass rate share a row, which is then the mean over their rollouts.

const ROW_PX = 3; // the least height at which a row can still be seen and pointed at
const HEAT_PX = 480;
const TICK_PX = 80; // of a label such as 1200–1209
const COLORS = [[0, "#b93a14"], [0.25, "#ea8f4f"], [0.5, "#f4dcb0"], [0.75, "#93c9ba"], [1, "#217f6f"]];

function setUpHeat(page, heats, open) {
  const run = $("heat-run");
  run.replaceChildren(...page.runs.map((each, index) => option(index, each.run)));
  run.parentElement.hidden = page.runs.length < 2;
  $("heat-column").replaceChildren(option("auto", "auto"), option("1", "1 iteration"), option("5", "5 iterations"), option("10", "10 iterations"));
  const draw = () => drawHeat(heats[run.value], $("heat-column").value, (found) => open(Number(run.value), found));
  run.onchange = $("heat-column").onchange = draw;
  return draw;
}

// Prompts from the hardest to the easiest: by how far they are from the mean of the iterations that drew them,
// as one that was drawn early only would else pass for hard. Where all are always drawn, that is their rate.
function ranked(heat) {
  const { prompt, iteration, mean, rollouts } = heat.columns;
  const usual = averages(iteration, mean, rollouts);
  const rate = averages(prompt, mean, rollouts);
  const apart = averages(prompt, mean.map((value, i) => value - usual[iteration[i]]), rollouts);
  const order = [...apart.keys()].sort((a, b) => apart[a] - apart[b] || rate[a] - rate[b] || a - b);
  return { order, rate };
}

// The mean of the values of each key, weighed.
function averages(keys, values, weights) {
  const size = keys.reduce((a, b) => Math.max(a, b), -1) + 1;
  const [sums, totals] = [new Float64Array(size), new Float64Array(size)];
  for (let i = 0; i < keys.length; i++) {
    sums[keys[i]] += values[i] * weights[i];
    totals[keys[i]] += weights[i];
  }
  return sums.map((sum, i) => sum / totals[i]);
}

// Cells of the map: perRow prompts and perColumn iterations together, weighed by their rollouts.
function binned(heat, order, perRow, perColumn, first, last) {
  const { prompt, iteration, mean, rollouts } = heat.columns;
  const rowOf = new Uint32Array(order.length);
  order.forEach((index, place) => { rowOf[index] = Math.floor(place / perRow); });
  const rows = Math.ceil(order.length / perRow);
  const columns = Math.floor((last - first) / perColumn) + 1;
  const sums = Array.from({ length: rows }, () => new Float64Array(columns));
  const counts = Array.from({ length: rows }, () => new Float64Array(columns));
  for (let i = 0; i < prompt.length; i++) {
    const column = Math.floor((iteration[i] - first) / perColumn);
    sums[rowOf[prompt[i]]][column] += mean[i] * rollouts[i];
    counts[rowOf[prompt[i]]][column] += rollouts[i];
  }
  const z = sums.map((row, r) => [...row].map((sum, c) => (counts[r][c] ? sum / counts[r][c] : null)));
  return { z, counts };
}

function drawHeat(heat, wanted, open) {
  const plot = $("heat");
  if (!heat.prompts.length) {
    plot.replaceChildren(make("div", "empty", `Nothing to map: ${heat.absent}.`));
    return;
  }
  const { iteration } = heat.columns;
  const [first, last] = [iteration.reduce((a, b) => Math.min(a, b)), iteration.reduce((a, b) => Math.max(a, b))];
  const { order, rate } = ranked(heat);
  const perRow = Math.max(1, Math.ceil((order.length * ROW_PX) / HEAT_PX));
  const perColumn = wanted === "auto" ? columnWidth(heat, first, last, plot.clientWidth) : Number(wanted);
  const { z, counts } = binned(heat, order, perRow, perColumn, first, last);
  describeHeat(heat, order.length, perRow, perColumn);
  const x = z[0].map((_, c) => first + c * perColumn + (perColumn - 1) / 2); // the middle of its iterations
  const trace = {
    type: "heatmap", z, x, y: z.map((_, r) => r), hoverinfo: "none", xgap: x.length < 100 ? 1 : 0, ygap: z.length < 120 ? 1 : 0,
    colorscale: COLORS, ...(heat.binary ? { zmin: 0, zmax: 1 } : {}),
    colorbar: { thickness: 12, outlinewidth: 0, tickformat: heat.binary ? ".0%" : "~g", len: 1, ypad: 0, x: 1.01 },
  };
  const layout = {
    ...plain(), margin: { l: 64, r: 8, t: 6, b: 38 }, height: Math.max(180, Math.min(HEAT_PX, z.length * 9)) + 44, dragmode: false,
    xaxis: { title: { text: "iteration", standoff: 6 }, showgrid: false, zeroline: false, fixedrange: true, ...columnTicks(x, first, last, perColumn, plot.clientWidth) },
    yaxis: { showgrid: false, zeroline: false, fixedrange: true, ticktext: ["hardest", "easiest"], tickvals: [0, z.length - 1], autorange: "reversed" },
  };
  Plotly.react(plot, [trace], layout, { displayModeBar: false, responsive: true });
  const place = (event) => {
    const [r, c] = event.points[0].pointIndex;
    return { r, ...iterationsOf(c, first, last, perColumn), members: order.slice(r * perRow, (r + 1) * perRow), rollouts: counts[r][c], value: z[r][c] };
  };
  plot.removeAllListeners("plotly_hover");
  plot.removeAllListeners("plotly_click");
  plot.on("plotly_hover", (event) => point(heat, order.length, rate, place(event)));
  plot.on("plotly_click", (event) => open({ ...place(event), ids: place(event).members.map((index) => heat.prompt_ids[index]) }));
  $("heat-pointed").replaceChildren("Point at a cell for its prompt; click to read its rollouts below.");
}

// Wide enough that a prompt is drawn about once a column, and no narrower than three pixels.
function columnWidth(heat, first, last, pixels) {
  const iterations = last - first + 1;
  const drawsPerIteration = heat.columns.prompt.length / iterations;
  const wanted = Math.max(heat.prompts.length / drawsPerIteration, (iterations * 3) / Math.max(pixels - 120, 200));
  return Math.max(1, Math.min(Math.ceil(wanted - 0.2), Math.ceil(iterations / 12)));
}

// The iterations of a column; the last one may have fewer.
function iterationsOf(column, first, last, perColumn) {
  const from = first + column * perColumn;
  return { from, to: Math.min(from + perColumn - 1, last) };
}

// The iterations of as many columns as can be read, each in the middle of its column; every 1, 2, 5, 10, 20 ...
function columnTicks(x, first, last, perColumn, pixels) {
  const least = Math.max(1, (x.length * TICK_PX) / pixels);
  const power = 10 ** Math.floor(Math.log10(least));
  const every = power * [1, 2, 5, 10].find((step) => step * power >= least);
  const columns = [...x.keys()].filter((column) => column % every === 0);
  const ticktext = columns.map((column) => {
    const { from, to } = iterationsOf(column, first, last, perColumn);
    return from === to ? `${from}` : `${from}–${to}`;
  });
  return { tickvals: columns.map((column) => x[column]), ticktext };
}

function describeHeat(heat, prompts, perRow, perColumn) {
  $("heat-title").textContent = heat.binary ? "Pass rate by prompt" : "Mean reward by prompt";
  const parts = [`${heat.reward}, ${whole.format(prompts)} prompts from hardest to easiest, against the mean of the iterations that drew them`];
  if (perRow > 1) parts.push(`a row is the mean over ${perRow} prompts next to each other in that order`);
  if (perColumn > 1) parts.push(`a column is the mean over ${perColumn} iterations`);
  $("heat-caption").textContent = `${parts.join("; ")}; empty: not drawn`;
}

function point(heat, prompts, rate, at) {
  if (at.value === null) {
    $("heat-pointed").replaceChildren("Not drawn in these iterations.");
    return;
  }
  const unit = heat.binary ? "share" : "";
  const when = at.from === at.to ? `iteration ${at.from}` : `iterations ${at.from}–${at.to}`;
  const [index] = at.members;
  const who = at.members.length === 1
    ? `prompt ${heat.prompt_ids[index]}, ${number(rate[index], unit)} over the whole run`
    : `${at.members.length} prompts, such as ${heat.prompt_ids[index]}`;
  $("heat-pointed").replaceChildren(
    make("b", "", number(at.value, unit)), ` of ${whole.format(at.rollouts)} rollouts · ${when} · ${who}`,
    make("pre", "", ...visible(heat.prompts[index])),
  );
}
