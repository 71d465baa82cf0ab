-- Grain: one row per rollout. Its scalars, the answer, its rewards as
-- map(name, value), the advantage columns, its mean mismatch, and its mean gap
-- to the teachers, each the mean of log-prob minus old log-prob over tokens.
-- List columns stay out: they do not fit through a join in bounded memory.
with rewards_of as (
    select
        run,
        iteration,
        group_id,
        sample_id,
        map(list(name order by name), list(value order by name)) as rewards,
    from rewards
    group by all
),

-- A rollout may be read by several updates: that of its own iteration counts.
mismatches as (
    select
        run,
        iteration,
        group_id,
        sample_id,
        mismatch,
    from logprobs
    where update_iteration = iteration
),

gaps as (
    select
        run,
        iteration,
        group_id,
        sample_id,
        avg(gap order by name) as teacher_gap,
    from teacher_logprobs
    group by run, iteration, group_id, sample_id
),

final as (
    select
        rollouts.run,
        rollouts.iteration,
        rollouts.group_id,
        rollouts.sample_id,
        rollouts.prompt_id,
        rollouts.round,
        rollouts.prompt,
        rollouts.response,
        prompts.answer,
        rollouts.finish_reason,
        rollouts.response_tokens,
        rollouts.policy_iteration,
        rollouts.temperature,
        rollouts.seed,
        rewards_of.rewards,
        advantages.reward,
        advantages.group_mean,
        advantages.group_std,
        advantages.group_size,
        advantages.advantage,
        advantages.keep,
        advantages.reason,
        mismatches.mismatch,
        gaps.teacher_gap,
    from rollouts
    left join prompts using (run, prompt_id)
    left join rewards_of using (run, iteration, group_id, sample_id)
    left join advantages using (run, iteration, group_id, sample_id)
    left join mismatches using (run, iteration, group_id, sample_id)
    left join gaps using (run, iteration, group_id, sample_id)
)

select * from final
