-- Grain: one row per rollout of the groups $groups of one iteration that the
-- update of that iteration read: the learner's log-probs of its tokens.
with final as (
    select
        group_id,
        sample_id,
        policy_logprobs,
    from logprobs
    where
        group_id in (select unnest($groups))
        and update_iteration = iteration
)

select * from final
order by group_id, sample_id
