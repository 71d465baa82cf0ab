"""own_files: of a checkpoint's files those that this process writes: all, or its own where several train.

Files are cut by names and sizes alone: bytes and ids do not know how many wrote them. File f is that of rank
f mod world. All gather, one tensor after another, and each keeps what it writes, in main memory.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from grpo.artifacts import ADAPTER, OPTIMIZER, POLICY
from grpo.models.weights import by_layer, plain_state, published_form, published_state
from grpo.update.adapter import CONFIG_FILE, WEIGHTS_FILE, adapter_config, adapter_weights
from grpo.update.checkpoint import MOMENTS, WEIGHTS, Chunks, cut, moments_of, plain_files, safetensors_file

if TYPE_CHECKING:
    from grpo.update.learner import Learner
    from grpo.update.parallel import Ranks

State = Mapping[str, Tensor]


class OwnFile(NamedTuple):
    """A file of a checkpoint; part: its folder there."""

    part: str
    name: str
    content: bytes | Chunks


def own_files(learner: "Learner", start: Path, file_bytes: int) -> list[OwnFile]:
    """Those of the policy that the learner holds, which began as `start`. Of several processes all call it.

    file_bytes: of tensors, where there are more than one in a file. What is on a GPU is copied here and now.
    """
    ranks, adapter = learner.ranks, learner.adapter
    rank, world = (0, 1) if ranks is None else (ranks.rank, ranks.world)
    part, weights = (POLICY if adapter is None else ADAPTER), _weights(learner)
    moments = moments_of(learner.optimizer, learner.model)
    if adapter is None:
        cuts = cut(weights, WEIGHTS, file_bytes)
        plain = [*plain_files(start, weights, cuts)] if rank == 0 else []
    else:
        cuts = {WEIGHTS_FILE: [*weights]}  # peft knows no more than one
        plain = [(CONFIG_FILE, adapter_config(adapter))] if rank == 0 else []
    files = [(part, *each) for each in cuts.items()]
    files += [(OPTIMIZER, *each) for each in cut(moments, MOMENTS, file_bytes).items()]
    own = files[rank::world]
    kept = {
        key: {name for place, _, names in own if place == key for name in names} for key in (part, OPTIMIZER)
    }
    held = {
        part: _whole_weights(learner, weights, kept[part]),
        OPTIMIZER: _whole(ranks, moments, kept[OPTIMIZER]),
    }
    found = [OwnFile(part, name, content) for name, content in plain]
    for place, name, members in own:
        tensors = {member: held[place][member] for member in members}
        found.append(OwnFile(place, name, safetensors_file(tensors)))
    return found


def _weights(learner: "Learner") -> State:
    """What trains as it is on disk, of several processes by names and shapes alone."""
    if learner.adapter is not None:
        return adapter_weights(learner.adapter)
    return published_state(learner.model if learner.skeleton is None else learner.skeleton.model)


def _whole_weights(learner: "Learner", state: State, kept: Collection[str]) -> State:
    if learner.ranks is None or learner.adapter is not None:
        return _whole(learner.ranks, state, kept)
    assert learner.skeleton is not None
    return _published(learner.ranks, learner.model, learner.skeleton.model, kept)


def _whole(ranks: "Ranks | None", state: State, kept: Collection[str]) -> State:
    return state if ranks is None else ranks.gather(state, kept)


def _published(
    ranks: "Ranks", model: PreTrainedModel, empty: PreTrainedModel, kept: Collection[str]
) -> dict[str, Tensor]:
    """A layer at a time: what one published weight is made of is of one layer.

    empty: the model with the shapes of its weights.
    """
    own, shapes, found = plain_state(model), plain_state(empty), dict[str, Tensor]()
    for names in by_layer(empty, shapes):
        made = published_form(empty, {name: shapes[name] for name in names}).keys() & kept
        whole = ranks.gather({name: own[name] for name in names}, names if made else ())
        if made:
            published = published_form(empty, whole)
            found |= {name: published[name] for name in made}
    assert found.keys() == {*kept}
    return found
