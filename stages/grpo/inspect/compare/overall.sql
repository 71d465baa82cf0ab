-- Grain: one row per iteration of `paired` (paired.sql), and a last one, its
-- iteration null, of all of them, whatever the groups. Spearman's correlation,
-- where equal values share the mean of their ranks; null where a reward is
-- constant. Pairs of rollouts that A (`untied_a`), B (`untied_b`) and each of
-- the two (`untied`) order one way or the other.
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
        sum(rollouts - peers_a)::bigint // 2 as untied_a,
        sum(rollouts - peers_b)::bigint // 2 as untied_b,
        sum(rollouts - peers_a - peers_b + peers)::bigint // 2 as untied,
    from ranked
    group by iteration
)

select * from final
order by iteration nulls last
