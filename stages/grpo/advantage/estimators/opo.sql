-- Grain: one row per rollout that is compared: scored, in a group of two or more.
-- OPO (arXiv 2505.23585): the baseline of least variance of the gradient, the
-- mean reward of the group weighted by length.
with baselines as (
    select
        iteration,
        group_id,
        sum(tokens * reward order by sample_id) / sum(tokens) as baseline,
    from scored
    where compared
    group by iteration, group_id
)

select
    iteration,
    group_id,
    sample_id,
    case when constant then 0.0 else reward - baseline end as advantage,
from scored
join baselines using (iteration, group_id)
where compared
