-- Grain: one row per run, iteration and curve that has a value there: a number
-- of `iterations`, a reward by its name, what was spent since iteration 0
-- (rollouts, response tokens), and of each policy measured its evaluation.
with wide as (
    select
        run,
        iteration,
        reward,
        pass_rate,
        kl,
        entropy,
        response_tokens,
        truncated,
        groups_without_signal,
        (sum(rollouts) over spent)::double as rollouts_spent,
        (sum(tokens) over spent)::double as tokens_spent,
        seconds,
    from iterations
    window spent as (partition by run order by iteration)
),

numbers as (
    unpivot wide
    on columns(* exclude (run, iteration))
    into name name value value
),

reward_values as (
    select
        run,
        iteration,
        unnest(map_entries(rewards)) as entry,
    from iterations
),

-- The last policy is measured too, and no iteration samples from it.
evaluated as (
    unpivot (
        select
            run,
            iteration,
            pass_at[1] as eval_pass_at_1,
            reward as eval_reward,
        from evals
    )
    on columns(* exclude (run, iteration))
    into name name value value
),

final as (
    select run, iteration, name, value from numbers
    union all
    select
        run,
        iteration,
        'rewards.' || entry.key as name,
        entry.value as value,
    from reward_values
    where entry.value is not null
    union all
    select run, iteration, name, value from evaluated
)

select * from final
order by name, iteration, run
