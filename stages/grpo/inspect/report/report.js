// report: the head of the page, its configuration, and the order in which everything is drawn.

async function main() {
  try {
    await draw();
  } catch (error) {
    $("problem").hidden = false;
    $("problem").textContent = typeof DecompressionStream === "undefined"
      ? "This browser is too old to unpack the report: it needs Chrome 80, Firefox 113 or Safari 16.4, or newer."
      : `The report cannot be shown: ${error.message}`;
    throw error;
  }
}

async function draw() {
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  const page = await unpack("data");
  const hidden = new Set();
  head(page);
  configuration(page.runs);
  await loadPlotly();
  legend(page, hidden, () => drawCharts(page, hidden));
  drawCharts(page, hidden);
  const heats = await Promise.all(page.runs.map((_, index) => unpack(`heat-${index}`)));
  const runs = await Promise.all(page.runs.map(async (_, index) => prepared(await unpack(`rollouts-${index}`))));
  const drawMap = setUpHeat(page, heats, setUpBrowser(page, runs));
  drawMap();
  $("rollouts-caption").textContent = page.left_out.length ? `${page.left_out.join("; ")}; the curves count all` : "every rollout of the run, with its tokens";
  $("theme").onclick = () => {
    setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    drawCharts(page, hidden);
    drawMap();
  };
  document.body.dataset.ready = "yes";
  (globalThis.requestIdleCallback ?? setTimeout)(() => runs.forEach(warmUp));
}

// A block of the page, as page.py wrote it: base64 of gzip of JSON, or of the plotting library.
function unpacked(id) {
  const element = $(id);
  const text = atob(element.textContent);
  element.remove(); // it is not needed twice
  const packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
  return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip")));
}

const unpack = (id) => unpacked(id).json();

async function loadPlotly() {
  const script = document.createElement("script");
  script.textContent = await unpacked("plotly").text();
  document.head.append(script);
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = theme === "dark" ? "Light" : "Dark";
}

function head(page) {
  const { runs } = page;
  $("title").textContent = runs.map((run) => run.run).join(" · ");
  const value = (key) => JSON.parse(runs[0].config[key] ?? "null");
  const told = [
    value("model"), value("update.objective"), `${value("generate.prompts_per_iteration")} prompts × ${value("generate.samples_per_prompt")} samples an iteration`,
    `learning rate ${value("update.learning_rate")}`,
  ];
  $("subtitle").textContent = runs.length === 1 ? told.join(" · ") : `${runs.length} runs; what differs between them is marked under Configuration`;
  $("summary").replaceChildren(runs.length === 1 ? tiles(page) : overview(page));
}

// The numbers of a run that one asks for first: from curves and counts, with how they began.
function facts(page, run) {
  const ends = (title) => {
    const chart = page.charts.find((each) => each.title === title);
    const found = chart?.series.find((each) => each.run === run.run);
    return found ? { first: found.y[0], last: found.y.at(-1) } : null;
  };
  return { reward: ends("Reward"), passed: ends(passRate(page)), kl: ends("KL to the reference"), length: ends("Response length"), truncated: ends("Truncated"), held: ends("Held-out pass@k") };
}

// The title of the first curve that is a pass rate; it says of which reward.
function passRate(page) {
  return page.charts.find((chart) => chart.title.startsWith("Pass rate: "))?.title ?? "Pass rate";
}

function tiles(page) {
  const [run] = page.runs;
  const { reward, passed, kl, length, truncated, held } = facts(page, run);
  const list = [
    passed && [number(passed.last, "share"), `${passRate(page).replace("Pass", "pass")}, from ${number(passed.first, "share")}`],
    reward && [number(reward.last), `reward, from ${number(reward.first)}`],
    held && [number(held.last, "share"), `held-out pass@1, from ${number(held.first, "share")}`],
    kl && [number(kl.last), "KL to the reference, nats"],
    length && [number(length.last), `response tokens, from ${number(length.first)}`],
    truncated && [number(truncated.last, "share"), "cut off"],
    [number(run.rollouts), `rollouts in ${number(run.iterations)} iterations`],
    [number(run.prompts), "different prompts"],
    run.seconds === null ? null : [duration(run.seconds), `${number(Math.round(run.tokens / run.seconds))} response tokens a second`],
  ];
  return make("div", "tiles", ...list.filter(Boolean).map(([value, text]) => make("div", "tile", make("b", "", value), make("span", "", text))));
}

function overview(page) {
  const names = ["Run", "Iterations", "Rollouts", "Reward, first → last", `${passRate(page)}, last`, "KL, last", "Tokens, last", "Time"];
  const rows = page.runs.map((run, index) => {
    const { reward, passed, kl, length } = facts(page, run);
    const cells = [
      number(run.iterations), number(run.rollouts), reward ? `${number(reward.first)} → ${number(reward.last)}` : "–",
      passed ? number(passed.last, "share") : "–", number(kl?.last), number(length?.last), run.seconds === null ? "–" : duration(run.seconds),
    ];
    return make("tr", "", make("td", "", dot(index), run.run), ...cells.map((text) => make("td", "number", text)));
  });
  const heads = names.map((name, index) => make("th", index ? "number" : "", name));
  return make("div", "scroll", make("table", "", make("tr", "", ...heads), ...rows));
}

function dot(index) {
  const mark = make("i", "dot");
  mark.style.setProperty("--c", `var(${runColor(index)})`);
  return mark;
}

function legend(page, hidden, changed) {
  $("legend").hidden = page.runs.length < 2;
  $("legend").replaceChildren(...page.runs.map((run, index) => {
    const button = make("button", "", dot(index), run.run);
    button.type = "button";
    button.ariaPressed = "true";
    button.onclick = () => {
      if (!hidden.delete(run.run) && hidden.size < page.runs.length - 1) hidden.add(run.run);
      button.ariaPressed = String(!hidden.has(run.run));
      changed();
    };
    return button;
  }));
}

function configuration(runs) {
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.config)))].filter((key) => key !== "run");
  const differing = keys.filter((key) => new Set(runs.map((run) => run.config[key])).size > 1);
  const many = runs.length > 1;
  $("configuration-caption").textContent = many
    ? differing.length ? "what differs between the runs as they were created" : "the runs were created with the same configuration"
    : "as the run was created";
  const changes = runs.flatMap((run) => run.changes.map((text) => [many ? `${run.run}, ${text}` : text]));
  const versions = [...new Set(runs.flatMap((run) => Object.keys(run.versions)))];
  $("config-tables").replaceChildren(
    ...(many && differing.length ? [table(differing, runs, (run, key) => run.config[key], [])] : []),
    ...(changes.length ? [make("p", "note", "Changed on the way:"), make("div", "scroll", make("table", "config", ...changes.map(([text]) => make("tr", "", make("td", "", text)))))] : []),
    fold("Every key", table(keys, runs, (run, key) => run.config[key], differing)),
    fold("Versions", table(versions, runs, (run, key) => run.versions[key], [])),
  );
}

function fold(title, content) {
  return make("details", "", make("summary", "", title), content);
}

function table(keys, runs, value, marked) {
  const titles = runs.length > 1 ? [make("tr", "", make("th", ""), ...runs.map((run, index) => make("th", "", dot(index), ` ${run.run}`)))] : [];
  const rows = keys.map((key) => make("tr", marked.includes(key) ? "changed" : "", make("th", "", key), ...runs.map((run) => make("td", "", ...visible(value(run, key) ?? "–")))));
  return make("div", "scroll", make("table", "config", ...titles, ...rows));
}
