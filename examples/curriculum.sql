-- generate.prompts_sql: examples/curriculum.sql    (docs/steering.md)
-- Grain: one row per prompt, those to draw next first. For a reward of 0 or 1.
-- Three of four places go to prompts whose latest group was neither all right
-- nor all wrong: those teach. The fourth explores: prompts never drawn first,
-- then any other, since what was hopeless once may not be so any more.
-- hash() shuffles in the same way each time it is asked.
with latest as (
    select
        prompt_id,
        arg_max(group_mean, (iteration, group_id)) as pass_rate,
    from samples
    group by prompt_id
),

known as (
    select
        prompt_id,
        pass_rate,
        coalesce(pass_rate > 0 and pass_rate < 1, false) as teaches,
    from prompts
    left join latest using (prompt_id)
),

placed as (
    select
        prompt_id,
        teaches,
        row_number() over (
            partition by teaches
            order by
                not teaches and pass_rate is not null,
                hash(prompt_id, $iteration, $seed)
        ) as place,
    from known
),

final as (
    select
        prompt_id,
        case when teaches then place / 3.0 else place end as turn,
    from placed
)

select prompt_id from final
order by turn, prompt_id
