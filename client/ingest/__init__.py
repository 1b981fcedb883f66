"""From the hospital's archive to a cohort: find, fetch, de-identify, select, write.

Identifiers stop here: what it writes holds pseudonyms only."""
