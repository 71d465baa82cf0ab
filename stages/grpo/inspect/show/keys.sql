-- Grain: one row per rollout of the groups $groups of one iteration, in the
-- order of `--sort`: by a number of `samples` or the reward named $sort, the
-- largest first where $sign is -1; what has none is last.
with final as (
    select
        group_id,
        sample_id,
        $sign * case $sort
            when 'reward' then reward
            when 'advantage' then advantage
            when 'tokens' then response_tokens
            when 'mismatch' then mismatch
            when 'spread' then group_std
            when '' then null
            else rewards[$sort]
        end as key,
    from samples
    where group_id in (select unnest($groups))
)

select * from final
order by key nulls last, group_id, sample_id
