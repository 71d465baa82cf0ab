-- Grain: one row: how much run $run did. seconds: of the four stages, as in the
-- lines of `grpo run`, null where nothing was timed; first_passed, last_passed:
-- the pass rates of the iterations that have one.
with timed as (
    select sum(seconds) as seconds
    from timings
    where run = $run and iteration is not null and stage <> 'evaluate'
),

passes as (
    select
        arg_min(pass_rate, iteration) as first_passed,
        arg_max(pass_rate, iteration) as last_passed,
    from iterations
    where run = $run and pass_rate is not null
),

final as (
    select
        count(distinct iteration) as iterations,
        count(*) as rollouts,
        count(distinct prompt_id) as prompts,
        sum(response_tokens)::bigint as tokens,
        (from timed) as seconds,
        (select first_passed from passes) as first_passed,
        (select last_passed from passes) as last_passed,
    from rollouts
    where run = $run
)

select * from final
