"""export: a policy of a run -> a plain Hugging Face directory with a model card."""

from grpo.manage.export.folder import export
from grpo.manage.export.push import check_repository, push

__all__ = ["check_repository", "export", "push"]
