"""Evaluation on stored samples: metrics with intervals, win-rates, refusals, plots and the report. No model code."""
