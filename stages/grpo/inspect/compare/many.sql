-- Grain: one row per number that one of $runs has: `values`, its value by run:
-- the mean over the iterations from $first to $last, each counting alike; of
-- rollouts, tokens and seconds the sum up to $last; of evaluations the last.
with own as (
    select * from iterations
    where list_contains($runs, run)
),

wide as (
    select
        run,
        avg(reward order by iteration) as reward,
        avg(pass_rate order by iteration) as pass_rate,
        avg(kl order by iteration) as kl,
        avg(entropy order by iteration) as entropy,
        avg(response_tokens order by iteration) as response_tokens,
        avg(truncated order by iteration) as truncated,
        avg(groups_without_signal order by iteration) as groups_without_signal,
    from own
    where iteration between $first and $last
    group by run
),

spent as (
    select
        run,
        sum(rollouts)::double as rollouts_spent,
        sum(tokens)::double as tokens_spent,
        sum(seconds order by iteration) as seconds,
    from own
    where iteration <= $last
    group by run
),

measured as (
    select
        run,
        arg_max(pass_at[1], iteration) as eval_pass_at_1,
        arg_max(reward, iteration) as eval_reward,
    from evals
    where list_contains($runs, run)
    group by run
),

reward_means as (
    select
        run,
        'rewards.' || entry.key as name,
        avg(entry.value order by iteration) as value,
    from (
        select run, iteration, unnest(map_entries(rewards)) as entry
        from own
        where iteration between $first and $last
    )
    group by all
),

every_value as (
    unpivot (
        select * from wide
        left join spent using (run)
        left join measured using (run)
    )
    on columns(* exclude (run))
    into name name value value
    union all by name
    select run, name, value from reward_means
),

final as (
    select
        name,
        map(list(run order by run), list(value order by run)) as values,
    from every_value
    where value is not null
    group by name
)

select * from final
order by name
