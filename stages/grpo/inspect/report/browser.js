// browser: the controls above the rollouts, what they come to, and the page of groups that is shown.

const GROUPS_SHOWN = 5;
const RESPONSES_SHOWN = 48; // on a page, and their tokens: more take longer to draw than one waits while typing
const PAGE_TOKENS = 4000;

// Gives what shows the rollouts of a cell of the map.
function setUpBrowser(page, runs) {
  const state = { page: 0, prompts: null, range: null };
  const run = () => runs[$("f-run").value];
  $("f-run").replaceChildren(...page.runs.map((each, index) => option(index, each.run)));
  $("f-run").parentElement.hidden = page.runs.length < 2;
  $("f-order").replaceChildren(...Object.entries(ORDERS).map(([name, order]) => option(name, order.text)));
  $("f-shade").replaceChildren(option("logprob", "log-prob when sampled"), option("ratio", "ratio learner / sampler"), option("", "nothing"));
  const update = () => {
    state.page = 0;
    find(run(), state);
  };
  const reset = () => {
    fillChoices(run());
    Object.assign(state, { prompts: null, range: null });
    update();
  };
  for (const id of ["f-iteration", "f-finish", "f-keep", "f-order"]) $(id).onchange = update;
  for (const id of ["f-text", "f-min", "f-max"]) $(id).oninput = update;
  $("f-run").onchange = $("f-reset").onclick = reset;
  $("f-shade").onchange = () => show(run(), state);
  $("page-back").onclick = () => turn(run(), state, -1);
  $("page-next").onclick = () => turn(run(), state, 1);
  setUpTip();
  reset();
  const all = () => Object.assign(state, { prompts: null, range: null }) && update();
  return (index, found) => {
    $("f-run").value = index;
    fillChoices(run());
    Object.assign(state, { prompts: new Set(found.ids), range: [found.from, found.to] });
    update();
    describeOrigin(found, all);
    $("rollouts").scrollIntoView();
  };
}

function fillChoices(run) {
  const values = (name) => [...new Set(run.rollouts.map((rollout) => rollout[name]))].filter((each) => each !== null);
  const iterations = values("iteration").sort((a, b) => b - a);
  $("f-iteration").replaceChildren(option("", "all"), ...iterations.map((each) => option(each, String(each))));
  $("f-finish").replaceChildren(option("", "anything"), ...values("finish_reason").map((each) => option(each, each)));
  const reasons = values("reason").map((each) => option(each, `no: ${each.replaceAll("_", " ")}`));
  $("f-keep").replaceChildren(option("", "all"), option("yes", "yes"), option("no", "no"), ...reasons);
  for (const id of ["f-text", "f-min", "f-max"]) $(id).value = "";
  $("f-order").value = "newest";
}

function wantedNow(state) {
  const value = (id) => ($(id).value === "" ? null : Number($(id).value));
  const iteration = value("f-iteration");
  return {
    text: $("f-text").value, min: value("f-min"), max: value("f-max"), finish: $("f-finish").value, keep: $("f-keep").value,
    iteration: iteration === null ? state.range : [iteration, iteration], prompts: state.prompts,
  };
}

function find(run, state) {
  const started = performance.now();
  const count = mark(run, wantedNow(state));
  state.groups = ordered(run, $("f-order").value);
  show(run, state);
  const took = performance.now() - started;
  document.body.dataset.filterMs = took.toFixed(1);
  $("only-prompt").hidden = !state.prompts;
  const groups = state.groups.length === 1 ? "1 group" : `${whole.format(state.groups.length)} groups`;
  $("found").textContent = `${whole.format(count)} of ${whole.format(run.rollouts.length)} rollouts in ${groups}`;
}

// Groups on a page: fewer where they are large.
function pageSize({ groups, rollouts }) {
  const tokens = rollouts.reduce((sum, rollout) => sum + (rollout.tokens ? rollout.tokens.length : 0), 0);
  const fit = groups.length * Math.min(RESPONSES_SHOWN / rollouts.length, PAGE_TOKENS / tokens);
  return Math.max(1, Math.min(GROUPS_SHOWN, Math.floor(fit)));
}

function show(run, state) {
  const size = pageSize(run);
  const first = state.page * size;
  const shown = state.groups.slice(first, first + size);
  const shade = $("f-shade").value;
  $("groups").replaceChildren(...shown.map((group) => groupCard(run, group, shade)));
  if (!shown.length) $("groups").append(make("div", "card empty", nothing(run)));
  $("page-place").textContent = shown.length ? `groups ${whole.format(first + 1)}–${whole.format(first + shown.length)} of ${whole.format(state.groups.length)}` : "";
  $("page-back").disabled = state.page === 0;
  $("page-next").disabled = first + size >= state.groups.length;
  $("f-shade").disabled = Boolean(run.tokens_absent);
  $("shade-legend").replaceChildren(...legendOf(run, shade));
}

function nothing(run) {
  return run.rollouts.length ? "No rollout matches. Reset shows all of them." : "No rollouts of this run are in the file; grpo report --rollouts N takes more.";
}

function turn(run, state, by) {
  state.page += by;
  show(run, state);
  $("filters").scrollIntoView();
}

function describeOrigin(found, all) {
  const button = make("button", "", "×");
  button.type = "button";
  button.title = "All prompts and iterations";
  button.onclick = all;
  const when = found.from === found.to ? `iteration ${found.from}` : `iterations ${found.from}–${found.to}`;
  const who = found.ids.length === 1 ? `prompt ${found.ids[0]}` : `${found.ids.length} prompts`;
  $("only-prompt").replaceChildren(`${who}, ${when}`, button);
}

function legendOf(run, shade) {
  if (run.tokens_absent) return [`Responses are shown as text, without tokens: ${run.tokens_absent}.`];
  const steps = (side) => [1, 3, 5, 7, 9].map((level) => make("i", `${side} s${level}`));
  if (shade === "logprob") {
    return ["likely", make("span", "swatches", ...steps("lp")), `below 1 %, under the policy that sampled, at its temperature. Log-probs are kept to ±0.005 down to −1, to ±0.05 below.`];
  }
  if (shade === "ratio") {
    const scale = make("span", "swatches", ...steps("down-r").reverse(), ...steps("up-r"));
    return ["÷ 1.5", scale, `× 1.5: exp(policy_logprobs − old_logprobs) when the learner first read the token. Ratios are kept to ±0.05 %.`];
  }
  return ["Tokens are not shaded; point at one for its numbers."];
}

// One tip for all tokens, as text.
function setUpTip() {
  const tip = $("tip");
  $("groups").onmouseover = (event) => {
    const token = event.target.span ? event.target : event.target.parentElement; // or a mark within one
    tip.hidden = !token?.span;
    if (tip.hidden) return;
    tip.textContent = tokenTip(token.span);
    const box = token.getBoundingClientRect();
    const below = box.bottom + 8 + tip.offsetHeight < innerHeight;
    tip.style.top = `${below ? box.bottom + 8 : box.top - 8 - tip.offsetHeight}px`;
    tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
  };
  $("groups").onmouseleave = () => { tip.hidden = true; };
}
