-- Grain: one row per rollout of run $run in $iterations and the first $groups
-- groups of each. rewards: by name, of those that were asked.
-- logprobs: in hundredths of a nat below 0, beyond a nat by tens of them; null
-- where the policy did not sample the token. log_ratios: of learner to sampler,
-- in thousandths of a nat; null also where no update of the iteration read the
-- rollout.
with picked as (
    select * from rollouts
    where
        run = $run
        and list_contains($iterations, iteration)
        and group_id < $groups
),

rewarded as (
    select
        iteration,
        group_id,
        sample_id,
        list(
            {
                name: name,
                value: value,
                weight: weight,
                status: status,
                error: error,
            } order by name
        ) as rewards,
    from rewards
    where run = $run and list_contains($iterations, iteration)
    group by iteration, group_id, sample_id
),

learned as (
    select
        iteration,
        group_id,
        sample_id,
        policy_logprobs,
    from logprobs
    where
        run = $run
        and update_iteration = iteration
        and list_contains($iterations, iteration)
),

final as (
    select
        iteration,
        group_id,
        sample_id,
        picked.prompt_id,
        finish_reason,
        reward,
        advantage,
        keep,
        reason,
        coalesce(rewards, []) as rewards,
        response,
        response_token_ids as tokens,
        list_transform(
            list_zip(old_logprobs, response_mask),
            lambda t: case
                when t[2] then try_cast(
                    round(-100 * t[1], if(t[1] > -1, 0, -1)) as integer
                )
            end
        ) as logprobs,
        list_transform(
            list_zip(policy_logprobs, old_logprobs, response_mask),
            lambda t: case
                when t[3] then try_cast(round(1000 * (t[1] - t[2])) as integer)
            end
        ) as log_ratios,
    from picked
    left join (from advantages where run = $run) as advantages
        using (iteration, group_id, sample_id)
    left join rewarded using (iteration, group_id, sample_id)
    left join learned using (iteration, group_id, sample_id)
)

select * from final
order by iteration, group_id, sample_id
