"""A locked room for programs nobody has read: see `outside.run_program`."""
