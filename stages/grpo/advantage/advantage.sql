-- Grain: one row per rollout of the groups $first_group to $last_group.
-- Formulas: docs/math.md. Every aggregate is ordered, so the result is the
-- same to the last bit for any number of threads and any layout of files.
-- A group of one is not kept; a group of equal rewards gets exactly 0.
with scored_in as (
    select *
    from scored
    where group_id between $first_group and $last_group
),

group_statistics as (
    select
        iteration,
        group_id,
        count(*)::integer as group_size,
        max(reward) = min(reward) as constant,
        avg(reward order by sample_id) as mean,
        stddev_samp(reward order by sample_id) as deviation,
    from scored_in
    where scored
    group by iteration, group_id
),

-- Rounding must not turn a constant group into noise divided by epsilon.
measured as (
    select
        scored_in.*,
        coalesce(group_size, 0) as group_size,
        constant,
        mean as group_mean,
        case when constant and group_size >= 2 then 0.0 else deviation end
            as group_std,
        case
            when constant then 0.0
            when $scale = 'group' then (reward - mean) / (deviation + $epsilon)
            when $scale = 'batch' then
                (reward - mean) / ($batch_deviation + $epsilon)
            else reward - mean
        end as advantage,
        case
            when empty then 'empty'
            when not scored then 'unscored'
            when group_size < 2 then 'group_too_small'
            when $drop_zero_variance and constant then 'zero_variance'
            when $truncated = 'drop' and truncated then 'truncated'
        end as reason,
    from scored_in
    left join group_statistics using (iteration, group_id)
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
