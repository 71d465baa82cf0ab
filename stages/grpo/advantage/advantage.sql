-- Grain: one row per rollout of the iteration.
-- Formulas: docs/math.md. Every aggregate is ordered, so the result is the
-- same to the last bit for any number of threads and any layout of files.
-- A group of one is not kept; a group of equal rewards gets exactly 0.
with rollouts_in as (
    select
        iteration,
        group_id,
        sample_id,
        response_tokens,
        finish_reason,
    from rollouts
),

-- Weight 0 is stored to be compared with; it is no part of the sum.
weighted as (
    select
        iteration,
        group_id,
        sample_id,
        name,
        weight * value as term,
        status in ('error', 'timeout', 'nonfinite') as failed,
    from rewards
    where weight <> 0
),

reward_names as (
    select count(distinct name) as number
    from weighted
),

-- One term or two add up to the same in any order; more are ordered by name,
-- which costs five times as much.
rewards_in as (
    select
        iteration,
        group_id,
        sample_id,
        sum(term) as total,
        bool_or(failed) as failed,
    from weighted
    where (select number <= 2 from reward_names)
    group by iteration, group_id, sample_id
    union all
    select
        iteration,
        group_id,
        sample_id,
        sum(term order by name) as total,
        bool_or(failed) as failed,
    from weighted
    where (select number > 2 from reward_names)
    group by iteration, group_id, sample_id
),

-- A rollout with any failed reward, or with none that applies, has no reward.
judged as (
    select
        iteration,
        group_id,
        sample_id,
        response_tokens,
        finish_reason,
        case when not failed then total end as reward,
        reward is not null
            and response_tokens > 0
            and finish_reason <> 'abort' as scored,
    from rollouts_in
    left join rewards_in using (iteration, group_id, sample_id)
),

group_statistics as (
    select
        iteration,
        group_id,
        count(*)::integer as group_size,
        max(reward) = min(reward) as constant,
        avg(reward order by sample_id) as mean,
        stddev_samp(reward order by sample_id) as deviation,
    from judged
    where scored
    group by iteration, group_id
),

batch_statistics as (
    select stddev_samp(reward order by group_id, sample_id) as deviation,
    from judged
    inner join group_statistics using (iteration, group_id)
    where $scale = 'batch' and scored and group_size >= 2
),

-- Rounding must not turn a constant group into noise divided by epsilon.
measured as (
    select
        judged.*,
        coalesce(group_size, 0) as group_size,
        constant,
        case when constant then reward else mean end as group_mean,
        case when constant and group_size >= 2 then 0.0
            else group_statistics.deviation end as group_std,
        case
            when constant then 0.0
            when $scale = 'group' then
                (reward - mean) / (group_statistics.deviation + $epsilon)
            when $scale = 'batch' then
                (reward - mean) / (batch_statistics.deviation + $epsilon)
            else reward - mean
        end as advantage,
        case
            when response_tokens = 0 then 'empty'
            when not scored then 'unscored'
            when group_size < 2 then 'group_too_small'
            when $drop_zero_variance and constant then 'zero_variance'
            when $truncated = 'drop' and finish_reason = 'length'
                then 'truncated'
        end as reason,
    from judged
    left join group_statistics using (iteration, group_id)
    cross join batch_statistics
),

final as (
    select
        iteration,
        group_id,
        sample_id,
        reward,
        group_mean,
        group_std,
        group_size,
        case when reason is null then advantage end as advantage,
        reason is null as keep,
        reason,
    from measured
)

select * from final
order by iteration, group_id, sample_id
