-- Grain: one row. The deviation of all scored rollouts of the iteration whose
-- group has at least two, before any are dropped; for scale: batch.
select stddev_samp(reward order by group_id, sample_id) as batch_deviation,
from scored
where compared
