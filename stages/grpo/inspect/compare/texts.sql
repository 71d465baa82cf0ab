-- Grain: one row per rollout of the group $group_id, of one iteration.
with final as (
    select
        sample_id,
        prompt,
        response,
    from rollouts
    where group_id = $group_id
)

select * from final
order by sample_id
