"""`sirius eval`: tasks, graders, limited execution of code, results and their intervals."""
