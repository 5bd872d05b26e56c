"""RULER's 13 tasks (Hsieh et al. 2024, arXiv 2404.06654): structure and metrics as published, wording our own."""
