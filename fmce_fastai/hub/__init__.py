"Oracles on the Hugging Face Hub."
