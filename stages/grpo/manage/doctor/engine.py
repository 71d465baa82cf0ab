"""engine: which engine samples, and whether it could be opened. Nothing is opened here."""

from grpo.artifacts import ActiveRun
from grpo.errors import GrpoError, UsageError
from grpo.generate.engines.choice import choose_engine
from grpo.generate.stage import make_engine
from grpo.manage.doctor.check import Check, failed


def check_engine(run: ActiveRun) -> list[Check]:
    """The engine that is chosen; where it is vLLM, its version and `generate.engine_options`."""
    config = run.config.generate
    name, why = choose_engine(config.engine)
    options = ", ".join(config.engine_options)
    if name != "vllm" and (cut := config.truncation()):
        error = UsageError(f"generate.{cut}: needs engine: vllm; the built-in engine samples from all tokens")
        return [failed("engine", f"{name} ({why})", "vllm", error)]
    if name != "vllm":
        if not options:
            return [Check("engine", f"{name} ({why})")]
        note = "leave generate.engine_options out, or set generate.engine: vllm"
        return [
            Check("engine", f"{name} ({why})"),
            Check("engine options", options, "none: they are vLLM's", "warning", note),
        ]
    from grpo.generate.engines.vllm_version import check_version

    try:
        check_version()
    except GrpoError as error:
        return [failed("engine", f"{name} ({why})", "a vLLM that works with this version", error)]
    chosen, needed = Check("engine", f"{name} ({why})"), "engine arguments of vLLM"
    try:
        make_engine(config, name, "", None, longest_prompt=1)  # checks its options; load() would open it
    except GrpoError as error:
        return [chosen, failed("engine options", options or "none", needed, error)]
    return [chosen, Check("engine options", options or "none", needed)]
