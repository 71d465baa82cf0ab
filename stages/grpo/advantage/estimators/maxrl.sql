-- Grain: one row per rollout that is compared: scored, in a group of two or more.
-- MaxRL (arXiv 2602.02710): over the mean of the group, so that a rare success
-- weighs more. Rewards are 0 or more: `grpo advantage` refuses others before.
select
    iteration,
    group_id,
    sample_id,
    case
        when constant or group_mean = 0 then 0.0
        else (reward - group_mean) / group_mean
    end as advantage,
from scored
where compared
