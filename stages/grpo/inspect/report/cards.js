// cards: a group as a person reads it: its prompt, and its responses side by side, token by token.

const TOKENS_SHOWN = 300; // of a response, before one asks for the rest
const SAMPLES_SHOWN = 16;
const SHORT_BYTES = 60; // of the longest response of a group: then more of them fit side by side

function groupCard(run, group, rows, shade) {
  const [first, end] = [run.firsts[group], run.firsts[group + 1]];
  const { iteration, group_id, prompt, reward } = run.columns;
  const at = prompt[first];
  const known = [...reward.subarray(first, end)].filter((value) => !Number.isNaN(value));
  const mean = known.reduce((a, b) => a + b, 0) / known.length;
  const line = make(
    "div", "line", make("b", "", `Iteration ${iteration[first]}`), make("span", "", `group ${group_id[first]}`),
    make("span", "", `prompt ${run.prompt_ids[at]}`),
    make("span", "", known.length ? `mean reward ${number(mean)}` : "not scored"),
    make("span", "", outcome(known)),
  );
  const answer = run.answers[at] === null ? null : make("div", "answer", "answer ", make("pre", "", ...visible(run.answers[at])));
  const longest = run.columns.bytes.subarray(first, end).reduce((a, b) => Math.max(a, b), 0);
  const samples = make("div", `samples ${longest < SHORT_BYTES ? "short" : ""}`);
  const show = (from, to) => {
    for (let row = from; row < to; row++) samples.append(sampleCard(run, row, rows[row], shade));
  };
  const shown = Math.min(end, first + SAMPLES_SHOWN);
  show(first, shown);
  const card = make("article", "card group", make("header", "", line, make("pre", "prompt", ...visible(run.prompts[at])), answer), samples);
  if (shown < end) card.append(more(`${end - shown} more responses`, () => show(shown, end)));
  return card;
}

function outcome(rewards) {
  if (!rewards.length) return "";
  const highest = Math.max(...rewards);
  const count = rewards.filter((value) => value === highest).length;
  return count === rewards.length ? `all ${count} equal: no signal` : `${count} of ${rewards.length} have the highest, ${number(highest)}`;
}

function more(text, action) {
  const button = make("button", "more", text);
  button.type = "button";
  button.onclick = () => { action(); button.remove(); };
  return button;
}

function sampleCard(run, row, matches, shade) {
  const { sample_id, reward, advantage, tokens } = run.columns;
  const side = advantage[row] > 0 ? "up" : advantage[row] < 0 ? "down" : "";
  const count = tokens[row] || !run.tokens_absent ? `${whole.format(tokens[row])} tok` : "";
  const top = make(
    "div", "line", make("span", "value", Number.isNaN(reward[row]) ? "–" : number(reward[row])),
    make("span", side, Number.isNaN(advantage[row]) ? "" : `advantage ${signed(advantage[row])}`),
  );
  const under = make("div", "line", make("span", "", `sample ${sample_id[row]}`), make("span", "", count));
  const card = make("div", `sample ${side} ${matches ? "" : "other"}`, top, under, parts(run, row), tags(run, row));
  card.append(...response(run, row, shade));
  return card;
}

// Each reward by its name; one that failed says so, and how.
function parts(run, row) {
  const list = make("div", "parts");
  run.rewards.forEach((reward, index) => {
    const status = reward.status[run.columns[`status_${index}`][row]];
    if (status === undefined) return;
    const value = run.columns[`value_${index}`][row];
    const weight = reward.weights.length === 1 && reward.weights[0] !== 1 ? ` × ${number(reward.weights[0])}` : "";
    const error = reward.error[run.columns[`error_${index}`][row]];
    const shown = status === "ok" ? make("span", "", number(value) + weight) : make("span", "failed", status.replace("_", " "));
    list.append(make("div", "", make("span", "", reward.name), shown));
    if (error) list.append(make("div", "failed", ...visible(error)));
  });
  return list;
}

function tags(run, row) {
  const { keep, reason, finish_reason } = run.columns;
  const finish = run.finish_reason[finish_reason[row]];
  const list = make("div", "tags");
  if (finish !== "stop") list.append(make("span", "tag warn", finish === "length" ? "cut off" : finish));
  if (keep[row] === 0) list.append(make("span", "tag", `not kept: ${(run.reason[reason[row]] ?? "").replaceAll("_", " ")}`));
  return list.childElementCount ? list : null;
}

function response(run, row, shade) {
  const pre = make("pre", "tokens");
  if (run.tokens_absent) {
    pre.append(...visible(textOf(run, row)));
    return [pre];
  }
  const [first, end] = [run.tokenStarts[row], run.tokenStarts[row + 1]];
  if (first === end) return [make("div", "parts", "no token was sampled")];
  const show = (from, to, start) => {
    for (const span of tokenSpans(run, from, to, start)) pre.append(tokenSpan(run, span, shade));
  };
  const shown = Math.min(end, first + TOKENS_SHOWN);
  show(first, shown, run.byteStarts[row]);
  if (shown === end) return [pre];
  const rest = () => {
    let start = run.byteStarts[row];
    for (let t = first; t < shown; t++) start += run.columns.sizes[t];
    show(shown, end, start);
  };
  return [pre, more(`${whole.format(end - shown)} more tokens`, rest)];
}

// {from, to, text}: a token, or several where only their bytes together are a character.
function tokenSpans(run, first, end, start) {
  const { sizes, text } = run.columns;
  const spans = [];
  let [from, begin, at] = [first, start, start];
  for (let t = first; t < end; t++) {
    at += sizes[t];
    const inside = t + 1 < end && (text[at] & 0xc0) === 0x80; // the next byte goes on with a character
    if (inside) continue;
    spans.push({ from, to: t + 1, text: run.decoder.decode(text.subarray(begin, at)) });
    [from, begin] = [t + 1, at];
  }
  return spans;
}

function tokenSpan(run, span, shade) {
  const element = make("span", shadeClass(run, span, shade), ...visible(span.text.replaceAll("\n", "↵\n")));
  if (run.special.includes(span.text)) element.classList.add("special");
  element.span = span; // for whoever points at it
  return element;
}

// Strength 0 to 9: nine at a probability below 1 %, or a ratio off by a factor of 1.5.
function shadeClass(run, span, shade) {
  const { logprob, ratio } = run.columns;
  let [strength, side] = [0, "lp"];
  for (let t = span.from; t < span.to; t++) {
    if (shade === "logprob") {
      strength = Math.max(strength, (-(logprobOf(logprob[t], run.ranges.logprob) ?? 0) / Math.log(100)) * 9);
    } else if (shade === "ratio") {
      const apart = Math.log(ratioOf(ratio[t], run.ranges.ratio) ?? 1);
      if (Math.abs(apart / Math.log(1.5)) * 9 > strength) {
        strength = Math.abs(apart / Math.log(1.5)) * 9;
        side = apart > 0 ? "up-r" : "down-r";
      }
    }
  }
  const level = Math.min(9, Math.round(strength));
  return level ? `${side} s${level}` : "";
}

function tokenTip(run, from, to) {
  const lines = to - from > 1 ? [`${to - from} tokens make this character`] : [];
  for (let t = from; t < to; t++) {
    const logprob = logprobOf(run.columns.logprob[t], run.ranges.logprob);
    const ratio = ratioOf(run.columns.ratio[t], run.ranges.ratio);
    if (logprob === null) lines.push("not sampled by the policy");
    else lines.push(`log-prob ${number(logprob).replace("-", "−")} · probability ${number(Math.exp(logprob), "share")}`);
    if (logprob !== null) lines.push(ratio === null ? "ratio –: no update read this rollout" : `ratio learner / sampler ${ratio.toFixed(3)}`);
  }
  return lines.join("\n");
}
