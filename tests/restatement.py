"""The objectives of `update`, once more: plain loops in float64.

Written from the formulas, not from the code, and slow on purpose. `stages/grpo` does the same in SQL and in
batched torch; the property tests hold the two together. Nothing here imports `grpo`.
"""

from dataclasses import dataclass, field
from math import exp, floor, fsum, inf, isfinite, log, sqrt

GROUP_EPSILON = 1e-4


# ------------------------------------------------------------------------------------------------ advantages


@dataclass(frozen=True)
class Reward:
    """One row of the `rewards` table."""

    name: str
    weight: float
    status: str
    value: float | None


@dataclass(frozen=True)
class Scored:
    """One rollout as the advantage sees it."""

    group_id: int
    sample_id: int
    rewards: list[Reward]
    response_tokens: int = 3
    finish_reason: str = "stop"


@dataclass(frozen=True)
class Advantage:
    """One row of the `advantages` table; `advantage` is None where the rollout is not kept."""

    reward: float | None
    group_mean: float | None
    group_std: float | None
    group_size: int
    advantage: float | None
    reason: str | None

    @property
    def keep(self) -> bool:
        """Whether update trains on it."""
        return self.reason is None


def total_reward(rewards: list[Reward]) -> float | None:
    """sum_k w_k r_k, or None for an unscored rollout.

    A reward of weight 0 is stored to be looked at, and counts for nothing, whatever its status.
    """
    terms = []
    for reward in rewards:
        if reward.weight == 0 or reward.status == "not_applicable":
            continue
        if reward.status != "ok" or reward.value is None or not isfinite(reward.value):
            return None
        terms.append(reward.weight * reward.value)
    return fsum(terms) if terms else None


def mean(values: list[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def sample_std(values: list[float]) -> float:
    """The standard deviation with n - 1."""
    center = mean(values)
    return sqrt(sum((value - center) ** 2 for value in values) / (len(values) - 1))


def advantages(
    rollouts: list[Scored],
    scale: str = "group",
    epsilon: float = GROUP_EPSILON,
    drop_zero_variance: bool = False,
    drop_truncated: bool = False,
) -> list[Advantage]:
    """One answer per rollout, in the order given."""
    rewards_of_group: dict[int, list[float]] = {}
    for rollout in rollouts:
        rewards_of_group.setdefault(rollout.group_id, [])
        reward = total_reward(rollout.rewards)
        if rollout.response_tokens > 0 and rollout.finish_reason != "abort" and reward is not None:
            rewards_of_group[rollout.group_id].append(reward)
    whole_batch = [reward for group in rewards_of_group.values() if len(group) >= 2 for reward in group]

    rows = []
    for rollout in rollouts:
        reward = total_reward(rollout.rewards)
        group = rewards_of_group[rollout.group_id]
        group_mean = mean(group) if group else None
        group_std = sample_std(group) if len(group) >= 2 else None

        reason = None
        value = None
        if rollout.response_tokens == 0:
            reason = "empty"
        elif reward is None or rollout.finish_reason == "abort":
            reason = "unscored"
        elif len(group) < 2:
            reason = "group_too_small"
        elif drop_zero_variance and max(group) == min(group):
            reason = "zero_variance"
        elif drop_truncated and rollout.finish_reason == "length":
            reason = "truncated"
        elif max(group) == min(group):
            value = 0.0
        else:
            divisor = {
                "group": sample_std(group) + epsilon,
                "batch": sample_std(whole_batch) + epsilon,
                "none": 1.0,
            }[scale]
            value = (reward - mean(group)) / divisor
        rows.append(Advantage(reward, group_mean, group_std, len(group), value, reason))
    return rows


# ------------------------------------------------------------------------------------------------ loss


@dataclass(frozen=True)
class Response:
    """One kept rollout as the loss sees it: one log-prob per response token.

    `old` is pi_old; where that is recomputed, `sampled` is what the sampler stored. `entropy` is that of the
    policy's distribution at each position, for an objective with an entropy term.
    """

    advantage: float
    policy: list[float]
    old: list[float]
    reference: list[float]
    mask: list[bool]
    sampled: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    group: int = 0

    @property
    def counted(self) -> list[int]:
        """The positions that count, T_i of them."""
        return [position for position, counts in enumerate(self.mask) if counts]


@dataclass(frozen=True)
class Objective:
    """The keys of `update` that enter the loss."""

    ratio: str = "token"
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    aggregate: str = "sequence_mean"
    kl_coefficient: float = 0.01
    kl_estimator: str = "k3"
    max_new_tokens: int = 8
    correction: str = "none"
    correction_level: str = "token"
    correction_cap: float = 2.0
    surrogate: str = "clip"
    delta: float | None = None
    kl_importance: bool = False
    entropy_coefficient: float = 0.0
    tau_positive: float = 1.0
    tau_negative: float = 1.05
    ratio_cap: float = 20.0
    k_positive: float = 2.0
    k_negative: float = 3.0
    lambda_positive: float = 3.0
    lambda_negative: float = 2.0
    off_policy_mask: float | None = None
    top_entropy: float | None = None


OBJECTIVES = {
    "grpo": Objective(),
    "grpo_sequence": Objective(ratio="sequence", aggregate="sequence_sum", kl_estimator="k1"),
    "dr_grpo": Objective(aggregate="constant", kl_coefficient=0),
    "dapo": Objective(clip_high=0.28, aggregate="token_mean", kl_coefficient=0),
    "gspo": Objective(ratio="sequence_mean", clip_low=3e-4, clip_high=4e-4, kl_coefficient=0),
    "cispo": Objective(
        surrogate="cispo", clip_low=None, clip_high=4.0, aggregate="token_mean", kl_coefficient=0
    ),
    "sapo": Objective(surrogate="sapo", clip_low=None, clip_high=None, kl_coefficient=0),
    "gmpo": Objective(ratio="sequence_mean", surrogate="gmpo", clip_low=0.4, clip_high=0.4, kl_coefficient=0),
    "dppo": Objective(surrogate="dppo_tv", aggregate="token_mean", kl_coefficient=0),
    "vespo": Objective(
        surrogate="vespo", clip_low=None, clip_high=None, aggregate="token_mean", kl_coefficient=0
    ),
    "scalerl": Objective(
        surrogate="cispo", clip_low=None, clip_high=4.0, aggregate="prompt_mean", kl_coefficient=0
    ),
}


@dataclass(frozen=True)
class Loss:
    """The loss of one optimiser step; `gradient[i][t]`: its derivative by policy log-prob t of i.

    `entropy` is aggregated as the KL is; `entropy_gradient[i][t]`: the derivative by entropy t of i.
    """

    loss: float
    policy_loss: float
    kl: float
    gradient: list[list[float]]
    clipped_low: float
    clipped_high: float
    entropy: float
    entropy_gradient: list[list[float]]
    off_policy: float
    low_entropy: float


def ratio_at(response: Response, position: int, ratio: str) -> float:
    """rho of this token: exp(d_t) of its own, or of its whole response exp(sum_t d_t) or exp(mean_t d_t)."""
    if ratio == "token":
        return exp(response.policy[position] - response.old[position])
    difference = sum(response.policy[t] - response.old[t] for t in response.counted)
    return exp(difference if ratio == "sequence" else difference / len(response.counted))


def log_ratio_slope(response: Response, of: int, by: int, ratio: str) -> float:
    """Derivative of the logarithm of the ratio at one token by the policy's log-prob at another."""
    if ratio == "token":
        return 1.0 if of == by else 0.0
    return 1.0 if ratio == "sequence" else 1 / len(response.counted)


def sampler_weight(response: Response, position: int, objective: Objective) -> float:
    """What the surrogate is multiplied by at this token: a constant, whatever the policy does."""
    if objective.correction == "none":
        return 1.0
    of_tokens = [response.old[t] - response.sampled[t] for t in response.counted]
    w = exp(response.old[position] - response.sampled[position])
    if objective.correction_level == "sequence_mean":
        w = exp(mean(of_tokens))
    if objective.correction == "truncate":
        return min(w, objective.correction_cap)
    return w if 1 / objective.correction_cap <= w <= objective.correction_cap else 0.0


def clip(ratio: float, objective: Objective) -> float:
    """The ratio within 1 - clip_low and 1 + clip_high."""
    if objective.clip_low is not None:
        ratio = max(ratio, 1 - objective.clip_low)
    if objective.clip_high is not None:
        ratio = min(ratio, 1 + objective.clip_high)
    return ratio


def bernoulli_kl(q: float, p: float) -> float:
    """KL of a coin that shows q to one that shows p."""
    if p in (0.0, 1.0):
        return 0.0 if p == q else inf
    return (q * log(q / p) if q > 0 else 0.0) + ((1 - q) * log((1 - q) / (1 - p)) if q < 1 else 0.0)


def went_too_far(response: Response, position: int, objective: Objective) -> tuple[bool, bool]:
    """Whether dppo masks a token: it fell too far already (A < 0), or rose too far (A > 0)."""
    p, q = exp(response.policy[position]), exp(response.old[position])
    low = inf if objective.clip_low is None else objective.clip_low
    high = inf if objective.clip_high is None else objective.clip_high
    if objective.surrogate == "dppo_tv":
        return response.advantage < 0 and p - q < -low, response.advantage > 0 and p - q > high
    distance = bernoulli_kl(q, p)
    fell, rose = p < q and distance > low, p > q and distance > high
    return response.advantage < 0 and fell, response.advantage > 0 and rose


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x)."""
    return 1 / (1 + exp(-x)) if x > 0 else exp(x) / (1 + exp(x))


def surrogate(response: Response, position: int, objective: Objective) -> tuple[float, dict[int, float]]:
    """The surrogate's value at a token, and its derivative by each of the response's log-probs."""
    advantage, logprob = response.advantage, response.policy[position]
    rho, name = ratio_at(response, position, objective.ratio), objective.surrogate
    through_rho = {t: log_ratio_slope(response, position, t, objective.ratio) for t in response.counted}
    if name == "clip":
        capped = rho if objective.delta is None else min(rho, objective.delta)
        clipped = clip(capped, objective)
        if capped * advantage <= clipped * advantage:
            slope = rho * advantage if capped == rho else 0.0
            return capped * advantage, {t: slope * by for t, by in through_rho.items()}
        return clipped * advantage, {}
    if name == "sapo":
        tau = objective.tau_positive if advantage > 0 else objective.tau_negative
        share = sigmoid(tau * (rho - 1))
        slope = 4 * share * (1 - share) * rho * advantage
        return 4 / tau * share * advantage, {t: slope * by for t, by in through_rho.items()}
    if name == "gmpo":
        exponents, free = [], []
        for t in response.counted:
            d = response.policy[t] - response.old[t]
            bound = d
            if advantage > 0 and objective.clip_high is not None:
                bound = min(d, objective.clip_high)
            elif advantage <= 0 and objective.clip_low is not None:
                bound = max(d, -objective.clip_low)
            exponents.append(bound)
            free += [t] if bound == d else []
        value = exp(mean(exponents)) * advantage
        return value, {t: value / len(exponents) for t in free}
    if name == "cispo":
        weight = clip(rho, objective)
    elif name in ("dppo_tv", "dppo_kl"):
        weight = 0.0 if any(went_too_far(response, position, objective)) else min(rho, objective.ratio_cap)
    else:
        k = objective.k_positive if advantage > 0 else objective.k_negative
        rate = objective.lambda_positive if advantage > 0 else objective.lambda_negative
        log_w = min(max(sum(response.policy[t] - response.old[t] for t in response.counted), log(1e-8)), 20)
        weight = exp(rate + k * log_w - rate * exp(log_w))
    return weight * advantage * logprob, {position: weight * advantage}


def clipped_sides(response: Response, position: int, objective: Objective) -> tuple[bool, bool]:
    """Whether the clip acts at a token from below, and from above."""
    rho, advantage = ratio_at(response, position, objective.ratio), response.advantage
    if objective.surrogate in ("dppo_tv", "dppo_kl"):
        return went_too_far(response, position, objective)
    if objective.surrogate == "gmpo":
        d = response.policy[position] - response.old[position]
        fell = objective.clip_low is not None and d < -objective.clip_low
        rose = objective.clip_high is not None and d > objective.clip_high
        return fell and advantage < 0, rose and advantage > 0
    if objective.surrogate in ("sapo", "vespo"):
        return False, False
    low = objective.clip_low is not None and rho < 1 - objective.clip_low
    high = objective.clip_high is not None and rho > 1 + objective.clip_high
    if objective.surrogate == "cispo":
        return low, high
    past = objective.delta is not None and rho > objective.delta and advantage != 0
    return low and advantage < 0, (high and advantage > 0) or past


def is_off_policy(response: Response, objective: Objective) -> bool:
    """Whether off_policy_mask takes the response out of the surrogate."""
    if objective.off_policy_mask is None or response.advantage >= 0:
        return False
    return mean([response.sampled[t] - response.policy[t] for t in response.counted]) > (
        objective.off_policy_mask
    )


def entropy_bound(responses: list[Response], share: float | None) -> float:
    """The quantile 1 - share of all entropies of the step, linear between two of them; None: -inf."""
    if share is None:
        return -inf
    values = sorted(response.entropy[t] for response in responses for t in response.counted)
    place = (1 - share) * (len(values) - 1)
    below = floor(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (place - below) * (values[above] - values[below])


def kl_term(policy: float, reference: float, estimator: str) -> tuple[float, float]:
    """k1, k2 or k3 at one token, and its derivative with respect to the policy's log-prob."""
    d = policy - reference
    if estimator == "k1":
        return d, 1.0
    if estimator == "k2":
        return d * d / 2, d
    return exp(-d) + d - 1, 1 - exp(-d)


def token_weight(response: Response, responses: list[Response], objective: Objective) -> float:
    """What one token of a response weighs; the denominators are the whole step's."""
    rollouts, tokens = len(responses), len(response.counted)
    if objective.aggregate == "sequence_mean":
        return 1 / rollouts / tokens
    if objective.aggregate == "token_mean":
        return 1 / sum(len(each.counted) for each in responses)
    if objective.aggregate == "constant":
        return 1 / (rollouts * objective.max_new_tokens)
    if objective.aggregate == "prompt_mean":
        groups = {each.group for each in responses}
        return 1 / len(groups) / sum(len(each.counted) for each in responses if each.group == response.group)
    return 1 / rollouts


def rollout_weight(response: Response, responses: list[Response], objective: Objective) -> float:
    """What the one surrogate value of a rollout weighs: under a mean over tokens, that of all its tokens."""
    if objective.aggregate in ("token_mean", "prompt_mean"):
        return len(response.counted) * token_weight(response, responses, objective)
    return 1 / len(responses)


def loss(responses: list[Response], objective: Objective) -> Loss:
    """The loss of one optimiser step over all its kept rollouts."""
    all_tokens = sum(len(response.counted) for response in responses)
    bound = entropy_bound(responses, objective.top_entropy)
    gain = kl = entropy = 0.0
    gradient = []
    entropy_gradient = []
    low = high = off_policy = low_entropy = 0
    for response in responses:
        per_token = token_weight(response, responses, objective)
        per_rollout = rollout_weight(response, responses, objective)
        slope = [0.0] * len(response.policy)
        entropy_slope = [0.0] * len(response.policy)
        off_policy += is_off_policy(response, objective)

        # One value per token, or one per rollout: then that of its first token is that of every token.
        values = response.counted if objective.ratio == "token" else response.counted[:1]
        weight = per_token if objective.ratio == "token" else per_rollout
        for position in values:
            if objective.top_entropy is not None and response.entropy[position] < bound:
                low_entropy += 1
                continue
            if is_off_policy(response, objective):
                continue
            value, derivatives = surrogate(response, position, objective)
            w = sampler_weight(response, position, objective)
            gain += weight * w * value
            for t, derivative in derivatives.items():
                slope[t] -= weight * w * derivative

        for position in response.counted:
            rho = ratio_at(response, position, objective.ratio)
            below, above = clipped_sides(response, position, objective)
            low += below
            high += above

            value, derivative = kl_term(
                response.policy[position], response.reference[position], objective.kl_estimator
            )
            factor = rho if objective.kl_importance else 1.0
            kl += per_token * factor * value
            slope[position] += objective.kl_coefficient * per_token * factor * derivative
            if objective.kl_importance:
                for t in response.counted:
                    through_rho = rho * log_ratio_slope(response, position, t, objective.ratio) * value
                    slope[t] += objective.kl_coefficient * per_token * through_rho

            if objective.entropy_coefficient:
                entropy += per_token * response.entropy[position]
                entropy_slope[position] -= objective.entropy_coefficient * per_token
        gradient.append(slope)
        entropy_gradient.append(entropy_slope)
    total = -gain + objective.kl_coefficient * kl - objective.entropy_coefficient * entropy
    return Loss(
        total,
        -gain,
        kl,
        gradient,
        low / all_tokens,
        high / all_tokens,
        entropy,
        entropy_gradient,
        off_policy / len(responses),
        low_entropy / all_tokens,
    )


# ------------------------------------------------------------------------------------------------ mismatch


@dataclass(frozen=True)
class Mismatch:
    """How far the learner's log-probs are from the sampler's, over tokens."""

    mean: float
    maximum: float
    kl: float
    effective_sample_size: float
    over_cap: float


def mismatch(policy: list[list[float]], old: list[list[float]], cap: float = 2.0) -> Mismatch:
    """Over all tokens that count.

    The tokens were drawn from `old`, so with w = policy / old the k3 estimate of KL(old || policy) is the
    mean of w - 1 - log w. The effective sample size is Kish's, (sum w)^2 / sum w^2, as a share of the tokens.
    """
    differences = [
        ours - theirs
        for our_row, their_row in zip(policy, old, strict=True)
        for ours, theirs in zip(our_row, their_row, strict=True)
    ]
    count = len(differences)
    weights = [exp(difference) for difference in differences]
    return Mismatch(
        mean=sum(abs(difference) for difference in differences) / count,
        maximum=max(abs(difference) for difference in differences),
        kl=sum(exp(d) - 1 - d for d in differences) / count,
        effective_sample_size=sum(weights) ** 2 / sum(weight**2 for weight in weights) / count,
        over_cap=sum(1 for weight in weights if weight > cap) / count,
    )
