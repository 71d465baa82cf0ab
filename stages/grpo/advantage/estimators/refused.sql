-- Grain: one row, or none: the first rollout that the estimator cannot take,
-- and why.
with judged as (
    select
        iteration,
        group_id,
        sample_id,
        case
            when
                $estimator = 'maxrl'
                and not equal_up_to_rounding(reward, 0, magnitude)
                then
                'has reward ' || reward || ', and maxrl divides by the mean of'
                || ' rewards of at least 0; shift them, or take another'
            when
                $estimator = 'pass_at_k'
                and not equal_up_to_rounding(
                    0, least(abs(reward), abs(reward - 1)), magnitude
                )
                then
                'has reward ' || reward || ', and pass_at_k counts rewards of 0'
                || ' and 1; give it one such reward, of weight 1'
            when $estimator = 'pass_at_k' and group_size < pass_k then
                'is one of ' || group_size || ' scored in its group, fewer than'
                || ' advantage.pass_k, ' || pass_k || '; lower that'
        end as problem,
    from scored
    cross join settings
    where compared
)

select *
from judged
where problem is not null
order by iteration, group_id, sample_id
limit 1
