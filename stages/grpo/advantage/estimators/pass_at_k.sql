-- Grain: one row per rollout that is compared: scored, in a group of two or more.
-- Pass@k as the objective (arXiv 2508.10751), for rewards 0 and 1. With c right
-- of n, k drawn at random are all wrong with q = C(n - c, k) / C(n, k); beside a
-- wrong one, k - 1 others with C(n - c - 1, k - 1) / C(n - 1, k - 1), which is
-- q n / (n - c). R = 1 - q is pass@k, and sqrt(R (1 - R)) its deviation.
-- Other rewards, and groups smaller than k: `grpo advantage` refuses them before.
with counted as (
    select
        iteration,
        group_id,
        any_value(group_size) as n,
        count(*) filter (where reward > 0.5) as c,
    from scored
    where compared
    group by iteration, group_id
),

groups as (
    select
        iteration,
        group_id,
        n,
        c,
        list_product(
            list_transform(range(pass_k), lambda i: (n - c - i) / (n - i))
        ) as q,
        sqrt((1 - q) * q) as deviation,
    from counted
    cross join settings
)

select
    iteration,
    group_id,
    sample_id,
    case
        when constant or deviation = 0 then 0.0
        when reward > 0.5 then q / deviation
        else (q - q * n / (n - c)) / deviation
    end as advantage,
from scored
join groups using (iteration, group_id)
where compared
