-- Grain: one row per rollout of `scored`: what its group is, the advantage that
-- the estimator gave it (`estimated`, a file of estimators/), and whether update
-- trains on it. Formulas: docs/math.md. A group of one is not kept, unless
-- there is no reward to compare by: then the advantage is a teacher's alone.
with reasoned as (
    select
        *,
        case
            when empty then 'empty'
            when not scored then 'unscored'
            when group_size < 2 and not unrewarded then 'group_too_small'
            when $drop_zero_variance and constant then 'zero_variance'
            when $truncated = 'drop' and truncated then 'truncated'
        end as reason,
    from scored
    left join estimated using (iteration, group_id, sample_id)
    cross join reward_names
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
        case
            when reason is not null then null
            when unrewarded then 0.0
            else advantage
        end as advantage,
        reason is null as keep,
        reason,
    from reasoned
)

select * from final
order by iteration, group_id, sample_id
