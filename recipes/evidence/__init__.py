"""The paper's comparisons in small: what each stage is for, measured on the generated corpus with several seeds."""
