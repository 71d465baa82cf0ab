-- Grain: one row per rollout of a prompt, over all iterations that drew it.
with final as (
    select * from samples
    where prompt_id = $prompt_id
)

select * from final
order by run, iteration, group_id, sample_id
