-- Grain: one row per run and iteration that holds any table. Every number of
-- an iteration that any command shows is defined here; docs/tables.md has the
-- sentence above each column of `final`. Null where its table is not there yet.
-- Mean over the steps: over the steps taken, weighted by their tokens.
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
        max(iteration - policy_iteration) as policy_lag,
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

of_teachers as (
    select run, iteration, avg(gap order by name, group_id, sample_id) as gap
    from teacher_logprobs
    group by run, iteration
),

-- As the evaluation before it counted passes: by that reward and threshold.
of_passes as (
    select
        run,
        iteration,
        avg((value >= pass_threshold)::integer) as pass_rate,
    from rewards
    join _pass_settings using (run, iteration)
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
    select run, iteration, reason, count(*) as rollouts
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
        sum(share * off_policy_fraction order by step) as off_policy_fraction,
        sum(share * low_entropy_fraction order by step)
            as low_entropy_fraction,
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
        -- name of the run
        present.run,
        -- iteration, from 0
        present.iteration,
        -- mean of the weighted sum of the rewards, over scored rollouts
        of_advantages.reward,
        -- map(name, mean): of each reward without its weight, over the rollouts
        -- that have it
        of_rewards.rewards,
        -- share of rollouts whose `evaluate.pass_reward` (the first reward
        -- where that is not set) is at least `evaluate.pass_threshold` (1), as
        -- the newest evaluation before it had them, over the rollouts that
        -- have it
        of_passes.pass_rate,
        -- mean of `gap` of `teacher_logprobs`, in nats per token: rises to 0 as
        -- the policy becomes its teacher; null without one
        of_teachers.gap as teacher_gap,
        -- groups sampled
        of_rollouts.groups,
        -- share of groups whose rewards are all equal (`group_std` is 0), of
        -- those with two scored rollouts
        of_groups.groups_without_signal,
        -- rollouts sampled
        of_rollouts.rollouts,
        -- rollouts that update trains on
        of_advantages.rollouts_kept,
        -- map(reason, number): the rollouts that update does not train on
        case
            when of_advantages.rollouts_kept is not null then
                coalesce(of_reasons.rollouts_dropped, map {})
        end as rollouts_dropped,
        -- response tokens sampled, in all
        of_rollouts.tokens,
        -- mean response tokens of a rollout
        of_rollouts.response_tokens,
        -- response tokens of the longest rollout
        of_rollouts.response_tokens_max,
        -- share of responses cut off at max_new_tokens
        of_rollouts.truncated,
        -- updates between sampling and training, which the mismatch holds too
        of_rollouts.policy_lag,
        -- optimiser steps, those skipped included
        of_steps.steps,
        -- steps with nothing to learn from
        of_steps.steps_skipped,
        -- `loss` of `updates`, mean over the steps
        of_taken.loss,
        -- minus the aggregated surrogate, mean over the steps
        of_taken.policy_loss,
        -- KL estimate to the reference as it enters the loss, in nats where
        -- that is a mean over tokens; mean over the steps; null without a KL
        -- term
        of_taken.kl,
        -- entropy per response token in nats, mean over the steps
        of_taken.entropy,
        -- importance ratio, mean over the steps
        of_taken.ratio_mean,
        -- largest importance ratio of all steps
        of_taken.ratio_max,
        -- share of ratios clipped below, mean over the steps; null: no bounds
        of_taken.clip_fraction_low,
        -- share of ratios clipped above, mean over the steps; null: no bounds
        of_taken.clip_fraction_high,
        -- share of rollouts that `update.off_policy_mask` left out, mean over
        -- the steps; null without it
        of_taken.off_policy_fraction,
        -- share of tokens that `update.top_entropy` left out, mean over the
        -- steps; null without it
        of_taken.low_entropy_fraction,
        -- norm of the gradient before clipping, mean over the steps
        of_taken.grad_norm,
        -- learning rate, mean over the steps
        of_taken.learning_rate,
        -- mean distance of learner and sampler in nats per token, before the
        -- first step
        of_taken.mismatch_mean,
        -- largest of the same
        of_taken.mismatch_max,
        -- k3 estimate of KL(old || policy), before the first step
        of_taken.mismatch_kl,
        -- of the learner's weights over the sampler's, as a share of the tokens
        of_taken.effective_sample_size,
        -- share of tokens whose weight is over `update.sampler_correction_cap`
        of_taken.over_cap_fraction,
        -- seconds of the four stages
        of_times.seconds,
        -- map(stage, seconds): of each stage, and of `evaluate` where its
        -- policy was measured
        of_times.stage_seconds,
        -- `tokens` by the seconds of generate
        of_rollouts.tokens / nullif(of_times.generating, 0)
            as tokens_per_second,
        -- pass@1 of the policy that the iteration trains; null if not measured
        evals.pass_at[1] as eval_pass_at_1,
        -- mean held-out reward of that policy; null if not measured
        evals.reward as eval_reward,
    from present
    left join of_rollouts using (run, iteration)
    left join of_rewards using (run, iteration)
    left join of_passes using (run, iteration)
    left join of_teachers using (run, iteration)
    left join of_advantages using (run, iteration)
    left join of_reasons using (run, iteration)
    left join of_groups using (run, iteration)
    left join of_steps using (run, iteration)
    left join of_taken using (run, iteration)
    left join of_times using (run, iteration)
    left join evals using (run, iteration)
)

select * from final order by run, iteration
