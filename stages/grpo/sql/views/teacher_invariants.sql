-- What must hold of `teacher_logprobs`, as invariants.sql says it of the others:
-- of a teacher, an iteration has every rollout once, with a log-prob per token.
with made_from as (
    select
        iteration,
        json_extract_string(
            inputs, '$."rollouts@' || iteration || '"'
        ) as rollouts_id,
    from manifests
    where output = 'rewards'
),

current as (
    select iteration
    from made_from
    join manifests using (iteration)
    where
        output = 'rollouts'
        and rollouts_id = json_extract_string(ids, '$.rollouts')
),

expected as (
    select
        iteration,
        name,
        group_id,
        sample_id,
        response_tokens,
    from (select distinct iteration, name from teacher_logprobs)
    join rollouts using (iteration)
),

found as (
    select
        iteration,
        name,
        group_id,
        sample_id,
        count(*) as copies,
        any_value(logprobs) as logprobs,
    from teacher_logprobs
    group by iteration, name, group_id, sample_id
),

final as (
    select
        'teacher_logprobs: not each rollout once' as invariant,
        count(*) as rows,
    from expected
    full join found using (iteration, name, group_id, sample_id)
    semi join current using (iteration)
    where copies is distinct from 1 or response_tokens is null
    union all
    select
        'teacher_logprobs: not one per token, not finite, or above 0',
        count(*),
    from expected
    join found using (iteration, name, group_id, sample_id)
    semi join current using (iteration)
    where
        len(logprobs) is distinct from response_tokens
        or len(list_filter(
            logprobs,
            lambda x: x is null or isnan(x) or isinf(x) or x > 0
        )) > 0
)

select *
from final
where rows > 0
order by invariant
