"""`sirius eval`: tasks, scoring, limited execution of answers, results and their intervals."""
