-- Grain: one row per curve that has a value in both of the runs $a and $b: a
-- number of `iterations`, a reward by its name, what was spent since iteration
-- 0 (rollouts, response tokens), and of each policy measured its evaluation.
-- `points`: its values in the iterations from $first to $last.
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

every_value as (
    select run, iteration, name, value from numbers
    union all
    select
        run,
        iteration,
        'rewards.' || entry.key as name,
        entry.value as value,
    from reward_values
    union all
    select run, iteration, name, value from evaluated
),

points as (
    select
        name,
        iteration,
        max(value) filter (where run = $a) as a,
        max(value) filter (where run = $b) as b,
    from every_value
    where iteration between $first and $last
    group by name, iteration
),

final as (
    select
        name,
        list({iteration: iteration, a: a, b: b} order by iteration) as points,
    from points
    where a is not null or b is not null
    group by name
    having count(a) > 0 and count(b) > 0
)

select * from final
order by name
