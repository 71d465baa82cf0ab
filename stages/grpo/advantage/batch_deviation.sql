-- Grain: one row. The deviation of all scored rollouts of the iteration whose
-- group has at least two, before any are dropped; for scale: batch.
with compared as (
    select group_id
    from scored
    where scored
    group by group_id
    having count(*) >= 2
),

final as (
    select
        stddev_samp(reward order by group_id, sample_id) as batch_deviation,
    from scored
    where scored and group_id in (select group_id from compared)
)

select * from final
