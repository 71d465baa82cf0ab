-- Grain: one row per curve, run, iteration and series that has a value there.
-- place: the order of the series of a curve. low, high: of an interval.
-- is_binary: whether a reward gives 0 and 1 only.
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

binary_rewards as (
    select run, name, bool_and(value in (0, 1)) as is_binary,
    from rewards
    where status = 'ok'
    group by run, name
),

stage_times as (
    select run, iteration, unnest(map_entries(stage_seconds)) as entry,
    from numbers
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
    select 'rewards' as curve, run, iteration, name as series, 0 as place,
        value, is_binary,
    from reward_means
    join binary_rewards using (run, name)
    union all by name
    select 'clipped' as curve, run, iteration,
        side.replace('clip_fraction_', '') as series,
        (series = 'high')::integer as place, value,
    from clipped
    union all by name
    select 'seconds' as curve, run, iteration, entry.key as series,
        list_position(
            ['generate', 'score', 'advantage', 'update', 'evaluate'], entry.key
        ) as place,
        entry.value as value,
    from stage_times
    union all by name
    select 'eval_pass' as curve, run, iteration, 'pass@' || k as series,
        k as place, pass_at[k] as value,
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

final as (
    select * from every
    where value is not null
)

select * from final
order by curve, run, place, series, iteration
