-- Grain: one row per rollout that is compared: scored, in a group of two or more.
-- Best of k (arXiv 2503.19595): the best rollout of the group alone, by what it
-- is better than the second. A tie of the best gives nobody anything.
with best as (
    select
        iteration,
        group_id,
        max(reward, 2)[1] as highest,
        max(reward, 2)[2] as second,
        max(magnitude) as largest,
    from scored
    where compared
    group by iteration, group_id
)

select
    iteration,
    group_id,
    sample_id,
    case
        when reward < highest then 0.0
        when constant or equal_up_to_rounding(second, highest, largest) then 0.0
        else (highest - second) / (group_std + epsilon)
    end as advantage,
from scored
join best using (iteration, group_id)
cross join settings
where compared
