"""One line, appended to a day: names, files, locks, sync, retention, and the lines back again."""
