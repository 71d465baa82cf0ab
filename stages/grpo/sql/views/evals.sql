-- Grain: one row per evaluation: a run and the policy (iteration) measured.
-- pass_at[k]: chance that one of k responses passes, 1 - C(n-c, k) / C(n, k) of
-- a prompt with n responses of which c passed (Chen et al. 2021, 2107.03374),
-- which is 1 - product(1 - k/i, i from n-c+1 to n); then the mean over prompts.
-- Sums are ordered: equal tables give equal bits on any number of threads.
-- Intervals are of 95 % and by prompt: responses to one prompt are no
-- independent draws, prompts are.
with by_prompt as (
    select
        run,
        iteration,
        group_id,
        count(*) as samples,
        count(passed) as n,
        count(*) filter (passed) as c,
        avg(reward order by sample_id) as reward,
        sum(response_tokens) as response_tokens,
        count(*) filter (finish_reason = 'length') as truncated,
    from eval_samples
    group by all
),

-- k: the powers of two below the most responses of a prompt, and that number.
ks as (
    select
        run,
        iteration,
        unnest(list_append(
            list_filter(
                list_transform(range(32), lambda i: 1::bigint << i::bigint),
                lambda k: k < max(n)
            ),
            max(n)
        )) as k,
    from by_prompt
    group by run, iteration
    having max(n) > 0
),

estimates as (
    select
        run,
        iteration,
        group_id,
        k,
        n,
        1 - coalesce(
            list_aggregate(
                list_transform(range(n - c + 1, n + 1), lambda i: 1 - k / i),
                'product'
            ),
            1
        ) as value,
    from by_prompt
    join ks using (run, iteration)
    where n >= k
),

spreads as (
    select
        run,
        iteration,
        k,
        avg(value order by group_id) as p,
        var_samp(value order by group_id) as variance,
        count(*) as prompts,
        sum(n) as responses,
    from estimates
    group by run, iteration, k
),

-- The number of independent trials that the spread over prompts amounts to
-- (effective sample size, as in surveys with clusters): p (1 - p) over the
-- variance of the mean; no less than there are prompts, no more than responses.
trials as (
    select
        run,
        iteration,
        k,
        p,
        greatest(
            prompts,
            case
                when p in (0, 1) or prompts = 1 then prompts
                when variance = 0 then responses
                else least(responses, p * (1 - p) * prompts / variance)
            end
        ) as size,
        1.959963984540054 as z,
    from spreads
),

-- Wilson's interval: within [0, 1], and of some width where all or none pass.
wilson as (
    select
        run,
        iteration,
        k,
        p,
        (p + z ** 2 / (2 * size)) / (1 + z ** 2 / size) as centre,
        z / (1 + z ** 2 / size)
            * sqrt(p * (1 - p) / size + z ** 2 / (4 * size ** 2)) as half,
    from trials
),

passes as (
    select
        run,
        iteration,
        map(list(k order by k), list(p order by k)) as pass_at,
        map(
            list(k order by k),
            list(greatest(0, centre - half) order by k)
        ) as pass_at_low,
        map(
            list(k order by k),
            list(least(1, centre + half) order by k)
        ) as pass_at_high,
    from wilson
    group by run, iteration
),

-- Normal interval on the means of prompts; null of a single prompt.
totals as (
    select
        run,
        iteration,
        count(*) as prompts,
        sum(samples)::bigint as samples,
        sum(samples - n)::bigint as unscored,
        avg(reward order by group_id) as reward,
        1.959963984540054 * stddev_samp(reward order by group_id)
            / sqrt(count(reward)) as spread,
        sum(response_tokens) / sum(samples) as response_tokens,
        sum(truncated) / sum(samples) as truncated,
    from by_prompt
    group by run, iteration
),

by_reward as (
    select
        run,
        iteration,
        map(list(name order by name), list(value order by name)) as rewards,
    from (
        select run, iteration, name, avg(value order by group_id) as value
        from (
            select
                run,
                iteration,
                group_id,
                name,
                avg(value order by sample_id) as value,
            from eval_rewards
            group by all
        )
        group by all
    )
    group by all
),

final as (
    select
        totals.run,
        totals.iteration,
        totals.prompts,
        totals.samples,
        totals.unscored,
        _eval_settings.pass_reward,
        _eval_settings.pass_threshold,
        passes.pass_at,
        passes.pass_at_low,
        passes.pass_at_high,
        totals.reward,
        totals.reward - totals.spread as reward_low,
        totals.reward + totals.spread as reward_high,
        by_reward.rewards,
        totals.response_tokens,
        totals.truncated,
    from totals
    left join _eval_settings using (run, iteration)
    left join passes using (run, iteration)
    left join by_reward using (run, iteration)
)

select * from final
