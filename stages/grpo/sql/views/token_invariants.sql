-- Tokens that the policy does not have, $vocabulary_size of which it has.
-- Grain: as invariants.sql; a log-prob of such a token is of nothing.
with

sampled as (
    select 'rollouts' as place, prompt_token_ids, response_token_ids
    from rollouts
    union all
    select 'eval_rollouts' as place, prompt_token_ids, response_token_ids
    from eval_rollouts
),

final as (
    select
        place || ': a token outside the vocabulary' as invariant,
        count(*) as rows,
    from sampled
    where
        list_min(prompt_token_ids || response_token_ids) < 0
        or list_max(prompt_token_ids || response_token_ids)
        >= $vocabulary_size
    group by place
)

select *
from final
order by invariant
