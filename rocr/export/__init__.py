"""Output folders: models, reports, model cards, and their verification."""
