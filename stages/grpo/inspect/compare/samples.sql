-- Grain: one row per rollout of a group of `paired` (paired.sql), the best by
-- A first.
with final as (
    select
        rollouts.prompt,
        sample_id,
        rollouts.response,
        paired.a,
        paired.b,
    from rollouts
    join paired using (iteration, group_id, sample_id)
    where
        rollouts.iteration = $iteration
        and rollouts.group_id = $group_id
)

select * from final
order by a desc, b desc, sample_id
