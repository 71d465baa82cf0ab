-- Grain: one row per iteration of `paired` (paired.sql), and a last one, its
-- iteration null, of all of them, whatever the groups. Spearman's correlation,
-- where equal values share the mean of their ranks; null where a reward is
-- constant. For Kendall's tau-b: `untied`, the pairs of rollouts that neither
-- reward ties; `scale`, the root of those that A does not tie by those that B
-- does not; and the values of B in the order of A.
with scopes as (
    select iteration, a, b from paired
    union all
    select null as iteration, a, b from paired
),

-- peers: the rollouts of the same value, this one among them.
ranked as (
    select
        *,
        count(*) over (partition by iteration) as rollouts,
        count(*) over (partition by iteration, a) as peers_a,
        count(*) over (partition by iteration, b) as peers_b,
        count(*) over (partition by iteration, a, b) as peers,
        rank() over (partition by iteration order by a) + (peers_a - 1) / 2
            as rank_a,
        rank() over (partition by iteration order by b) + (peers_b - 1) / 2
            as rank_b,
    from scopes
),

final as (
    select
        iteration,
        case
            when min(a) < max(a) and min(b) < max(b) then
                corr(rank_a, rank_b order by a, b)
        end as spearman,
        sum(rollouts - peers_a - peers_b + peers)::bigint // 2 as untied,
        sqrt(sum(rollouts - peers_a) / 2) * sqrt(sum(rollouts - peers_b) / 2)
            as scale,
        list(b order by a, b) as b_by_a,
    from ranked
    group by iteration
)

select * from final
order by iteration nulls last
