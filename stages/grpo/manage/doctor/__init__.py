"""doctor: is everything here that a configuration needs? Looks and tries, makes no run and takes no lock."""

from grpo.manage.doctor.report import Report, examine, print_report

__all__ = ["Report", "examine", "print_report"]
