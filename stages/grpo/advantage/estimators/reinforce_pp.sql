-- Grain: one row per rollout that is compared: scored, in a group of two or more.
-- REINFORCE++ with baseline (arXiv 2501.03262): what is above the mean of its
-- group, normalised over all tokens of the iteration, so that a rollout counts
-- in the mean and in the deviation (n - 1) once for each of its tokens.
with centred as (
    select
        iteration,
        group_id,
        sample_id,
        tokens,
        constant,
        case when constant then 0.0 else reward - group_mean end as above,
    from scored
    where compared
),

means as (
    select
        sum(tokens) as num_tokens,
        sum(tokens * above order by group_id, sample_id) / num_tokens as mean,
    from centred
),

deviations as (
    select
        sqrt(
            sum(tokens * (above - mean) ** 2 order by group_id, sample_id)
            / (any_value(num_tokens) - 1)
        ) as deviation,
    from centred
    cross join means
)

select
    iteration,
    group_id,
    sample_id,
    case
        when constant then 0.0
        else (above - mean) / (deviation + epsilon)
    end as advantage,
from centred
cross join means
cross join deviations
cross join settings
