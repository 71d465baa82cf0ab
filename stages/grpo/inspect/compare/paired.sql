-- Grain: one row per rollout that can be scored, with its value under the
-- rewards $a and $b; null where it has none. `reward` is the weighted sum,
-- unless a reward of that name is there. An empty or aborted rollout is no
-- part of its group, as in sql/views/scored.sql. The values of a group that are
-- equal up to rounding are the same: rounding prefers no rollout.
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

magnitudes as (
    select
        iteration,
        group_id,
        sample_id,
        sum(abs(weight * value) order by name) as magnitude,
    from rewards
    where iteration between $first and $last
    group by iteration, group_id, sample_id
),

named as (
    select
        iteration,
        group_id,
        sample_id,
        name,
        value,
        abs(value) as magnitude,
    from rewards
    where iteration between $first and $last and status = 'ok'
    union all
    select
        iteration,
        group_id,
        sample_id,
        'reward' as name,
        reward as value,
        magnitude,
    from advantages
    join magnitudes using (iteration, group_id, sample_id)
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
        case
            when
                equal_up_to_rounding(
                    min(values_a.value) over in_group,
                    max(values_a.value) over in_group,
                    max(values_a.magnitude) over in_group
                )
                and values_a.value is not null
                then min(values_a.value) over in_group
            else values_a.value
        end as a,
        case
            when
                equal_up_to_rounding(
                    min(values_b.value) over in_group,
                    max(values_b.value) over in_group,
                    max(values_b.magnitude) over in_group
                )
                and values_b.value is not null
                then min(values_b.value) over in_group
            else values_b.value
        end as b,
    from rollouts_in
    left join values_a using (iteration, group_id, sample_id)
    left join values_b using (iteration, group_id, sample_id)
    window
        in_group as (partition by rollouts_in.iteration, rollouts_in.group_id)
)

select * from final
order by iteration, group_id, sample_id
