-- Grain: one row per rollout that can be scored, with its value under the
-- rewards $a and $b; null where it has none. `reward` is the weighted sum,
-- unless a reward of that name is there. An empty or aborted rollout is no
-- part of its group, as in advantage/scored.sql.
with rollouts_in as (
    select
        iteration,
        group_id,
        sample_id,
        prompt_id,
    from rollouts
    where
        iteration between $first and $last
        and response_tokens > 0
        and finish_reason <> 'abort'
),

named as (
    select
        iteration,
        group_id,
        sample_id,
        name,
        value,
    from rewards
    where iteration between $first and $last and status = 'ok'
    union all
    select
        iteration,
        group_id,
        sample_id,
        'reward' as name,
        reward as value,
    from advantages
    where
        iteration between $first and $last
        and not exists (select 1 from rewards where name = 'reward')
),

values_a as (
    select * from named where name = $a
),

values_b as (
    select * from named where name = $b
),

final as (
    select
        rollouts_in.iteration,
        rollouts_in.group_id,
        rollouts_in.sample_id,
        rollouts_in.prompt_id,
        values_a.value as a,
        values_b.value as b,
    from rollouts_in
    left join values_a using (iteration, group_id, sample_id)
    left join values_b using (iteration, group_id, sample_id)
)

select * from final
order by iteration, group_id, sample_id
