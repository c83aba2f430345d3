"""The stages of the recipe, one file each: two pure functions and the parents they start from."""

import importlib

import ml_collections

from cfpp.stages.stage import Parent, Stage, State, check_choice

# The first samples whole clips, the second causally in many steps, and all others in few.
STAGES = ("bidirectional", "ar_diffusion", "consistency", "ode", "dmd")

__all__ = ["STAGES", "Parent", "Stage", "State", "build"]


def build(config: ml_collections.ConfigDict) -> Stage:
    """The stage that `config.stage` names.

    Raises:
      ValueError: there is no such stage.
    """
    check_choice("stage", config.stage, STAGES)
    return importlib.import_module(f"cfpp.stages.{config.stage}").build(config)
