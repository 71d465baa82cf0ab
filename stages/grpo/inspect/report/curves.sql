-- Grain: one row per chart that has a value: per curve, of rewards per name.
-- series: lists by iteration, those of the first of $runs first; low, high: of
-- an interval. title, unit, meaning: of the chart of one reward; where it gives
-- 0 and 1 only, the mean is a pass rate.
with numbers as materialized (
    from iterations
),

plain as (
    unpivot numbers
    on reward, kl, entropy, response_tokens, truncated, mismatch_mean,
        groups_without_signal, grad_norm
    into name curve value value
),

clipped as (
    unpivot numbers
    on clip_fraction_low, clip_fraction_high
    into name side value value
),

reward_means as (
    select run, iteration, entry.key as name, entry.value as value,
    from (
        select run, iteration, unnest(map_entries(rewards)) as entry,
        from numbers
    )
),

reward_kinds as (
    select name as reward, bool_and(value in (0, 1)) as is_binary,
    from rewards
    where status = 'ok'
    group by name
),

-- Stages on one another for one run; for several, all of them together.
stage_times as (
    select
        run,
        iteration,
        if(len($runs) = 1, entry.key, '') as series,
        sum(entry.value order by entry.key) as value,
    from (
        select run, iteration, unnest(map_entries(stage_seconds)) as entry,
        from numbers
    )
    group by all
),

passes as (
    select *, unnest(list_distinct([1, list_max(map_keys(pass_at))])) as k,
    from evals
    where pass_at is not null
),

every as (
    select curve, run, iteration, '' as series, 0 as place, value,
    from plain
    union all by name
    select 'rewards' as curve, name as reward, run, iteration, '' as series,
        0 as place, value,
    from reward_means
    union all by name
    select 'clipped' as curve, run, iteration,
        side.replace('clip_fraction_', '') as series,
        (series = 'high')::integer as place, value,
    from clipped
    union all by name
    select 'seconds' as curve, run, iteration, series,
        list_position(
            ['generate', 'score', 'advantage', 'update', 'evaluate'], series
        ) as place,
        value,
    from stage_times
    union all by name
    select 'eval_pass' as curve, pass_reward as reward, run, iteration,
        'pass@' || k as series, k as place, pass_at[k] as value,
        pass_at_low[k] as low, pass_at_high[k] as high,
    from passes
    union all by name
    select 'eval_reward' as curve, run, iteration, '' as series, 0 as place,
        reward as value, reward_low as low, reward_high as high,
    from evals
    union all by name
    select 'eval_length' as curve, run, iteration, '' as series, 0 as place,
        response_tokens as value,
    from evals
),

lines as (
    select
        curve, reward, run, series as name, place,
        list_position($runs, run) as run_place,
        list(iteration order by iteration) as x,
        list(value order by iteration) as y,
        if(count(low) > 0, list(low order by iteration), null) as low,
        if(count(high) > 0, list(high order by iteration), null) as high,
    from every
    where value is not null
    group by all
),

final as (
    select
        curve,
        reward,
        case
            when curve = 'eval_pass' then 'Held-out pass@k: '
            when is_binary then 'Pass rate: '
            else 'Reward: '
        end || reward as title,
        if(curve = 'rewards' and is_binary, 'share', null) as unit,
        if(
            curve = 'rewards' and is_binary,
            'Share of rollouts to which this reward gave 1, the others 0.',
            null
        ) as meaning,
        min(run_place) as run_place,
        list(
            {run: run, name: name, x: x, y: y, low: low, high: high}
            order by run_place, place, name
        ) as series,
    from lines
    left join reward_kinds using (reward)
    group by all
)

select * exclude (run_place) from final
order by curve, run_place, reward
