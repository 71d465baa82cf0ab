-- Grain: one row per rollout of the iteration: its reward, and whether that
-- counts in its group (scored). A rollout with any failed reward, or with none
-- that applies, has no reward: never a silent zero.
with rollouts_in as (
    select
        iteration,
        group_id,
        sample_id,
        response_tokens = 0 as empty,
        finish_reason = 'abort' as aborted,
        finish_reason = 'length' as truncated,
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

-- One term or two add up to the same in any order. More are ordered by name,
-- which costs five times as much, and summed with compensation (fsum), so that
-- 0.1 + 0.2 + 0.3 is 0.3 + 0.2 + 0.1: rounding is no difference between
-- rollouts. reward_names holds their number, one row.
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
        fsum(term order by name) as total,
        bool_or(failed) as failed,
    from weighted
    where (select number > 2 from reward_names)
    group by iteration, group_id, sample_id
),

final as (
    select
        iteration,
        group_id,
        sample_id,
        empty,
        truncated,
        case when not failed then total end as reward,
        reward is not null and not empty and not aborted as scored,
    from rollouts_in
    left join rewards_in using (iteration, group_id, sample_id)
)

select * from final
