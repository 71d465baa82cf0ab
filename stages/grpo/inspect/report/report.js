// report: the head of the page, its configuration, and the order in which everything is drawn.

const KEYS_IN_HEAD = 6; // that differ between the runs; Configuration has all

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
    `learning rate ${number(value("update.learning_rate"))}`,
  ];
  $("subtitle").textContent = runs.length === 1 ? told.join(" · ") : `${runs.length} runs; what differs between them is marked under Configuration`;
  $("summary").replaceChildren(runs.length === 1 ? tiles(page) : overview(page));
}

// The numbers of a run that one asks for first: from curves and counts, with how they began.
function facts(page, run) {
  const ends = (isIt) => {
    const found = page.charts.filter(isIt).flatMap((chart) => chart.series).find((each) => each.run === run.run);
    return found ? { first: found.y[0], last: found.y.at(-1), best: Math.max(...found.y.filter((value) => value !== null)) } : null;
  };
  const titled = (title) => ends((chart) => chart.title === title);
  return {
    reward: titled("Reward"), passed: run.last_passed === null ? null : { first: run.first_passed, last: run.last_passed }, kl: titled("KL to the reference"),
    length: titled("Response length"), truncated: titled("Truncated"), held: titled(`Held-out pass@k: ${run.pass_reward}`),
  };
}

// `pass@1 of correct`, or `pass@1` where the runs count by different rewards.
function ofPassing(text, runs) {
  return runs.every((run) => run.pass_reward === runs[0].pass_reward) ? `${text} of ${runs[0].pass_reward}` : text;
}

function differingKeys(runs) {
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.config)))].filter((key) => key !== "run");
  return keys.filter((key) => new Set(runs.map((run) => run.config[key])).size > 1);
}

function tiles(page) {
  const [run] = page.runs;
  const { reward, passed, kl, length, truncated, held } = facts(page, run);
  const list = [
    passed && [number(passed.last, "share"), `${ofPassing("pass rate", page.runs)}, from ${number(passed.first, "share")}`],
    reward && [number(reward.last), `reward, from ${number(reward.first)}`],
    held && [number(held.last, "share"), `held-out ${ofPassing("pass@1", page.runs)}, from ${number(held.first, "share")}`],
    kl && [number(kl.last), "KL to the reference, nats"],
    length && [number(length.last), `response tokens, from ${number(length.first)}`],
    truncated && [number(truncated.last, "share"), "cut off"],
    [number(run.rollouts), `rollouts in ${number(run.iterations)} iterations`],
    [number(run.prompts), "different prompts"],
    run.seconds === null ? null : [duration(run.seconds), `in iterations, ${number(Math.round(run.tokens / run.seconds))} response tokens a second`],
  ];
  return make("div", "tiles", ...list.filter(Boolean).map(([value, text]) => make("div", "tile", make("b", "", value), make("span", "", text))));
}

function overview(page) {
  const differing = differingKeys(page.runs).slice(0, KEYS_IN_HEAD);
  const measured = [`${ofPassing("Pass rate", page.runs)}, last`, `Held-out ${ofPassing("pass@1", page.runs)}, last`, "best"];
  const names = ["Run", ...differing, "Iterations", "Rollouts", "Reward, first → last", ...measured, "KL, last", "Tokens, last", "Time"];
  const rows = page.runs.map((run, index) => {
    const { reward, passed, kl, length, held } = facts(page, run);
    const cells = [
      ...differing.map((key) => run.config[key] ?? "–"),
      number(run.iterations), number(run.rollouts), reward ? `${number(reward.first)} → ${number(reward.last)}` : "–",
      passed ? number(passed.last, "share") : "–", held ? number(held.last, "share") : "–", held ? number(held.best, "share") : "–", number(kl?.last), number(length?.last), run.seconds === null ? "–" : duration(run.seconds),
    ];
    return make("tr", "", make("td", "", dot(index), run.run), ...cells.map((text) => make("td", "number", ...visible(String(text)))));
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
  const differing = differingKeys(runs);
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
