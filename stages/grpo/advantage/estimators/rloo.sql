-- Grain: one row per rollout that is compared: scored, in a group of two or more.
-- REINFORCE leave-one-out (arXiv 2402.14740): the mean of the others is the
-- baseline, r - mean of n - 1 others = n / (n - 1) * (r - mean of all n).
select
    iteration,
    group_id,
    sample_id,
    case
        when constant then 0.0
        else group_size / (group_size - 1) * (reward - group_mean)
    end as advantage,
from scored
where compared
