"""What all settings are made of.

The docstring under a setting is its description, which `mmllm configs show` and the settings reference print.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from mmllm.errors import EXIT_USAGE, MmllmError
from mmllm.paths import expand_path


class ConfigError(MmllmError):
    """A setting that cannot be used; the message says which, what was given and what is allowed."""

    exit_status = EXIT_USAGE


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=False, protected_namespaces=(), use_attribute_docstrings=True
    )


PathText = Annotated[str, AfterValidator(expand_path)]  # `~`, `$HOME` and `file://` become the path they mean
PositiveInt = Annotated[int, Field(gt=0)]
NotNegativeInt = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Precision = Literal["fp32", "bf16", "auto"]

# The mark of a setting, or of a whole section, that may change between two starts of one run: it decides nothing about
# the weights but their last bits. `mmllm.runs.state` compares all others.
RESUMABLE: Any = Field(json_schema_extra={"resumable": True})
