"""A backend of vLLM's weight transfer for processes without a GPU: tensors go through a TCP store.

What it lacks is what a GPU has. Groups, steps, loading and what may go wrong in them are vLLM's and ours.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import (
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

NAME = "store"


@dataclass
class Joining(WeightTransferInitInfo):  # type: ignore[misc]
    """How an engine joins."""

    host: str
    port: int
    world: int
    rank_offset: int = 0


@dataclass
class Update(WeightTransferUpdateInfo):  # type: ignore[misc]
    """What comes."""

    names: list[str]


class StoreEngine(WeightTransferEngine[Joining, Update]):  # type: ignore[misc]
    """An engine's half."""

    init_info_cls, update_info_cls = Joining, Update

    def init_transfer_engine(self, init_info: Joining) -> None:
        self.group = StatelessProcessGroup.create(
            init_info.host, init_info.port, init_info.rank_offset, init_info.world
        )

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # else an accelerator is waited for

    def receive_weights(self, update_info: Update) -> None:
        for name in update_info.names:
            self.model.load_weights([(name, self.group.broadcast_obj(None, src=0))])

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing waits."""


@dataclass
class Meeting(TrainerInitInfo):  # type: ignore[misc]
    """Where both halves meet."""

    backend: ClassVar[str] = NAME

    host: str
    port: int
    world: int


class StoreTrainer(TrainerWeightTransferEngine[Meeting]):  # type: ignore[misc]
    """The learner's half."""

    init_info_cls = Meeting

    @classmethod
    def trainer_init(cls, init_info: Meeting, *, client: Any, source: Any = None) -> Self:
        trainer = cls(client=client, source=source)
        info = asdict(Joining(init_info.host, init_info.port, init_info.world))
        with ThreadPoolExecutor(1) as beside:
            joined = beside.submit(client.init_weight_transfer_engine, info)
            trainer.group = StatelessProcessGroup.create(init_info.host, init_info.port, 0, init_info.world)
            joined.result()
        return trainer

    def send_weights(self) -> None:
        names = [each.name for each in self.source.metadata()]
        self.client.start_weight_update()
        with ThreadPoolExecutor(1) as beside:
            taken = beside.submit(self.client.update_weights, {"names": names})
            for name, (sent, tensor) in zip(names, self.source, strict=True):
                assert sent == name
                self.group.broadcast_obj(tensor.contiguous(), src=0)
            taken.result()
        self.client.finish_weight_update()


def meeting(host: str, port: int, world: int) -> Meeting:
    """As grpo.generate.vllm_transfer.nccl()."""
    return Meeting(host, port, world, rank=0)


def register() -> None:
    """Let vLLM have it, once in a process."""
    if NAME not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(NAME, StoreEngine)
        WeightTransferTrainerFactory.register_engine(NAME, StoreTrainer)
