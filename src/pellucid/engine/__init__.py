"""Running a model: inputs, edits, runs, replay, the sweep planner, executors, the activation store."""
