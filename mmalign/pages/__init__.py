"""The HTML pages of runs and refinements. They extend the base page of `reward_models.pages`."""

from reward_models import pages

TEMPLATES = pages.environment("mmalign", "reward_models")


def render(template: str, **values: object) -> str:
    """The page that a template of this package makes of `values`."""
    return TEMPLATES.get_template(template).render(values)
