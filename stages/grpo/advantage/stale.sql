-- Grain: one row per rollout of `fresh_or_not`, the rows of advantage.sql. One that
-- was sampled by a policy more than $max_policy_lag behind that of its iteration is
-- not kept; it counts in its group's mean. Used where advantage.max_policy_lag is.
with aged as (
    select
        fresh_or_not.*,
        keep and iteration - policy_iteration > $max_policy_lag as stale,
    from fresh_or_not
    left join rollouts using (iteration, group_id, sample_id)
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
        case when not stale then advantage end as advantage,
        keep and not stale as keep,
        case when stale then 'stale' else reason end as reason,
    from aged
)

select * from final
order by iteration, group_id, sample_id
