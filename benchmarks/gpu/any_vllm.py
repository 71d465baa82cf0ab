"""grpo with whichever vLLM is installed: how a release that grpo refuses gets its first look at a GPU."""

from grpo.cli import main
from grpo.generate.engines import vllm_settings

vllm_settings.OLDEST, vllm_settings.NEWEST = (0, 0), (999, 0)

if __name__ == "__main__":
    main()
