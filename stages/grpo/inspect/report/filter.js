// filter: which rollouts match, and in which order their groups are read. Rollouts are in key order.

// The rollouts of a block, each with its tokens, in groups.
function prepared(block) {
  const groups = [];
  block.rollouts.forEach((rollout, i) => {
    for (const name of ["tokens", "logprobs", "log_ratios"]) rollout[name] = block[name] && block[name][i];
    const { iteration, group_id, prompt_id } = rollout;
    if (groups.at(-1)?.iteration !== iteration || groups.at(-1).group_id !== group_id) {
      groups.push({ iteration, group_id, prompt_id, rollouts: [], keys: {} });
    }
    groups.at(-1).rollouts.push(rollout);
  });
  return { ...block, groups, special: new Set(block.special) };
}

function textOf(run, rollout) {
  return rollout.response ?? rollout.tokens.map((place) => run.texts[place]).join("");
}

// What is looked for is looked for in lower case: decoded once, when the page is idle or at the first search.
function lowerText(run, rollout) {
  return (rollout.lower ??= textOf(run, rollout).toLowerCase());
}

// Marks the rollouts that match, and counts them.
// wanted: {text, min, max, finish, keep, iteration: null or [from, to], prompts: null or a set of prompt ids}.
function mark(run, wanted) {
  const text = wanted.text.toLowerCase();
  const inPrompt = new Set(Object.keys(run.prompts).filter((id) => run.prompts[id].prompt?.toLowerCase().includes(text)).map(Number));
  const [from, to] = wanted.iteration ?? [-Infinity, Infinity];
  let count = 0;
  for (const rollout of run.rollouts) {
    const { iteration, prompt_id, finish_reason, reward } = rollout;
    rollout.matches = iteration >= from && iteration <= to
      && (!wanted.prompts || wanted.prompts.has(prompt_id))
      && (!wanted.finish || finish_reason === wanted.finish)
      && (wanted.min === null || (reward !== null && reward >= wanted.min))
      && (wanted.max === null || (reward !== null && reward <= wanted.max))
      && keeps(rollout, wanted.keep)
      && (!text || inPrompt.has(prompt_id) || lowerText(run, rollout).includes(text));
    count += rollout.matches;
  }
  return count;
}

// wanted: "" for all, "yes", "no", or a reason for which a rollout was not kept.
function keeps(rollout, wanted) {
  if (!wanted) return true;
  if (wanted === "yes" || wanted === "no") return rollout.keep === (wanted === "yes");
  return rollout.reason === wanted;
}

// Of log-probs or of logarithms of ratios, the farthest from 0; null counts as 0.
function farthest(numbers) {
  return numbers && numbers.reduce((far, value) => Math.max(far, Math.abs(value)), 0);
}

const span = (values) => Math.max(...values) - Math.min(...values);
const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
const highest = (values) => Math.max(...values);
const ORDERS = {
  newest: { text: "newest first", value: (rollout) => rollout.iteration, of: highest, sign: -1 },
  oldest: { text: "oldest first", value: (rollout) => rollout.iteration, of: highest, sign: 1 },
  best: { text: "highest mean reward", value: (rollout) => rollout.reward, of: mean, sign: -1 },
  worst: { text: "lowest mean reward", value: (rollout) => rollout.reward, of: mean, sign: 1 },
  spread: { text: "most different rewards", value: (rollout) => rollout.reward, of: span, sign: -1 },
  longest: { text: "longest response", value: (rollout) => rollout.tokens && rollout.tokens.length, of: highest, sign: -1 },
  surprising: { text: "least likely token", value: (rollout) => farthest(rollout.logprobs), of: highest, sign: -1 },
  mismatch: { text: "ratio farthest from 1", value: (rollout) => farthest(rollout.log_ratios), of: highest, sign: -1 },
};

// What the first search and the first of each order would have to wait for.
function warmUp(run) {
  for (const rollout of run.rollouts) lowerText(run, rollout);
  for (const group of run.groups) Object.keys(ORDERS).forEach((name) => keyOf(group, name));
}

// Where a group is in an order, whatever the filter: those without a number come last.
function keyOf(group, name) {
  if (!(name in group.keys)) {
    const { value, of, sign } = ORDERS[name];
    const values = group.rollouts.map(value).filter((each) => each !== null);
    group.keys[name] = values.length ? sign * of(values) : Infinity;
  }
  return group.keys[name];
}

// The groups with a matching rollout, in order; equal ones by key, as sorting keeps them.
function ordered(run, name) {
  const groups = run.groups.filter((group) => group.rollouts.some((rollout) => rollout.matches));
  return groups.sort((a, b) => keyOf(a, name) - keyOf(b, name) || 0); // Infinity less itself is no number
}
