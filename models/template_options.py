"""Options of tools that put conversations through a chat template."""

import datetime
import json
from dataclasses import dataclass
from typing import Any, Optional

from megapatch.models.cli import opt


@dataclass(frozen=True, kw_only=True)
class TemplateOptions:
    """Which chat template, and what it is told; whoever inherits calls ``check_template``."""

    template: Optional[str] = opt(
        "name of one of the tokenizer's chat templates, or a Jinja file (default: the tokenizer's own, and its "
        "tool_use template for conversations with tools)",
        None,
        metavar="NAME|FILE",
    )
    template_arguments: str = opt(
        "further variables that the template sees, as JSON, such as '{\"enable_thinking\": false}'", "", metavar="JSON"
    )
    date: Optional[str] = opt("what a template that writes today's date takes for it", None, metavar="YYYY-MM-DD")

    def check_template(self) -> None:
        """ValueError for what is no JSON object, or no date."""
        _ = self.arguments, self.today

    @property
    def arguments(self) -> dict[str, Any]:
        """--template-arguments."""
        from megapatch.models.chat_load import RESERVED  # not for --help, which needs no jinja2

        try:
            found = json.loads(self.template_arguments or "{}")
        except ValueError as error:
            raise ValueError(f"--template-arguments {self.template_arguments}: not JSON ({error})") from error
        if not isinstance(found, dict):
            raise ValueError(f"--template-arguments {self.template_arguments}: expected a JSON object")
        if taken := [name for name in RESERVED if name in found]:
            raise ValueError(f"--template-arguments: {taken[0]} comes from the conversations; leave it out")
        return found

    @property
    def today(self) -> datetime.date | None:
        """--date."""
        try:
            return datetime.date.fromisoformat(self.date) if self.date else None
        except ValueError as error:
            raise ValueError(f"--date {self.date}: {error}; expected YYYY-MM-DD") from error
