-- Grain: one row per rollout of the groups $groups of one iteration: its tokens
-- and their log-probs when they were sampled.
with final as (
    select
        group_id,
        sample_id,
        response_token_ids,
        old_logprobs,
    from rollouts
    where group_id in (select unnest($groups))
)

select * from final
order by group_id, sample_id
