-- Grain: one row. Groups with signal: scored rollouts, at least two, whose
-- rewards differ by more than rounding.
select count(distinct group_id) as groups_with_signal,
from scored
where compared and not constant
