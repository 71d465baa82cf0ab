// charts: the curves as cards, all runs in each; a colour a run, a dash a series.

const DASHES = ["solid", "dot", "dash", "dashdot"];
const drawn = []; // {chart, plot}

function drawCharts(page, hidden) {
  for (const section of ["training", "evaluation"]) {
    const charts = page.charts.filter((chart) => chart.section === section);
    const present = charts.filter((chart) => chart.series.length);
    const reasons = charts.filter((chart) => !chart.series.length).map((chart) => `${chart.title} (${chart.absent})`);
    if (!drawn.some((each) => each.chart.section === section)) {
      $(`charts-${section}`).replaceChildren(...present.map((chart) => card(chart, page.runs)));
    }
    const where = page.runs.length > 1 ? "these runs" : "this run";
    const left = reasons.length ? `Not in ${where}: ${reasons.join(", ")}.` : "";
    $(`absent-${section}`).textContent = section === "training" ? left : present.length ? "" : `No evaluation in ${where}.`;
  }
  for (const each of drawn) plotCurve(each.chart, each.plot, page.runs, hidden);
}

function card(chart, runs) {
  const plot = make("div", "plot");
  const shown = chart.unit && chart.unit !== "share" ? make("small", "", ` ${chart.unit}`) : null;
  const names = seriesNames(chart);
  const last = runs.length === 1 && names.length === 1 ? number(chart.series[0].y.at(-1), chart.unit === "share" ? "share" : "") : null;
  const keys = names.length > 1 && !(chart.stacked && runs.length > 1) ? make("div", "keys", ...names.map((name, i) => key(chart, name, i))) : null;
  drawn.push({ chart, plot });
  return make(
    "article", "card chart",
    make("header", "", make("h3", "", chart.title, shown), last && make("span", "latest", last)),
    make("p", "", chart.stacked && runs.length > 1 ? "Seconds of an iteration, all stages together." : chart.meaning),
    keys, plot,
  );
}

function key(chart, name, index) {
  const mark = make("i", chart.stacked ? "box" : "");
  if (chart.stacked) mark.style.setProperty("--c", `var(--stage-${index % 5})`);
  else mark.style.borderTopStyle = ["solid", "dotted", "dashed", "dashed"][index % 4];
  return make("span", "", mark, name);
}

function seriesNames(chart) {
  return [...new Set(chart.series.map((series) => series.name))];
}

function plotCurve(chart, plot, runs, hidden) {
  const order = runs.map((run) => run.run);
  const series = chart.series.filter((each) => !hidden.has(each.run));
  const stacked = chart.stacked && runs.length === 1;
  const traces = series.flatMap((each) => {
    const index = seriesNames(chart).indexOf(each.name);
    return stacked ? [area(each, index)] : lines(each, order.indexOf(each.run), index, chart.unit, runs.length);
  });
  const first = !plot.data;
  Plotly.react(plot, traces, curveLayout(chart, series), { displayModeBar: false, responsive: true });
  plot.full = [...plot.layout.xaxis.range];
  if (first) plot.on("plotly_relayout", (change) => zoomAll(plot, change));
}

function area(series, index) {
  return {
    x: series.x, y: series.y, name: escaped(series.name), stackgroup: "all", mode: "lines",
    line: { width: 0, color: color(`--stage-${index % 5}`) }, fillcolor: color(`--stage-${index % 5}`),
    hovertemplate: "%{y:.3f} s",
  };
}

function lines(series, run, index, unit, numRuns) {
  const tint = color(runColor(run));
  const name = numRuns > 1 ? [series.run, series.name].filter(Boolean).join(" ") : series.name;
  const trace = {
    x: series.x, y: series.y, name: escaped(name), mode: series.x.length > 1 ? "lines" : "markers",
    line: { color: tint, width: 2, dash: DASHES[index % 4] }, marker: { color: tint, size: 7 },
    hovertemplate: (unit === "share" ? "%{y:.1%}" : "%{y:.4~g}") + (name ? "" : "<extra></extra>"),
  };
  if (!series.low) return [trace];
  const band = {
    x: [...series.x, ...series.x.toReversed()], y: [...series.high, ...series.low.toReversed()],
    fill: "toself", fillcolor: tint, opacity: 0.15, line: { width: 0 }, mode: "lines", hoverinfo: "skip",
  };
  return [band, trace];
}

function curveLayout(chart, series) {
  const values = series.flatMap((each) => [...each.y, ...(each.low ?? [])]).filter((value) => value !== null);
  const lowest = Math.min(...values);
  const axis = { gridcolor: color("--line"), linecolor: color("--line"), zeroline: false, fixedrange: true, nticks: 5 };
  const y = { ...axis, automargin: true, exponentformat: "power", rangemode: lowest >= 0 ? "tozero" : "normal" };
  if (chart.unit === "share") y.tickformat = ".0%";
  else if (Math.max(...values.map(Math.abs)) >= 0.001) y.tickformat = "~g"; // smaller ones as powers of ten, as in the tiles
  if (Math.max(...values) === 0 && lowest === 0) y.range = [0, 0.1];
  else if (chart.unit === "share" && Math.max(...values) > 0.7) y.range = [Math.min(lowest, 0), 1.03];
  else if (chart.unit === "share" && Math.max(...values) < 0.03) y.tickformat = ".1%";
  const iterations = drawn.flatMap((each) => each.chart.series.flatMap(({ x }) => [x[0], x.at(-1)]));
  const ends = [Math.min(...iterations), Math.max(...iterations)]; // the same in all charts
  return {
    ...plain(), yaxis: y, hovermode: "x unified", dragmode: "zoom",
    xaxis: { ...axis, ...(ends[1] - ends[0] < axis.nticks ? { dtick: 1 } : {}), fixedrange: false, range: ends[0] < ends[1] ? ends : undefined, tickformat: "d", hoverformat: "d", showgrid: false },
  };
}

// What all plots of the page have in common, in the colours of the theme.
function plain() {
  return {
    margin: { l: 46, r: 12, t: 8, b: 26 }, showlegend: false, paper_bgcolor: "transparent", plot_bgcolor: "transparent",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("--muted") },
    hoverlabel: { bgcolor: color("--card"), bordercolor: color("--line"), font: { color: color("--ink"), size: 12.5 } },
  };
}

// What one chart was zoomed to, all are; what is the same already says nothing new.
function zoomAll(source, change) {
  if (!Object.keys(change).some((key) => key.startsWith("xaxis."))) return;
  const range = change["xaxis.autorange"] ? source.full : source.layout.xaxis.range;
  for (const { plot } of drawn) {
    if (String(plot.layout.xaxis.range) !== String(range)) Plotly.relayout(plot, { "xaxis.range": [...range] });
  }
}
