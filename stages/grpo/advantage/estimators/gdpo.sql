-- Grain: one row per rollout that is compared: scored, in a group of two or more.
-- GDPO (arXiv 2601.05242): each reward is normalised in its group before they
-- are added up, so that none drowns in the spread of another; the sums are then
-- normalised over the iteration. A reward that does not apply adds nothing.
with applied as (
    select
        iteration,
        group_id,
        sample_id,
        name,
        weight,
        value,
    from rewards
    semi join (from scored where compared)
        using (iteration, group_id, sample_id)
    where weight <> 0 and status = 'ok'
),

of_rewards as (
    select
        iteration,
        group_id,
        name,
        equal_up_to_rounding(min(value), max(value), max(abs(value)))
            as all_equal,
        avg(value order by sample_id) as mean,
        stddev_samp(value order by sample_id) as deviation,
    from applied
    group by iteration, group_id, name
),

terms as (
    select
        iteration,
        group_id,
        sample_id,
        name,
        case
            when all_equal then 0.0
            else weight * (value - mean) / (deviation + epsilon)
        end as term,
    from applied
    join of_rewards using (iteration, group_id, name)
    cross join settings
),

added as (
    select
        iteration,
        group_id,
        sample_id,
        fsum(term order by name) as term_sum,
        sum(abs(term) order by name) as magnitude,
    from terms
    group by iteration, group_id, sample_id
),

sums as (
    select
        iteration,
        group_id,
        sample_id,
        constant,
        case when constant then 0.0 else term_sum end as total,
        added.magnitude,
    from scored
    join added using (iteration, group_id, sample_id)
    where compared
),

batch as (
    select
        equal_up_to_rounding(min(total), max(total), max(magnitude)) as level,
        avg(total order by group_id, sample_id) as mean,
        stddev_samp(total order by group_id, sample_id) as deviation,
    from sums
)

select
    iteration,
    group_id,
    sample_id,
    case
        when constant or level then 0.0
        else (total - mean) / (deviation + epsilon)
    end as advantage,
from sums
cross join batch
cross join settings
