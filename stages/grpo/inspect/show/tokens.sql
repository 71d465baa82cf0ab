-- Grain: one row per rollout of the groups $groups of one iteration. `tokens`:
-- of each its id, its log-prob when it was sampled, and the learner's; null
-- where the update of that iteration did not read the rollout.
with sampled as (
    select
        group_id,
        sample_id,
        response_token_ids,
        old_logprobs,
    from rollouts
    where group_id in (select unnest($groups))
),

learned as (
    select
        group_id,
        sample_id,
        policy_logprobs,
    from logprobs
    where
        group_id in (select unnest($groups))
        and update_iteration = iteration
),

final as (
    select
        group_id,
        sample_id,
        list_transform(
            response_token_ids,
            lambda id, place: {
                token_id: id,
                old_logprob: old_logprobs[place],
                policy_logprob: policy_logprobs[place]
            }
        ) as tokens,
    from sampled
    left join learned using (group_id, sample_id)
)

select * from final
order by group_id, sample_id
