"""config.surrogates: the names of update.surrogate, and what fits each. What they compute is in update/."""

import difflib
import re

# The ratio that a surrogate asks for; None: any. One of the user's own takes any too.
SURROGATES = {
    "clip": None,
    "cispo": "token",
    "sapo": None,
    "gmpo": "sequence_mean",
    "dppo_tv": "token",
    "dppo_kl": "token",
    "vespo": "token",
}
# The surrogates that read a key. Elsewhere it would have no effect, and is refused.
READ_BY = {
    "clip_low": ("clip", "cispo", "gmpo", "dppo_tv", "dppo_kl"),
    "clip_high": ("clip", "cispo", "gmpo", "dppo_tv", "dppo_kl"),
    "delta": ("clip",),
    "tau_positive": ("sapo",),
    "tau_negative": ("sapo",),
    "ratio_cap": ("dppo_tv", "dppo_kl"),
    "k_positive": ("vespo",),
    "k_negative": ("vespo",),
    "lambda_positive": ("vespo",),
    "lambda_negative": ("vespo",),
}
_OWN = re.compile(r"(?!.*\.py:)[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def known_surrogate(name: str) -> str:
    """`name` itself. Raises ValueError for one that is neither ours nor `module:function`."""
    if name in SURROGATES or _OWN.fullmatch(name):
        return name
    near = difflib.get_close_matches(name, SURROGATES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(SURROGATES)}"
    raise ValueError(f"no such surrogate; {hint} (a function of your own is module:function)")
