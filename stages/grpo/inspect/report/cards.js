// cards: a group as a person reads it: its prompt, and its responses side by side, token by token.

const TOKENS_SHOWN = 300; // of a response, before one asks for the rest
const SAMPLES_SHOWN = 16;
const SHORT = 60; // characters of the longest response of a group: then more of them fit side by side

function groupCard(run, group, shade) {
  const { rollouts, prompt_id } = group;
  const { prompt, answer } = run.prompts[prompt_id];
  const known = rollouts.map((rollout) => rollout.reward).filter((value) => value !== null);
  const line = make(
    "div", "line", make("b", "", `Iteration ${group.iteration}`), make("span", "", `group ${group.group_id}`),
    make("span", "", `prompt ${prompt_id}`),
    make("span", "", known.length ? `mean reward ${number(mean(known))}` : "not scored"),
    make("span", "", outcome(known)),
  );
  const right = answer === null ? null : make("div", "answer", "answer ", make("pre", "", ...visible(answer)));
  const short = rollouts.every((rollout) => textOf(run, rollout).length < SHORT);
  const samples = make("div", `samples ${short ? "short" : ""}`);
  const show = (from, to) => samples.append(...rollouts.slice(from, to).map((rollout) => sampleCard(run, rollout, shade)));
  show(0, SAMPLES_SHOWN);
  const card = make("article", "card group", make("header", "", line, make("pre", "prompt", ...visible(prompt)), right), samples);
  const left = rollouts.length - SAMPLES_SHOWN;
  if (left > 0) card.append(more(`${left} more responses`, () => show(SAMPLES_SHOWN)));
  return card;
}

function outcome(rewards) {
  if (!rewards.length) return "";
  const best = highest(rewards);
  const count = rewards.filter((value) => value === best).length;
  return count === rewards.length ? `all ${count} equal: no signal` : `${count} of ${rewards.length} have the highest, ${number(best)}`;
}

function more(text, action) {
  const button = make("button", "more", text);
  button.type = "button";
  button.onclick = () => { action(); button.remove(); };
  return button;
}

function sampleCard(run, rollout, shade) {
  const { reward, advantage, tokens } = rollout;
  const side = advantage > 0 ? "up" : advantage < 0 ? "down" : "";
  const top = make(
    "div", "line", make("span", "value", number(reward)),
    make("span", side, advantage === null ? "" : `advantage ${signed(advantage)}`),
  );
  const under = make("div", "line", make("span", "", `sample ${rollout.sample_id}`), make("span", "", tokens ? `${whole.format(tokens.length)} tok` : ""));
  const card = make("div", `sample ${side} ${rollout.matches ? "" : "other"}`, top, under, parts(rollout), tags(rollout));
  card.append(...response(run, rollout, shade));
  return card;
}

// Each reward by its name; one that failed says so, and how.
function parts(rollout) {
  const list = make("div", "parts");
  for (const { name, value, weight, status, error } of rollout.rewards) {
    const times = weight === 1 ? "" : ` × ${number(weight)}`;
    const shown = status === "ok" ? make("span", "", number(value) + times) : make("span", "failed", status.replace("_", " "));
    list.append(make("div", "", make("span", "", name), shown));
    if (error) list.append(make("div", "failed", ...visible(error)));
  }
  return list;
}

function tags({ finish_reason, keep, reason }) {
  const list = make("div", "tags");
  if (finish_reason !== "stop") list.append(make("span", "tag warn", finish_reason === "length" ? "cut off" : finish_reason));
  if (keep === false) list.append(make("span", "tag", `not kept: ${(reason ?? "").replaceAll("_", " ")}`));
  return list.childElementCount ? list : null;
}

function response(run, rollout, shade) {
  if (!rollout.tokens) return [make("pre", "tokens", ...visible(rollout.response))];
  const count = rollout.tokens.length;
  if (!count) return [make("div", "parts", "no token was sampled")];
  const pre = make("pre", "tokens");
  const show = (from, to) => pre.append(...tokenSpans(run, rollout, from, to).map((span) => tokenSpan(run, span, shade)));
  show(0, Math.min(count, TOKENS_SHOWN));
  return count <= TOKENS_SHOWN ? [pre] : [pre, more(`${whole.format(count - TOKENS_SHOWN)} more tokens`, () => show(TOKENS_SHOWN, count))];
}

// {rollout, from, to, text}: a token, or several where only together they are a character: all but the last read "".
function tokenSpans(run, rollout, first, end) {
  const spans = [];
  let from = first;
  for (let to = first + 1; to <= end; to++) {
    const text = run.texts[rollout.tokens[to - 1]];
    if (text === "" && to < end) continue;
    spans.push({ rollout, from, to, text });
    from = to;
  }
  return spans;
}

function tokenSpan(run, span, shade) {
  const element = make("span", shadeClass(span, shade), ...visible(span.text.replaceAll("\n", "↵\n")));
  if (run.special.has(span.rollout.tokens[span.from])) element.classList.add("special");
  element.span = span; // for whoever points at it
  return element;
}

// {logprob, ratio} of a token: null where the policy did not sample it, and where no update read the rollout.
function numbersOf({ logprobs, log_ratios }, token) {
  const [logprob, apart] = [logprobs[token], log_ratios[token]];
  return { logprob: logprob === null ? null : -logprob / 100, ratio: apart === null ? null : Math.exp(apart / 1000) };
}

// Strength 0 to 9: nine at a probability below 1 %, or a ratio off by a factor of 1.5.
function shadeClass({ rollout, from, to }, shade) {
  let [strength, side] = [0, "lp"];
  for (let token = from; token < to; token++) {
    const { logprob, ratio } = numbersOf(rollout, token);
    const apart = shade === "logprob" ? -logprob / Math.log(100) : shade === "ratio" ? Math.log(ratio ?? 1) / Math.log(1.5) : 0;
    if (Math.abs(apart) * 9 <= strength) continue;
    strength = Math.abs(apart) * 9;
    side = shade === "logprob" ? "lp" : apart > 0 ? "up-r" : "down-r";
  }
  const level = Math.min(9, Math.round(strength));
  return level ? `${side} s${level}` : "";
}

function tokenTip({ rollout, from, to }) {
  const lines = to - from > 1 ? [`${to - from} tokens make this character`] : [];
  for (let token = from; token < to; token++) {
    const { logprob, ratio } = numbersOf(rollout, token);
    if (logprob === null) {
      lines.push("not sampled by the policy");
      continue;
    }
    lines.push(`log-prob ${number(logprob).replace("-", "−")} · probability ${number(Math.exp(logprob), "share")}`);
    lines.push(ratio === null ? "ratio –: no update read this rollout" : `ratio learner / sampler ${ratio.toFixed(3)}`);
  }
  return lines.join("\n");
}
