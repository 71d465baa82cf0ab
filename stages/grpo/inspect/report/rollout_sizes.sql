-- Grain: one row per iteration of run $run: what decides which fit into a page.
-- tokens: of all responses, and of each prompt at four bytes a token.
with final as (
    select
        iteration,
        count(distinct group_id) as groups,
        count(*) as rollouts,
        (
            sum(response_tokens)
            + coalesce(sum(strlen(prompt)) filter (sample_id = 0), 0) / 4
        )::bigint as tokens,
    from rollouts
    where run = $run
    group by iteration
)

select * from final
order by iteration
