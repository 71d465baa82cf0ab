-- Grain: one row per rollout of one iteration, with what `--sort` sorts by: a
-- number of `samples`, or the reward named $sort.
with final as (
    select
        group_id,
        sample_id,
        case $sort
            when 'reward' then reward
            when 'advantage' then advantage
            when 'tokens' then response_tokens
            when 'mismatch' then mismatch
            when 'spread' then group_std
            when '' then null
            else rewards[$sort]
        end as key,
    from samples
)

select * from final
order by group_id, sample_id
