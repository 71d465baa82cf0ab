-- Grain: one row per prompt, at most $count: of its `groups` (groups.sql) the
-- one in which the rewards disagree most, by the share of flipped pairs, then
-- by how advantages change; those without any change left out.
with final as (
    select
        iteration,
        group_id,
        pairs,
        flipped,
        advantage_difference,
    from groups
    where advantage_difference > 0
    qualify row_number() over (
        partition by prompt_id
        order by
            flipped / pairs desc,
            advantage_difference desc,
            iteration,
            group_id
    ) = 1
)

select * exclude (advantage_difference) from final
order by flipped / pairs desc, advantage_difference desc, iteration, group_id
limit $count
