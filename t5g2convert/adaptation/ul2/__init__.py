"""UL2: tasks, corruption, sentinels, sampling."""
