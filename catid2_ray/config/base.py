"""What every section of the recipe is made of: frozen, no unknown keys, each field with its unit, range and source."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

NOT_STATED = "not stated in the paper"


def setting(
    default: Any = ..., description: str = "", *, unit: str, paper: str = NOT_STATED, operational=False, **limits
) -> Any:
    """A recipe field: what it is, unit, source (unless operational or a section), range (pydantic's ge, le, min_length …)."""
    extra = {"unit": unit} | ({"operational": True} if operational else {} if unit == "section" else {"paper": paper})
    return Field(default, description=description, json_schema_extra=extra, **limits)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    def identity(self) -> dict:
        """The settings that decide the result, as JSON values: all but the operational ones."""
        fields = type(self).model_fields
        dumped = self.model_dump(mode="json")
        for name, field in fields.items():
            if (field.json_schema_extra or {}).get("operational"):
                del dumped[name]
            elif isinstance(value := getattr(self, name), Section):
                dumped[name] = value.identity()
        return dumped
