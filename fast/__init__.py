"""The same run sooner or in less memory. Deleting this folder leaves every run as it is."""
