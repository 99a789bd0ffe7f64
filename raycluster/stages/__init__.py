"""The stages of a day: functions from earlier outputs to a new one. Workers import only the file they need."""
