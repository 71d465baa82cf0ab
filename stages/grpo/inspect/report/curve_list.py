"""curve_list: every curve of the report, in the order in which the page shows them."""

from grpo.inspect.report.curves import SHARE, Curve

# Of KL, entropy and mismatch, the first step that was taken: there the weights are still those that sampled.
_FIRST_STEP = """
with taken as (
    select
        run,
        iteration,
        {column} as value,
        row_number() over (partition by run, iteration order by epoch, step)
            as place,
    from updates
    where not skipped
)

select
    run,
    iteration,
    '' as series,
    value,
from taken
where place = 1 and value is not null
order by run, iteration
"""

TRAINING = (
    Curve(
        "Reward",
        "",
        "Mean of the weighted sum of the rewards, over scored rollouts.",
        "no advantages yet",
        """
        select run, iteration, '' as series,
            avg(reward order by group_id, sample_id) as value,
        from advantages
        where reward is not null
        group by run, iteration
        order by run, iteration
        """,
    ),
    Curve(
        "Rewards by name",
        "",
        "Mean of this reward alone, without its weight.",
        "no rewards yet",
        """
        select run, iteration, name as series,
            avg(value order by group_id, sample_id) as value,
            bool_and(value in (0, 1)) as binary,
        from rewards
        where status = 'ok'
        group by run, iteration, name
        order by run, min(name), iteration
        """,
        split=True,
    ),
    Curve(
        "KL to the reference",
        "nats",
        "How far the policy has moved, per response token as the loss sees it.",
        "the loss has no KL term (update.kl_coefficient is 0)",
        _FIRST_STEP.format(column="kl"),
    ),
    Curve(
        "Entropy",
        "nats",
        "Mean entropy per response token; near 0, sampling no longer explores.",
        "no update yet",
        _FIRST_STEP.format(column="entropy"),
    ),
    Curve(
        "Response length",
        "tokens",
        "Mean number of response tokens.",
        "no rollouts yet",
        """
        select run, iteration, '' as series, avg(response_tokens) as value,
        from rollouts
        group by run, iteration
        order by run, iteration
        """,
    ),
    Curve(
        "Truncated",
        SHARE,
        "Share of responses cut off at max_new_tokens.",
        "no rollouts yet",
        """
        select run, iteration, '' as series,
            avg((finish_reason = 'length')::integer) as value,
        from rollouts
        group by run, iteration
        order by run, iteration
        """,
    ),
    Curve(
        "Clipped",
        SHARE,
        "Share of ratios beyond the clip range on the side where clipping stops the gradient.",
        "no update yet, or none that clips",
        """
        select run, iteration, series, avg(value order by epoch, step) as value,
        from (
            select run, iteration, epoch, step, 'low' as series,
                clip_fraction_low as value,
            from updates where not skipped
            union all
            select run, iteration, epoch, step, 'high' as series,
                clip_fraction_high as value,
            from updates where not skipped
        )
        where value is not null
        group by run, iteration, series
        order by run, series desc, iteration
        """,
    ),
    Curve(
        "Mismatch",
        "nats",
        "Mean distance of sampler and learner per token, before any step; above 0.05 mind it.",
        "no update yet",
        _FIRST_STEP.format(column="mismatch_mean"),
    ),
    Curve(
        "Groups without signal",
        SHARE,
        "Share of groups whose rewards are all equal: their advantages are 0.",
        "no advantages yet",
        """
        select run, iteration, '' as series,
            avg((group_std = 0)::integer) as value,
        from (
            select distinct run, iteration, group_id, group_std,
            from advantages
            where group_std is not null
        )
        group by run, iteration
        order by run, iteration
        """,
    ),
    Curve(
        "Gradient norm",
        "",
        "Before clipping at max_grad_norm; mean over the steps taken.",
        "no update yet",
        """
        select run, iteration, '' as series,
            avg(grad_norm order by epoch, step) as value,
        from updates
        where not skipped and grad_norm is not null
        group by run, iteration
        order by run, iteration
        """,
    ),
    Curve(
        "Seconds by stage",
        "s",
        "Where the time of an iteration goes.",
        "nothing was timed",
        """
        select run, iteration, stage as series, sum(seconds) as value,
        from timings
        -- The last policy is measured and nothing else: that is no iteration.
        semi join rollouts using (run, iteration)
        group by run, iteration, stage
        order by run,
            list_position(
                ['generate', 'score', 'advantage', 'update', 'evaluate'], stage
            ),
            stage, iteration
        """,
        stacked=True,
    ),
)

# iteration: the policy that was measured, the one that the iteration of that number samples from.
EVALUATION = (
    Curve(
        "Held-out pass@k",
        SHARE,
        "Chance that one of k responses to a held-out prompt passes; 95 % interval over prompts.",
        "no evaluation",
        """
        select run, iteration, 'pass@' || k as series, pass_at[k] as value,
            pass_at_low[k] as low, pass_at_high[k] as high,
        from (
            select *, unnest(list_distinct([1, list_max(map_keys(pass_at))])) as k,
            from evals
            where pass_at is not null
        )
        order by run, k, iteration
        """,
        section="evaluation",
    ),
    Curve(
        "Held-out reward",
        "",
        "Mean over held-out prompts of the weighted sum of the rewards; 95 % interval.",
        "no evaluation",
        """
        select run, iteration, '' as series, reward as value,
            reward_low as low, reward_high as high,
        from evals
        where reward is not null
        order by run, iteration
        """,
        section="evaluation",
    ),
    Curve(
        "Held-out response length",
        "tokens",
        "Mean number of response tokens to held-out prompts.",
        "no evaluation",
        """
        select run, iteration, '' as series, response_tokens as value,
        from evals
        order by run, iteration
        """,
        section="evaluation",
    ),
)

CURVES = TRAINING + EVALUATION
