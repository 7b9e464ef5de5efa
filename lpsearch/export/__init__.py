"""Running a plan elsewhere: exported directories and what serves them."""
