-- Grain: one row. Groups with signal: scored rollouts, at least two, whose
-- rewards differ. The others are the `constant` ones of advantage.sql.
with groups as (
    select max(reward) > min(reward) as has_signal,
    from scored
    where scored
    group by group_id
),

final as (
    select count(*) as groups_with_signal,
    from groups
    where has_signal
)

select * from final
