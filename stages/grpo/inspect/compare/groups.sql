-- Grain: one row per group with at least two rows of `paired` (paired.sql).
-- Formulas of the advantage: docs/math.md, scale `group`.
-- Ties: equal values share the mean of their ranks (Spearman) and are counted
-- apart (Kendall's tau-b). A correlation is null where a reward is constant.
with ranked as (
    select
        iteration,
        group_id,
        sample_id,
        prompt_id,
        a,
        b,
        rank() over (partition by iteration, group_id order by a)
            + (count(*) over (partition by iteration, group_id, a) - 1) / 2.0
            as rank_a,
        rank() over (partition by iteration, group_id order by b)
            + (count(*) over (partition by iteration, group_id, b) - 1) / 2.0
            as rank_b,
    from paired
),

group_statistics as (
    select
        iteration,
        group_id,
        min(prompt_id) as prompt_id,
        count(*) as rollouts,
        max(a) > min(a) as signal_a,
        max(b) > min(b) as signal_b,
        avg(a order by sample_id) as mean_a,
        avg(b order by sample_id) as mean_b,
        stddev_samp(a order by sample_id) as deviation_a,
        stddev_samp(b order by sample_id) as deviation_b,
        corr(rank_a, rank_b order by sample_id) as rank_correlation,
    from ranked
    group by iteration, group_id
    having count(*) >= 2
),

-- Rounding must not turn a constant group into noise divided by epsilon.
both_advantages as (
    select
        iteration,
        group_id,
        sample_id,
        case
            when signal_a then (a - mean_a) / (deviation_a + $epsilon)
            else 0
        end as advantage_a,
        case
            when signal_b then (b - mean_b) / (deviation_b + $epsilon)
            else 0
        end as advantage_b,
    from paired
    join group_statistics using (iteration, group_id)
),

changes as (
    select
        iteration,
        group_id,
        count(*) filter (where sign(advantage_a) * sign(advantage_b) < 0)
            as sign_flips,
        avg(abs(advantage_a - advantage_b) order by sample_id)
            as advantage_difference,
    from both_advantages
    group by iteration, group_id
),

pairs_in as (
    select
        iteration,
        group_id,
        (one.a > two.a)::integer - (one.a < two.a)::integer as order_a,
        (one.b > two.b)::integer - (one.b < two.b)::integer as order_b,
    from paired as one
    join paired as two using (iteration, group_id)
    where one.sample_id < two.sample_id
),

pair_counts as (
    select
        iteration,
        group_id,
        count(*) as pairs,
        count(*) filter (where order_a * order_b > 0) as agreeing,
        count(*) filter (where order_a * order_b < 0) as flipped,
        count(*) filter (where order_a = 0 and order_b <> 0) as tied_in_a,
        count(*) filter (where order_a <> 0 and order_b = 0) as tied_in_b,
        count(*) filter (where order_a = 0 and order_b = 0) as tied_in_both,
    from pairs_in
    group by iteration, group_id
),

final as (
    select
        iteration,
        group_id,
        prompt_id,
        rollouts,
        signal_a,
        signal_b,
        pairs,
        agreeing,
        flipped,
        tied_in_a,
        tied_in_b,
        tied_in_both,
        case when signal_a and signal_b then rank_correlation end as spearman,
        case
            when signal_a and signal_b then
                (agreeing - flipped)
                / sqrt((pairs - tied_in_a - tied_in_both)::double)
                / sqrt((pairs - tied_in_b - tied_in_both)::double)
        end as kendall,
        sign_flips,
        advantage_difference,
    from group_statistics
    join pair_counts using (iteration, group_id)
    join changes using (iteration, group_id)
)

select * from final
order by iteration, group_id
