-- Grain: one row per prompt of run $run: how it begins, for who points at it.
with drawn as (
    select
        prompt_id,
        min(prompt) as prompt,
    from rollouts
    where run = $run
    group by prompt_id
),

final as (
    select
        prompt_id,
        -- 2,000,000 characters in all: of very many prompts, less of each.
        prompt[
            :least(240, 2000000 // (select count(*) from drawn))::integer
        ] as prompt,
    from drawn
)

select * from final
order by prompt_id
