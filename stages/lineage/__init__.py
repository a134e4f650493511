"""`python -m stages.lineage`: what a file, a run or a model was made of, found by content."""
