"""The `env.webshop` section of a recipe."""

from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from envs import comma_list
from envs.webshop.goals import Profile

Mistake = Literal["another product", "another option", "no option"]


class Settings(BaseModel):
    """What is sold, who wants what, and who serves the pages."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    data: Path | None = None
    """Folder of the official files (items_shuffle*.json, items_ins_v2*.json, items_human_ins.json). Empty: a catalogue
    of our own, made here in the same formats."""
    products: int = Field(3000, ge=100)
    """Size of our own catalogue."""
    catalogue_seed: int = Field(0, ge=0)
    """Another seed makes another catalogue of our own."""
    num_products: int | None = Field(None, ge=1)
    """Only the first so many raw products of the files, as the official option. Empty: all."""
    human_goals: bool = True
    """Goals are people's instructions; else the synthetic ones, one for each combination of a product's options."""
    limit_goals: int | None = Field(None, ge=1)
    """Only so many goals, drawn by their weights, as the official option. Empty: all."""
    show_attrs: bool = False
    """Whether items have a page of attributes, as the official option."""
    profile: Profile = "official"
    """`official`: with the quirks that published numbers were made with. `fixed`: plain bugs mended, see
    envs/webshop/text.py."""
    draw_seed: int = Field(0, ge=0)
    """Seed of purchase prices and price ceilings, which are drawn once and kept; the official code draws them anew
    each time."""
    splits: Path | None = None
    """Folder with train_indices.json and test_indices.json as published with ETO: the test goals become the seen split.
    Empty: splits of our own, drawn by the products."""
    train_goals: int | None = Field(None, ge=1)
    """Most goals of the train split. Empty: all that are left."""
    seen_goals: int = Field(200, ge=1)
    """Goals of the seen split, each of another product, which train has not, of categories that train has, too."""
    unseen_goals: int = Field(200, ge=1)
    """Goals of the unseen split, of categories that train has not; without official lists each of another product."""
    noise: float = Field(0.0, ge=0, le=1)
    """Share of the expert's episodes with a mistake; what such a purchase is worth, `experts.min_reward` may keep."""
    mistakes: Annotated[list[Mistake], BeforeValidator(comma_list), Field(min_length=1)] = list(get_args(Mistake))
    """The mistakes, of which each such episode has one: a neighbour of the right product, wrong options, or none."""
    url: str | None = Field(None, pattern="^https?://")
    """Address of a WebShop site that serves the pages, ours or the official one, of the same catalogue. Empty: the
    pages are made in the environment's own process, without HTTP."""

    @model_validator(mode="after")
    def _only_where_it_matters(self) -> Self:
        for key in ("products", "catalogue_seed"):
            if self.data is not None and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is for our own catalogue and has no effect beside data={self.data}")
        return self
