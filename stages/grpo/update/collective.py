"""collective: a call on a learner that every process of a group makes, where rank 0 makes it.

Sharded weights are whole only while all processes compute with them, so none may compute alone. Rank 0 leads
(parallel.py); a learner without a group is called as if none of this were there.
"""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

L = TypeVar("L")
P = ParamSpec("P")
T = TypeVar("T")


def collective(function: Callable[Concatenate[L, P], T]) -> Callable[Concatenate[L, P], T]:
    """`function` of a learner and more: what rank 0 calls it with goes to all, but for what can be called.

    It returns to each what it returns there. Raises what any process raised, and the same in all of them.
    """

    @wraps(function)
    def call(learner: L, /, *args: P.args, **kwargs: P.kwargs) -> T:
        ranks = getattr(learner, "ranks", None)
        if ranks is None or ranks.is_inside:
            return function(learner, *args, **kwargs)
        found: T = ranks.lead(call, learner, args, kwargs)
        return found

    return call
