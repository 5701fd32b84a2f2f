"""Reading of config.json: what a family is, and what makes two models one."""
