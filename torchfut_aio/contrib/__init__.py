"""Sources of `as_future` from other libraries: a file for each, imported when one is adopted."""
