-- Grain: one row per prompt and iteration of run $run that has a value of its
-- main reward: the one named $first where it has been given, as the first of the
-- configuration is what a run is after; the others help or are compared.
with given as (
    select * from rewards
    where run = $run and status = 'ok'
),

main as (
    select
        name,
        bool_and(value in (0, 1)) as is_binary,
    from given
    group by name
    order by name <> $first, name
    limit 1
),

final as (
    select
        prompt_id,
        iteration,
        avg(value order by group_id, sample_id) as mean,
        count(*) as rollouts,
        name,
        is_binary,
    from given
    join main using (name)
    join rollouts using (run, iteration, group_id, sample_id)
    group by prompt_id, iteration, name, is_binary
)

select * from final
order by prompt_id, iteration
