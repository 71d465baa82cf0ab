// filter: which rollouts match, and in which order their groups are read. Rows are in key order.

// What is derived once from the columns of a run: groups, offsets, the texts of prompts in lower case.
function prepared(block, ranges) {
  const { iteration, group_id, tokens, bytes } = block.columns;
  const firsts = [];
  for (let i = 0; i < iteration.length; i++) {
    if (i === 0 || iteration[i] !== iteration[i - 1] || group_id[i] !== group_id[i - 1]) firsts.push(i);
  }
  firsts.push(iteration.length);
  return {
    ...block, ranges, firsts, numGroups: firsts.length - 1, tokenStarts: startsOf(tokens), byteStarts: startsOf(bytes),
    decoder: new TextDecoder(), lowerPrompts: block.prompts.map((text) => (text ?? "").toLowerCase()), lowerTexts: null, keys: {},
  };
}

function textOf(run, row) {
  return run.decoder.decode(run.columns.text.subarray(run.byteStarts[row], run.byteStarts[row + 1]));
}

// All responses in lower case: decoded once, when the page is idle or when a text is first looked for.
function lowerTexts(run) {
  run.lowerTexts ??= Array.from({ length: run.rollouts }, (_, row) => textOf(run, row).toLowerCase());
  return run.lowerTexts;
}

// wanted: {text, min, max, finish, keep, iteration: null or [from, to], prompts: null or a set of prompt ids}.
function matching(run, wanted) {
  const { columns } = run;
  const rows = new Uint8Array(run.rollouts);
  const text = wanted.text.toLowerCase();
  const prompts = run.prompts.map((_, i) => (wanted.prompts ? wanted.prompts.has(run.prompt_ids[i]) : true));
  const inPrompt = text ? run.lowerPrompts.map((each) => each.includes(text)) : null;
  const texts = text ? lowerTexts(run) : null;
  const finish = wanted.finish === "" ? null : run.finish_reason.indexOf(wanted.finish);
  const [from, to] = wanted.iteration ?? [-Infinity, Infinity];
  let count = 0;
  for (let i = 0; i < rows.length; i++) {
    if (columns.iteration[i] < from || columns.iteration[i] > to) continue;
    if (!prompts[columns.prompt[i]]) continue;
    if (finish !== null && columns.finish_reason[i] !== finish) continue;
    if (wanted.min !== null && !(columns.reward[i] >= wanted.min)) continue;
    if (wanted.max !== null && !(columns.reward[i] <= wanted.max)) continue;
    if (wanted.keep !== "" && !keeps(run, i, wanted.keep)) continue;
    if (text && !inPrompt[columns.prompt[i]] && !texts[i].includes(text)) continue;
    rows[i] = 1;
    count++;
  }
  return { rows, count };
}

// keep: "yes", "no", or a reason for which a rollout was not kept.
function keeps(run, row, wanted) {
  const { keep, reason } = run.columns;
  if (wanted === "yes") return keep[row] === 1;
  if (wanted === "no") return keep[row] === 0;
  return run.reason[reason[row]] === wanted;
}

const ORDERS = {
  newest: { text: "newest first", value: (run, row) => run.columns.iteration[row], by: "max", sign: -1 },
  oldest: { text: "oldest first", value: (run, row) => run.columns.iteration[row], by: "max", sign: 1 },
  best: { text: "highest mean reward", value: (run, row) => run.columns.reward[row], by: "mean", sign: -1 },
  worst: { text: "lowest mean reward", value: (run, row) => run.columns.reward[row], by: "mean", sign: 1 },
  spread: { text: "most different rewards", value: (run, row) => run.columns.reward[row], by: "span", sign: -1 },
  longest: { text: "longest response", value: (run, row) => run.columns.tokens[row], by: "max", sign: -1 },
  surprising: { text: "least likely token", value: lowestLogprob, by: "max", sign: -1 },
  mismatch: { text: "ratio farthest from 1", value: farthestRatio, by: "max", sign: -1 },
};

function lowestLogprob(run, row) {
  const codes = run.columns.logprob;
  let found = -1;
  for (let t = run.tokenStarts[row]; codes && t < run.tokenStarts[row + 1]; t++) {
    if (codes[t] !== NO_CODE && codes[t] > found) found = codes[t];
  }
  return found;
}

function farthestRatio(run, row) {
  const codes = run.columns.ratio;
  let found = -1;
  for (let t = run.tokenStarts[row]; codes && t < run.tokenStarts[row + 1]; t++) {
    if (codes[t] !== NO_CODE) found = Math.max(found, Math.abs(codes[t] - 127));
  }
  return found;
}

// What the first search and the first of each order would have to wait for.
function warmUp(run) {
  lowerTexts(run);
  for (const name of Object.keys(ORDERS)) keysOf(run, name);
}

// One number a group, which does not depend on the filter: computed once for each order.
function keysOf(run, name) {
  return (run.keys[name] ??= Float64Array.from({ length: run.numGroups }, (_, g) => {
    const values = [];
    for (let row = run.firsts[g]; row < run.firsts[g + 1]; row++) {
      const value = ORDERS[name].value(run, row);
      if (!Number.isNaN(value)) values.push(value);
    }
    if (!values.length) return NaN;
    if (ORDERS[name].by === "mean") return values.reduce((a, b) => a + b, 0) / values.length;
    const highest = Math.max(...values);
    return ORDERS[name].by === "max" ? highest : highest - Math.min(...values);
  }));
}

// The groups with a matching rollout, in order; those without a number come last, equal ones by key.
function ordered(run, rows, name) {
  const groups = [];
  for (let g = 0; g < run.numGroups; g++) {
    for (let row = run.firsts[g]; row < run.firsts[g + 1]; row++) {
      if (rows[row]) { groups.push(g); break; }
    }
  }
  const keys = keysOf(run, name);
  const sign = ORDERS[name].sign;
  const rank = (g) => (Number.isNaN(keys[g]) ? Infinity : sign * keys[g]);
  return groups.sort((a, b) => rank(a) - rank(b) || a - b || 0);
}
