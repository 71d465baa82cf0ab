-- Grain: one row per curve, run, iteration and series that has a value there.
-- place: the order of the series of a curve. low, high: of an interval.
-- is_binary: whether a reward gives 0 and 1 only.
-- kl, entropy, mismatch: of the first step that was taken, where the weights are
-- still those that sampled; the other numbers of steps are means over all taken.
with steps as (
    select
        *,
        row_number() over (partition by run, iteration order by epoch, step) = 1
            as is_first,
    from updates
    where not skipped
),

groups_in as (
    select distinct run, iteration, group_id, group_std,
    from advantages
    where group_std is not null
),

passes as (
    select *, unnest(list_distinct([1, list_max(map_keys(pass_at))])) as k,
    from evals
    where pass_at is not null
),

plain as (
    select 'reward' as curve, run, iteration,
        avg(reward order by group_id, sample_id) as value,
    from advantages group by run, iteration
    union all
    select 'kl', run, iteration, kl from steps where is_first
    union all
    select 'entropy', run, iteration, entropy from steps where is_first
    union all
    select 'mismatch', run, iteration, mismatch_mean from steps where is_first
    union all
    select 'length', run, iteration, avg(response_tokens),
    from rollouts group by run, iteration
    union all
    select 'truncated', run, iteration, avg((finish_reason = 'length')::integer),
    from rollouts group by run, iteration
    union all
    select 'no_signal', run, iteration, avg((group_std = 0)::integer),
    from groups_in group by run, iteration
    union all
    select 'grad_norm', run, iteration, avg(grad_norm order by epoch, step),
    from steps group by run, iteration
    union all
    select 'eval_length', run, iteration, response_tokens from evals
),

every as (
    select *, '' as series, 0 as place from plain
    union all by name
    select 'rewards' as curve, run, iteration, name as series, 0 as place,
        avg(value order by group_id, sample_id) as value,
        bool_and(value in (0, 1)) as is_binary,
    from rewards where status = 'ok' group by run, iteration, name
    union all by name
    select 'clipped' as curve, run, iteration, 'low' as series, 0 as place,
        avg(clip_fraction_low order by epoch, step) as value,
    from steps group by run, iteration
    union all by name
    select 'clipped' as curve, run, iteration, 'high' as series, 1 as place,
        avg(clip_fraction_high order by epoch, step) as value,
    from steps group by run, iteration
    union all by name
    select 'seconds' as curve, run, iteration, stage as series,
        list_position(
            ['generate', 'score', 'advantage', 'update', 'evaluate'], stage
        ) as place,
        sum(seconds) as value,
    from timings
    -- The last policy is measured and nothing else: that is no iteration.
    semi join rollouts using (run, iteration)
    group by run, iteration, stage
    union all by name
    select 'eval_pass' as curve, run, iteration, 'pass@' || k as series,
        k as place, pass_at[k] as value,
        pass_at_low[k] as low, pass_at_high[k] as high,
    from passes
    union all by name
    select 'eval_reward' as curve, run, iteration, '' as series, 0 as place,
        reward as value, reward_low as low, reward_high as high,
    from evals
),

final as (
    select * from every
    where value is not null
)

select * from final
order by curve, run, place, series, iteration
