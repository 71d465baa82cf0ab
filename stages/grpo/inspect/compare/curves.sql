-- Grain: one row per run, iteration and curve that has a value there.
-- kl and entropy: means over the optimiser steps taken. rollouts_spent and
-- tokens_spent count from iteration 0 on; response tokens only.
with of_rollouts as (
    select
        run,
        iteration,
        avg(response_tokens) as length,
        avg((finish_reason = 'length')::integer) as truncated,
        count(*)::double as rollouts,
        sum(response_tokens)::double as tokens,
    from rollouts
    group by run, iteration
),

groups_in as (
    select
        run,
        iteration,
        group_id,
        coalesce(max(group_std) > 0, false) as has_signal,
    from advantages
    group by run, iteration, group_id
),

of_groups as (
    select
        run,
        iteration,
        avg(has_signal::integer) as groups_with_signal,
    from groups_in
    group by run, iteration
),

of_advantages as (
    select
        run,
        iteration,
        avg(reward order by group_id, sample_id) as reward,
    from advantages
    group by run, iteration
),

of_updates as (
    select
        run,
        iteration,
        avg(kl order by epoch, step) as kl,
        avg(entropy order by epoch, step) as entropy,
    from updates
    where not skipped
    group by run, iteration
),

of_timings as (
    select
        run,
        iteration,
        sum(seconds order by stage, part) as seconds,
    from timings
    where iteration is not null
    group by run, iteration
),

wide as (
    select
        run,
        iteration,
        of_advantages.reward,
        of_updates.kl,
        of_updates.entropy,
        of_rollouts.length,
        of_rollouts.truncated,
        of_groups.groups_with_signal,
        sum(of_rollouts.rollouts) over spent as rollouts_spent,
        sum(of_rollouts.tokens) over spent as tokens_spent,
        of_timings.seconds,
    from of_rollouts
    left join of_advantages using (run, iteration)
    left join of_updates using (run, iteration)
    left join of_groups using (run, iteration)
    left join of_timings using (run, iteration)
    window spent as (partition by run order by iteration)
),

final as (
    unpivot wide
    on columns(* exclude (run, iteration))
    into name name value value
)

select * from final
order by name, iteration, run
