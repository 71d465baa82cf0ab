-- Grain: one row per rollout of the groups $groups of one iteration.
with final as (
    select * from samples
    where group_id in (select unnest($groups))
)

select * from final
order by group_id, sample_id
