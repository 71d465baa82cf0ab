-- Grain: one row per iteration of `groups` (groups.sql), and a last one, its
-- iteration null, of all of them. Correlations are means over the groups in
-- which both rewards have signal, null where there is none.
with final as (
    select
        iteration,
        count(*) as groups,
        sum(rollouts)::bigint as rollouts,
        avg(spearman order by iteration, group_id) as spearman_in_groups,
        avg(kendall order by iteration, group_id) as kendall_in_groups,
        sum(pairs)::bigint as pairs,
        sum(agreeing)::bigint as agreeing,
        sum(flipped)::bigint as flipped,
        sum(tied_in_a)::bigint as tied_in_a,
        sum(tied_in_b)::bigint as tied_in_b,
        sum(tied_in_both)::bigint as tied_in_both,
        count(*) filter (where signal_a and signal_b) as signal_in_both,
        count(*) filter (where signal_a and not signal_b) as signal_lost,
        count(*) filter (where signal_b and not signal_a) as signal_gained,
        count(*) filter (where not signal_a and not signal_b) as signal_in_none,
        sum(sign_flips)::bigint as sign_flips,
        sum(advantage_difference * rollouts order by iteration, group_id)
            / sum(rollouts) as advantage_difference,
    from groups
    group by grouping sets ((iteration), ())
    having count(*) > 0
)

select * from final
order by iteration nulls last
