-- Grain: one row per run and iteration that holds any table. Every number of
-- an iteration that any command shows is defined here; what each column is
-- stands in tables.py. Null where its table is not there yet.
with of_rollouts as (
    select
        run,
        iteration,
        count(*) as rollouts,
        count(distinct group_id) as groups,
        sum(response_tokens)::bigint as tokens,
        avg(response_tokens) as response_tokens,
        max(response_tokens) as response_tokens_max,
        avg((finish_reason = 'length')::integer) as truncated,
    from rollouts
    group by run, iteration
),

means as (
    select
        run,
        iteration,
        name,
        avg(value order by group_id, sample_id) as mean,
    from rewards
    group by run, iteration, name
),

of_rewards as (
    select
        run,
        iteration,
        map(list(name order by name), list(mean order by name)) as rewards,
    from means
    group by run, iteration
),

-- As an evaluation counts passes: by the reward and the threshold configured.
of_passes as (
    select
        run,
        iteration,
        avg((value >= pass_threshold)::integer) as pass_rate,
    from rewards
    join _pass_settings using (run)
    where name = pass_reward and value is not null
    group by run, iteration
),

of_advantages as (
    select
        run,
        iteration,
        avg(reward order by group_id, sample_id) as reward,
        count(*) filter (where keep) as rollouts_kept,
    from advantages
    group by run, iteration
),

reasons as (
    select
        run,
        iteration,
        reason,
        count(*) as rollouts,
    from advantages
    where not keep
    group by run, iteration, reason
),

of_reasons as (
    select
        run,
        iteration,
        map(list(reason order by reason), list(rollouts order by reason))
            as rollouts_dropped,
    from reasons
    group by run, iteration
),

-- The advantage stage says which groups have no signal: it gives them 0.
groups_in as (
    select distinct
        run,
        iteration,
        group_id,
        group_std,
    from advantages
    where group_std is not null
),

of_groups as (
    select
        run,
        iteration,
        avg((group_std = 0)::integer) as groups_without_signal,
    from groups_in
    group by run, iteration
),

of_steps as (
    select
        run,
        iteration,
        count(*) as steps,
        count(*) filter (where skipped) as steps_skipped,
    from updates
    group by run, iteration
),

-- share: of the tokens of the steps taken; 1 where there is one step.
taken as (
    select
        *,
        tokens / sum(tokens) over (partition by run, iteration) as share,
    from updates
    where not skipped
),

-- The mismatch is measured at the first step taken, and null at the others.
of_taken as (
    select
        run,
        iteration,
        sum(share * loss order by step) as loss,
        sum(share * policy_loss order by step) as policy_loss,
        sum(share * kl order by step) as kl,
        sum(share * entropy order by step) as entropy,
        sum(share * ratio_mean order by step) as ratio_mean,
        max(ratio_max) as ratio_max,
        sum(share * clip_fraction_low order by step) as clip_fraction_low,
        sum(share * clip_fraction_high order by step) as clip_fraction_high,
        sum(share * grad_norm order by step) as grad_norm,
        sum(share * learning_rate order by step) as learning_rate,
        max(mismatch_mean) as mismatch_mean,
        max(mismatch_max) as mismatch_max,
        max(mismatch_kl) as mismatch_kl,
        max(effective_sample_size) as effective_sample_size,
        max(over_cap_fraction) as over_cap_fraction,
    from taken
    group by run, iteration
),

stage_times as (
    select
        run,
        iteration,
        stage,
        list_position(
            ['generate', 'score', 'advantage', 'update', 'evaluate'], stage
        ) as place,
        sum(seconds order by part) as seconds,
    from timings
    where iteration is not null
    group by run, iteration, stage
),

-- An evaluation is of a policy: it is shown beside, and not in the sum.
of_times as (
    select
        run,
        iteration,
        sum(seconds order by place) filter (where stage <> 'evaluate')
            as seconds,
        map(list(stage order by place), list(seconds order by place))
            as stage_seconds,
        max(seconds) filter (where stage = 'generate') as generating,
    from stage_times
    group by run, iteration
),

present as (
    select run, iteration from of_rollouts
    union
    select run, iteration from of_rewards
    union
    select run, iteration from of_advantages
    union
    select run, iteration from of_steps
),

final as (
    select
        present.run,
        present.iteration,
        of_advantages.reward,
        of_rewards.rewards,
        of_passes.pass_rate,
        of_rollouts.groups,
        of_groups.groups_without_signal,
        of_rollouts.rollouts,
        of_advantages.rollouts_kept,
        case
            when of_advantages.rollouts_kept is not null then
                coalesce(of_reasons.rollouts_dropped, map {})
        end as rollouts_dropped,
        of_rollouts.tokens,
        of_rollouts.response_tokens,
        of_rollouts.response_tokens_max,
        of_rollouts.truncated,
        of_steps.steps,
        of_steps.steps_skipped,
        of_taken.* exclude (run, iteration),
        of_times.seconds,
        of_times.stage_seconds,
        of_rollouts.tokens / nullif(of_times.generating, 0)
            as tokens_per_second,
        evals.pass_at[1] as eval_pass_at_1,
        evals.reward as eval_reward,
    from present
    left join of_rollouts using (run, iteration)
    left join of_rewards using (run, iteration)
    left join of_passes using (run, iteration)
    left join of_advantages using (run, iteration)
    left join of_reasons using (run, iteration)
    left join of_groups using (run, iteration)
    left join of_steps using (run, iteration)
    left join of_taken using (run, iteration)
    left join of_times using (run, iteration)
    left join evals using (run, iteration)
)

select * from final
