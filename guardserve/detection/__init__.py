"""Reference profiles, and the detector that judges samples by one at a known rate of false alarms."""
