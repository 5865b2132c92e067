"""The small models that come with the project: a tokenizer, a student and a better teacher for each environment.

They exist so that everything runs with nothing to download. ``python data/make_reference_models.py`` rebuilds them.
"""
