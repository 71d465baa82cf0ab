-- Grain: one row per rollout that is compared: scored, in a group of two or more.
-- What is above the mean of its group, over the deviation of the group (GRPO,
-- arXiv 2402.03300), of the iteration, or nothing (Dr. GRPO, 2503.20783).
select
    iteration,
    group_id,
    sample_id,
    case
        when constant then 0.0
        when scale = 'group' then
            (reward - group_mean) / (group_std + epsilon)
        when scale = 'batch' then
            (reward - group_mean) / (batch_deviation + epsilon)
        else reward - group_mean
    end as advantage,
from scored
cross join settings
where compared
