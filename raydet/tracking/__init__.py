"""Where a run can be watched beside its own folder."""
