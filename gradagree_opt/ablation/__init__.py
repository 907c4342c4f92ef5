"""Ablation studies: a study file in; runs, statistics, tables and figures out."""
