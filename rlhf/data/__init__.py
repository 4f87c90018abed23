"""Rows in, token ids out: reading data sets, chat templates, filters, splits and batches."""
