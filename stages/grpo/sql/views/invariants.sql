-- What must hold of the tables of a run, whatever made them.
-- Grain: one row per invariant that is broken, with the number of rows that
-- break it. Of two tables it is asked where an iteration has both: one may
-- have been set aside.
with

-- Rewards and advantages of the rollouts that are there now, and not of some
-- that were replaced, or had fewer rounds: what was made from those is to be
-- made again.
made_from as (
    select
        run,
        iteration,
        output,
        json_extract_string(
            inputs, '$."rollouts@' || iteration || '"'
        ) as rollouts_id,
    from manifests
    where output in ('rewards', 'advantages')
),

current as (
    select
        made_from.output,
        made_from.iteration,
    from made_from
    join manifests as rollouts using (run, iteration)
    where
        rollouts.output = 'rollouts'
        and rollouts_id = json_extract_string(rollouts.ids, '$.rollouts')
),

-- Held-out rollouts and their rewards have the shape of those of training.
sampled as (
    select 'rollouts' as place, *
    from rollouts
    union all by name
    select 'eval_rollouts' as place, *
    from eval_rollouts
),

scored as (
    select 'rollouts' as place, *
    from rewards
    union all by name
    select 'eval_rollouts' as place, *
    from eval_rewards
),

rollouts_twice as (
    select
        count(*)
        - count(distinct (place, iteration, group_id, sample_id)) as rows
    from sampled
),

ragged as (
    select count(*) as rows
    from sampled
    where
        response_tokens != len(response_token_ids)
        or response_tokens != len(old_logprobs)
        or response_tokens != len(response_mask)
),

wrong_logprobs as (
    select count(*) as rows
    from sampled
    where
        len(list_filter(
            old_logprobs,
            lambda x: x is null or isnan(x) or isinf(x) or x > 0
        )) > 0
),

samples_missing as (
    select count(*) as rows
    from (
        select max(sample_id) + 1 - count(*) as missing
        from sampled
        group by place, iteration, group_id
    )
    where missing != 0
),

rewards_twice as (
    select
        count(*)
        - count(distinct (place, iteration, group_id, sample_id, name)) as rows
    from scored
),

rewards_of_nothing as (
    select count(*) as rows
    from scored
    semi join (select distinct place, iteration from sampled)
        using (place, iteration)
    anti join sampled using (place, iteration, group_id, sample_id)
),

values_without_ok as (
    select count(*) as rows
    from scored
    where (status = 'ok') != (value is not null)
),

unscored_without_row as (
    select count(*) as rows
    from (
        select place, iteration, name, count(*) as scored
        from scored
        where
            place = 'eval_rollouts'
            or iteration in (
                select iteration from current where output = 'rewards'
            )
        group by place, iteration, name
    )
    join (
        select place, iteration, count(*) as sampled
        from sampled
        group by place, iteration
    ) using (place, iteration)
    where scored != sampled
),

answered as (
    select 'rollouts' as place, *
    from judgements
    union all by name
    select 'eval_rollouts' as place, *
    from eval_judgements
),

judgements_twice as (
    select
        count(*) - count(distinct (place, iteration, group_id, sample_id, name))
            as rows
    from answered
),

judgements_of_nothing as (
    select count(*) as rows
    from answered
    anti join scored using (place, iteration, group_id, sample_id, name)
),

-- Of a reward that a judge gives, an iteration has judgements or none at all.
judged_without_answer as (
    select count(*) as rows
    from scored
    semi join answered using (place, iteration, name)
    anti join (select * from answered where status = 'ok')
        using (place, iteration, group_id, sample_id, name)
    where scored.status = 'ok'
),

answers_without_ok as (
    select count(*) as rows
    from answered
    where (status = 'ok') != (answer is not null)
),

measured_otherwise as (
    select count(*) as rows
    from eval_rollouts
    where policy_iteration != iteration
),

advantages_not_of_rollouts as (
    select count(*) as rows
    from (
        select iteration, count(*) as judged
        from advantages
        semi join (from current where output = 'advantages') using (iteration)
        group by iteration
    )
    join (
        select
            iteration,
            count(distinct (group_id, sample_id)) as sampled
        from rollouts
        group by iteration
    ) using (iteration)
    where judged != sampled
),

advantages_of_nothing as (
    select count(*) as rows
    from advantages
    semi join (select distinct iteration from rollouts) using (iteration)
    anti join rollouts using (iteration, group_id, sample_id)
),

kept_without_advantage as (
    select count(*) as rows
    from advantages
    where
        keep != (reason is null)
        or keep != (advantage is not null)
        or not coalesce(isfinite(advantage), true)
),

steps_not_counted as (
    select count(*) as rows
    from (
        select
            max(step) + 1 - count(distinct step) as missing,
            count(*) as rows,
            count(distinct step) as steps,
        from updates
        group by iteration
    )
    where missing != 0 or rows != steps
),

logprobs_twice as (
    select
        count(*) - count(
            distinct (update_iteration, iteration, group_id, sample_id)
        ) as rows
    from logprobs
),

learned_though_not_kept as (
    select count(*) as rows
    from logprobs
    semi join (select distinct iteration from advantages) using (iteration)
    anti join (select * from advantages where keep)
        using (iteration, group_id, sample_id)
),

final as (
    select 'rollouts: a key occurs twice' as invariant, rows
    from rollouts_twice
    union all
    select 'rollouts: lists are not as long as the response', rows
    from ragged
    union all
    select 'rollouts: a log-prob is not finite, or above 0', rows
    from wrong_logprobs
    union all
    select 'rollouts: a sample of a group is missing', rows
    from samples_missing
    union all
    select 'rewards: a key occurs twice', rows
    from rewards_twice
    union all
    select 'rewards: of a rollout that is not there', rows
    from rewards_of_nothing
    union all
    select 'rewards: a value without status ok, or the reverse', rows
    from values_without_ok
    union all
    select 'rewards: not one row per rollout and reward', rows
    from unscored_without_row
    union all
    select 'judgements: a key occurs twice', rows
    from judgements_twice
    union all
    select 'judgements: of a reward that is not there', rows
    from judgements_of_nothing
    union all
    select 'judgements: a reward without its answer', rows
    from judged_without_answer
    union all
    select 'judgements: an answer without status ok, or the reverse', rows
    from answers_without_ok
    union all
    select 'eval_rollouts: sampled by another policy than measured', rows
    from measured_otherwise
    union all
    select 'advantages: not one row per rollout', rows
    from advantages_not_of_rollouts
    union all
    select 'advantages: of a rollout that is not there', rows
    from advantages_of_nothing
    union all
    select 'advantages: kept without an advantage, or the reverse', rows
    from kept_without_advantage
    union all
    select 'updates: steps are not 0, 1, 2 ... once each', rows
    from steps_not_counted
    union all
    select 'logprobs: a key occurs twice', rows
    from logprobs_twice
    union all
    select 'logprobs: of a rollout that is not kept', rows
    from learned_though_not_kept
)

select *
from final
where rows > 0
order by invariant
