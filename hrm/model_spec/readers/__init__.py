"""Readers of config.json files by what their families have in common; `hrm.model_spec.families` has them all."""
