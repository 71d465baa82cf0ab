-- Grain: one row for run $run, none where it has no value of a reward: the mean
-- of its main reward by prompt and iteration, in lists. The main reward is the
-- one named $first where it has been given, as the one that says whether a
-- response passes is what a run is after. prompts: how each
-- begins, for who points at it; columns.prompt: a place among them.
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

cells as (
    select
        prompt_id,
        iteration,
        dense_rank() over (order by prompt_id) - 1 as place,
        avg(value order by group_id, sample_id) as mean,
        count(*) as rollouts,
    from given
    join main using (name)
    join rollouts using (run, iteration, group_id, sample_id)
    group by prompt_id, iteration
),

drawn as (
    select
        prompt_id,
        min(prompt) as prompt,
    from rollouts
    where run = $run and prompt_id in (select prompt_id from cells)
    group by prompt_id
),

beginnings as (
    select
        list(
            -- 2,000,000 characters in all: of very many prompts, less of each.
            prompt[
                :least(240, 2000000 // (select count(*) from drawn))::integer
            ]
            order by prompt_id
        ) as prompts,
        list(prompt_id order by prompt_id) as prompt_ids,
    from drawn
),

lists as (
    select
        {
            prompt: list(place order by place, iteration),
            iteration: list(iteration order by place, iteration),
            mean: list(mean order by place, iteration),
            rollouts: list(rollouts order by place, iteration),
        } as columns,
    from cells
),

final as (
    select
        name as reward,
        is_binary as binary,
        prompts,
        prompt_ids,
        columns,
    from main, beginnings, lists
)

select * from final
