"""The `fewstep` command: doctor, bench, demo. The only part of the package that prints."""
