"Matched-budget studies: does RAL help?"
