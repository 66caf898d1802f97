"The shell commands."
