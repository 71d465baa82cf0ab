-- Grain: one row per run, policy measured and curve of its evaluation.
select
    run,
    iteration,
    'evaluation.pass_at_1' as name,
    pass_at[1] as value,
from evals
where pass_at[1] is not null

union all

select
    run,
    iteration,
    'evaluation.reward' as name,
    reward as value,
from evals
where reward is not null
