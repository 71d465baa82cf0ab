-- Grain: one row per stage and iteration of run $run whose configuration is not
-- that of the iteration before.
with stages as (
    select
        iteration,
        stage,
        config,
        lag(config) over (partition by stage order by iteration) as before,
    from manifests
    where run = $run and iteration is not null
),

final as (
    select * from stages
    where config <> before
)

select * from final
order by iteration, stage
