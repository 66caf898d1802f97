"Files, checks, state, ranks and processes: what every floor above stands on."
