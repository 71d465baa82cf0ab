-- Grain: one row per run, iteration from $first to $last, group, and number.
-- The mean over the rollouts of the group that have it.
with rollouts_in as (
    select
        run,
        iteration,
        group_id,
        min(prompt_id) as prompt_id,
        avg(response_tokens) as response_tokens,
        avg((finish_reason = 'length')::integer) as truncated,
    from rollouts
    where iteration between $first and $last
    group by run, iteration, group_id
),

advantages_in as (
    select
        run,
        iteration,
        group_id,
        avg(reward order by sample_id) as reward,
        (max(group_std) = 0)::double as groups_without_signal,
    from advantages
    where iteration between $first and $last
    group by run, iteration, group_id
),

rewards_in as (
    select
        run,
        iteration,
        group_id,
        'rewards.' || name as name,
        avg(value order by sample_id) as value,
    from rewards
    where iteration between $first and $last and status = 'ok'
    group by run, iteration, group_id, name
),

wide as (
    select
        run,
        iteration,
        group_id,
        reward,
        response_tokens,
        truncated,
        groups_without_signal,
    from rollouts_in
    left join advantages_in using (run, iteration, group_id)
),

long as (
    unpivot wide
    on reward, response_tokens, truncated, groups_without_signal
    into name name value value
),

every_number as (
    select run, iteration, group_id, name, value from long
    union all
    select run, iteration, group_id, name, value from rewards_in
),

final as (
    select
        every_number.run,
        every_number.iteration,
        every_number.group_id,
        rollouts_in.prompt_id,
        every_number.name,
        every_number.value,
    from every_number
    join rollouts_in using (run, iteration, group_id)
)

select * from final
order by name, run, iteration, group_id
