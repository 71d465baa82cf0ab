-- Grain: one row per rollout of an evaluation: its scalars, the answer, its
-- rewards as map(name, value), their weighted sum, and whether it passed.
-- A rollout with a failed reward has no sum; one whose pass_reward failed or
-- does not apply has neither passed nor failed.
with rewards_of as (
    select
        run,
        iteration,
        group_id,
        sample_id,
        map(list(name order by name), list(value order by name)) as rewards,
        fsum(weight * value order by name) filter (weight <> 0) as total,
        bool_or(
            weight <> 0 and status in ('error', 'timeout', 'nonfinite')
        ) as failed,
    from eval_rewards
    group by all
),

final as (
    select
        eval_rollouts.run,
        eval_rollouts.iteration,
        eval_rollouts.group_id,
        eval_rollouts.sample_id,
        eval_rollouts.prompt_id,
        eval_rollouts.prompt,
        eval_rollouts.response,
        -- The prompts may be others now than those that were measured with.
        case
            when _eval_settings.same_prompts then eval_prompts.answer
        end as answer,
        eval_rollouts.finish_reason,
        eval_rollouts.response_tokens,
        eval_rollouts.temperature,
        eval_rollouts.seed,
        rewards_of.rewards,
        case when not rewards_of.failed then rewards_of.total end as reward,
        rewards_of.rewards[_eval_settings.pass_reward]
            >= _eval_settings.pass_threshold as passed,
    from eval_rollouts
    left join eval_prompts using (run, prompt_id)
    left join rewards_of using (run, iteration, group_id, sample_id)
    left join _eval_settings using (run, iteration)
)

select * from final
