-- Grain: one row per prompt that the iterations $iterations of run $run drew in
-- the first $groups groups of each. answer: null where the prompts have none.
with drawn as (
    select
        prompt_id,
        min(prompt) as prompt,
    from rollouts
    where
        run = $run
        and list_contains($iterations, iteration)
        and group_id < $groups
    group by prompt_id
),

final as (
    select
        prompt_id,
        drawn.prompt,
        answer,
    from drawn
    left join (from prompts where run = $run) as prompts using (prompt_id)
)

select * from final
order by prompt_id
