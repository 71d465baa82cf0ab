-- generate.prompts_sql: examples/curriculum.sql    (docs/steering.md)
-- Grain: one row per prompt, those to draw next first. For a reward of 0 or 1.
-- Prompts that are right in a share p of their rollouts teach by how much their
-- reward varies, p (1 - p). Each is drawn at random with a weight of its square,
-- as prompts that teach nothing are many. A prompt's own latest groups say most
-- of p; one that was never drawn counts as p = 0.5, and so comes early.
with drawn as (
    select
        prompt_id,
        group_mean,
        row_number() over latest_first - 1 as age,
        group_size * pow(0.5, age) as weight,
    from samples
    where sample_id = 0 and group_size > 0
    window latest_first as (
        partition by prompt_id
        order by iteration desc, group_id desc
    )
),

known as (
    select
        prompt_id,
        sum(weight * group_mean order by age) as right_answers,
        sum(weight order by age) as answers,
    from drawn
    group by prompt_id
),

weighted as (
    select
        prompt_id,
        (coalesce(right_answers, 0) + 0.5) / (coalesce(answers, 0) + 1) as p,
        pow(p * (1 - p), 2) as weight,
        (hash(prompt_id, $iteration, $seed)::double + 1) / pow(2, 64) as chance,
    from prompts
    left join known using (prompt_id)
),

-- Weighted sampling without replacement: Efraimidis and Spirakis, 2006.
final as (
    select
        prompt_id,
        ln(chance) / weight as turn,
    from weighted
)

select prompt_id from final
order by turn desc, prompt_id
