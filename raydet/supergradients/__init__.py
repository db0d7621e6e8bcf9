"""What has SuperGradients' names and another one in raydet: `dataloaders.get`."""
