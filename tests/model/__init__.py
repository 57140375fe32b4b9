"""The failover rules, model-checked: Promela models, the runs that judge them, and the runner. See docs/model.md."""
