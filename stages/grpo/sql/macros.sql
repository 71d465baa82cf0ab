-- Equal up to rounding is equal: 0.1 + 0.2 and 0.3 + 0.0 are one reward. The
-- definition of docs/math.md, and the only one. low, high: the smallest and
-- the largest of what is compared; magnitude: the largest sum of the absolute
-- values that one of them was added up from, at most the largest double.
create macro equal_up_to_rounding(low, high, magnitude) as
    high - low <= 1e-9 * least(magnitude, 1.7976931348623157e308)
