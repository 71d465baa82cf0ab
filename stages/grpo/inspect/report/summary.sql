-- Grain: one row: how much run $run did. seconds: null where nothing was timed.
with timed as (
    select sum(seconds) as seconds
    from timings
    where run = $run and iteration is not null
),

final as (
    select
        count(distinct iteration) as iterations,
        count(*) as rollouts,
        count(distinct prompt_id) as prompts,
        sum(response_tokens)::bigint as tokens,
        (from timed) as seconds,
    from rollouts
    where run = $run
)

select * from final
