"""For the site: `Example:` of a docstring is what griffe knows as `Examples:`."""

import re
from typing import Any

from griffe import Extension, Object


class Examples(Extension):
    """Renames that section, so that its lines are shown as code."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
