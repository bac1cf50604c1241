"""The sections of a report, one file per question. Each is a function from a `Question` to a `Section`."""
