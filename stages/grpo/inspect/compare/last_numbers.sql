-- Grain: one row per number that both of the runs $a and $b have in one of the
-- iterations from $first to $last: its means over groups, b - a, and the ends
-- of the 95 % interval of that (normal approximation), null for fewer than two
-- groups. A group counts with the mean of its rollouts, which share its prompt:
-- the group is what is independent, not the rollout.
-- Paired over the groups of one prompt that both have, where these are more
-- than half of the groups of the run that has fewer: how hard a prompt is drops
-- out. Else the difference of two samples (Welch). $same_prompts: whether a
-- prompt_id is one prompt in both. `left_out`: groups that are not in a pair.
with rollouts_in as (
    select
        run,
        iteration,
        group_id,
        min(prompt_id) as prompt_id,
        avg(response_tokens) as response_tokens,
        avg((finish_reason = 'length')::integer) as truncated,
    from rollouts
    where iteration between $first and $last
    group by run, iteration, group_id
),

advantages_in as (
    select
        run,
        iteration,
        group_id,
        avg(reward order by sample_id) as reward,
        (max(group_std) = 0)::double as groups_without_signal,
    from advantages
    where iteration between $first and $last
    group by run, iteration, group_id
),

rewards_in as (
    select
        run,
        iteration,
        group_id,
        'rewards.' || name as name,
        avg(value order by sample_id) as value,
    from rewards
    where iteration between $first and $last and status = 'ok'
    group by run, iteration, group_id, name
),

wide as (
    select
        run,
        iteration,
        group_id,
        reward,
        response_tokens,
        truncated,
        groups_without_signal,
    from rollouts_in
    left join advantages_in using (run, iteration, group_id)
),

long as (
    unpivot wide
    on reward, response_tokens, truncated, groups_without_signal
    into name name value value
),

every_number as (
    select run, iteration, group_id, name, value from long
    union all
    select run, iteration, group_id, name, value from rewards_in
),

every_group as (
    select
        every_number.name,
        rollouts_in.iteration,
        rollouts_in.group_id,
        rollouts_in.prompt_id,
        max(every_number.value) filter (where run = $a) as a,
        max(every_number.value) filter (where run = $b) as b,
    from every_number
    join rollouts_in using (run, iteration, group_id)
    group by all
),

-- An iteration in which one of the runs lacks a number says nothing of it.
in_both as (
    select
        name,
        iteration,
        group_id,
        a,
        b,
        row_number() over (
            partition by name
            order by iteration, group_id, prompt_id
        ) as place,
    from every_group
    window number_in as (partition by name, iteration)
    qualify count(a) over number_in > 0 and count(b) over number_in > 0
),

-- Runs that drew on their own have a few groups in common by chance, and those
-- few say less than all.
counted as (
    select
        name,
        count(a) as groups_a,
        count(b) as groups_b,
        count(*) filter (where a is not null and b is not null) as common,
        $same_prompts and 2 * common > least(groups_a, groups_b) as paired,
    from in_both
    group by name
),

-- No group lacks its response tokens.
drawn as (
    select
        common as in_both,
        groups_a + groups_b - 2 * common as in_one_run,
    from counted
    where name = 'response_tokens'
),

measured as (
    select
        name,
        avg(a order by place) as mean_a,
        avg(b order by place) as mean_b,
        count(a) as groups_a,
        count(b) as groups_b,
        1.959963984540054 * case
            when paired then
                stddev_samp(b - a order by place) / sqrt(count(*))
            else
                sqrt(
                    var_samp(a order by place) / count(a)
                    + var_samp(b order by place) / count(b)
                )
        end as reach,
    from in_both
    join counted using (name)
    where not paired or (a is not null and b is not null)
    group by name, paired
),

final as (
    select
        name,
        mean_a as a,
        mean_b as b,
        mean_b - mean_a as difference,
        mean_b - mean_a - reach as low,
        mean_b - mean_a + reach as high,
        measured.groups_a,
        measured.groups_b,
        paired,
        case
            when paired then
                map {
                    'without_value': drawn.in_both - counted.common,
                    'in_one_run': drawn.in_one_run
                }
            else map {}
        end as left_out,
    from measured
    join counted using (name)
    cross join drawn
)

select * from final
order by name
