-- Grain: one row per run, iteration and reward by name: the mean of its values.
with final as (
    select
        run,
        iteration,
        'rewards.' || name as name,
        avg(value order by group_id, sample_id) as value,
    from rewards
    where status = 'ok'
    group by run, iteration, name
)

select * from final
order by name, iteration, run
