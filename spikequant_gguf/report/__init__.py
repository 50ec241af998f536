"""One page of figures and tables from the JSON documents of the other commands."""

from .page import Report, make_report

__all__ = ["Report", "make_report"]
