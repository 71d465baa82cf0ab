-- Grain: one row per rollout of the iteration: its reward, whether that counts
-- in its group (scored), and the numbers of that group. A rollout with any
-- failed reward, or with none that applies, has no reward: never a silent zero.
-- Every aggregate is ordered, so the result is the same to the last bit for any
-- number of threads and any layout of files. Only the groups
-- from first_group to last_group are computed.
with rollouts_in as (
    select
        iteration,
        group_id,
        sample_id,
        len(list_filter(response_mask, lambda counts: counts)) as tokens,
        response_tokens = 0 as empty,
        finish_reason = 'abort' as aborted,
        finish_reason = 'length' as truncated,
    from rollouts
    where
        group_id between getvariable('first_group')::integer
        and getvariable('last_group')::integer
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
    where
        weight <> 0
        and group_id between getvariable('first_group')::integer
        and getvariable('last_group')::integer
),

-- One term or two add up to the same in any order. More are ordered by name,
-- which costs five times as much, and summed with compensation (fsum), so that
-- 0.1 + 0.2 + 0.3 is 0.3 + 0.2 + 0.1. reward_names holds their number, one row.
rewards_in as (
    select
        iteration,
        group_id,
        sample_id,
        sum(term) as total,
        sum(abs(term)) as magnitude,
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
        fsum(abs(term) order by name) as magnitude,
        bool_or(failed) as failed,
    from weighted
    where (select number > 2 from reward_names)
    group by iteration, group_id, sample_id
),

-- Where only teachers say what is good, no rollout has a reward and all count.
measured as (
    select
        iteration,
        group_id,
        sample_id,
        tokens,
        empty,
        truncated,
        case when not failed then total end as reward,
        magnitude,
        (reward is not null or (select unrewarded from reward_names))
        and not empty
        and not aborted as scored,
    from rollouts_in
    left join rewards_in using (iteration, group_id, sample_id)
),

groups_in as (
    select
        iteration,
        group_id,
        count(*)::integer as group_size,
        list(reward order by sample_id) as group_rewards,
        equal_up_to_rounding(min(reward), max(reward), max(magnitude))
            as constant,
        max(magnitude) as largest,
    from measured
    where scored
    group by iteration, group_id
),

-- A deviation of 0 says that there is no signal: squares of rewards below
-- 1e-140 would vanish, and give one too.
groups as (
    select
        iteration,
        group_id,
        group_size,
        constant,
        list_avg(group_rewards) as group_mean,
        case
            when group_size < 2 then null
            when constant then 0.0
            when largest < 1e-140 then
                list_stddev_samp(
                    list_transform(group_rewards, lambda r: r / largest)
                ) * largest
            else list_stddev_samp(group_rewards)
        end as group_std,
    from groups_in
),

final as (
    select
        iteration,
        group_id,
        sample_id,
        tokens,
        empty,
        truncated,
        reward,
        magnitude,
        scored,
        coalesce(group_size, 0) as group_size,
        group_mean,
        group_std,
        constant,
        scored and group_size >= 2 as compared,
    from measured
    left join groups using (iteration, group_id)
)

select * from final
